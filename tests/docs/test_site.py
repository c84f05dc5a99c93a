"""The pages of docs/: they build without a warning, their links and commands exist, and what they show is true."""

import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT, run

from facetrain.cli import main

PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = run("mkdocs", "build", "--strict", "--site-dir", tmp_path, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "embedding" / "index.html").read_text()
    assert "https://fonts" not in page  # nothing is fetched from elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.is_file(), link
            heads = [re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads_of(target)]
            assert not anchor or anchor in heads, link


def heads_of(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"- (\S+\.md)", (ROOT / "mkdocs.yml").read_text())
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
