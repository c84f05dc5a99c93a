"""The pages of docs/: they build without a warning, their links and commands exist, and what they show is true."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from commands import ROOT, run
from people.conftest import make_run

from facetrain.cli import main

PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.fixture
def people_run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a-run")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "embedding" / "index.html").read_text()
    assert "https://fonts" not in page  # nothing is fetched from elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_formula_is_taken_for_a_tag(page: Path) -> None:
    """Angle brackets around a letter vanish from the page where they stand outside code."""
    text = re.sub(r"```.*?```|`[^`]*`|^ {4,}.*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"<(?!https?://)[A-Za-z][^>]*>", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.is_file(), link
            assert target.resolve().is_relative_to(page.parent), f"{link}: not part of the site"
            assert not anchor or anchor in anchors_of(target), link


def anchors_of(page: Path) -> list[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"- (?:[\w -]+: )?(\S+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == [page.name for page in PAGES]


def test_flags_and_files_of_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, str] = {}
    for page, line in COMMANDS:
        for part in re.split(r"\s\|\s|;", line):
            words = [word for word in shlex.split(part, comments=True) if "=" not in word]
            for word in words:
                if word.startswith(("configs/", "launch/", "benchmarks/")):
                    assert (ROOT / word).is_file(), f"{page}: {word}"
            if "facetrain" not in words and "facetrain.train" not in words:
                continue
            at = words.index("facetrain") + 1 if "facetrain" in words else words.index("facetrain.train") + 1
            name = words[at] if "facetrain" in words else "train"
            if name not in known:
                with pytest.raises(SystemExit):
                    main([name, "--help"])
                known[name] = capsys.readouterr().out
            for flag in (word for word in words[at:] if word.startswith("--")):
                assert re.search(rf"{re.escape(flag)}\b", known[name]), f"{page}: {name} {flag}"


def commands_of(page: str, word: str) -> list[list[str]]:
    """Return the words of a page's commands of that name."""
    lines = [shlex.split(line, comments=True) for name, line in COMMANDS if name == page]
    return [words[1:] for words in lines if words[:2] == ["facetrain", word]]


@pytest.mark.slow
def test_the_pages_of_the_first_hour_do_what_they_say(
    synthetic: Path, people_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "faces").symlink_to(synthetic / "faces")
    (tmp_path / "quickstart" / "run").symlink_to(people_run)
    (people_run / "results.json").write_text('{"thresholds": {"open-best-rowden": {"1e-1": 0.9}}}')
    for word in ("embed", "index", "search"):
        (words,) = commands_of("quickstart.md", word)
        main([*words, "--device", "cpu"])
    assert (tmp_path / "heldout.npz").is_file()
    assert "known" in (tmp_path / "found" / "search.html").read_text()


@pytest.mark.slow
def test_the_page_of_casia_fits_files_of_insightface(
    face_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(face_data / "interop", "faces_webface_112x112")
    first, cleaned = commands_of("casia.md", "pack")
    main([*first, "--workers", "1"])
    (words,) = commands_of("casia.md", "inspect")
    main(words)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "exclude.txt").write_text("3\n")
    main([*cleaned, "--workers", "1"])
    (words,) = commands_of("casia.md", "check")
    words[words.index("configs/casia_npair320.yaml")] = str(ROOT / "configs" / "casia_npair320.yaml")
    small = {"train.global_pairs": "8", "mining.candidates": "40", "data.holdout_identities": "20"}
    main([*words, *(word for key, value in small.items() for word in (f"--{key}", value))])
