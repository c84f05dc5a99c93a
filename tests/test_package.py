"""What is shipped, and what it needs."""

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

import facetrain

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [name for name in wheel.namelist() if ".dist-info/" not in name]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "facetrain").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in files} == {"facetrain"}


def test_the_wheel_has_one_version_and_one_command(wheel: zipfile.ZipFile) -> None:
    info = f"facetrain-{facetrain.__version__}.dist-info"
    assert f"{info}/METADATA" in wheel.namelist()
    assert "facetrain = facetrain.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_constraints_pin_everything_the_project_asks_for() -> None:
    pinned = {name(line) for line in pins()}
    asked = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    assert {name(requirement) for requirement in asked} <= pinned


def test_constraints_are_exact_versions_of_public_packages() -> None:
    for line in pins():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


def test_installed_versions_of_direct_dependencies_are_those_that_are_asked_for() -> None:
    from packaging.requirements import Requirement

    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_nothing_in_the_tree_looks_like_a_secret_but_examples() -> None:
    command = [sys.executable, "-m", "detect_secrets", "scan"]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["results"]
    lines = {
        f"{file}: {(ROOT / file).read_text().splitlines()[finding['line_number'] - 1].strip()}"
        for file in found
        for finding in found[file]
    }
    examples = re.compile(r"user:password@|me:(secret|pa55|pass)@|MLFLOW_TRACKING_URI|k-123|my secret words|: .\*\*\*")
    assert [line for line in sorted(lines) if not examples.search(line)] == []


def test_a_lower_module_imports_without_the_heavy_libraries() -> None:
    code = "import facetrain.cli, sys; print([m for m in ('torch', 'deepspeed', 'mlflow', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", ["README.md", "LICENSE", "CHANGELOG.md", ".ci/run", ".pre-commit-config.yaml"])
def test_a_file_that_others_count_on_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


def test_pre_commit_runs_the_checks_of_the_suite() -> None:
    import yaml

    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    suite = Path(ROOT / "tests" / "run.sh").read_text()
    for hook in repository["hooks"]:
        assert f"run {hook['entry']}" in suite


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if not line.startswith("#")]


def name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")
