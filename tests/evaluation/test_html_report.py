"""The page of an evaluation: well-formed, complete in itself, and safe whatever images are called."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from data.drawn_faces import drawn_image, encoded
from face_lists import tied_set, write_pairs

from facetrain.evaluation.definitions import DEFINITIONS, PUBLISHED
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.html_report import NUM_HARDEST, write_html
from facetrain.evaluation.inputs import ImageKey
from facetrain.evaluation.lfw import Evaluation, evaluate
from facetrain.evaluation.lists import Request
from facetrain.evaluation.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('1')</script>&\"x"


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def drawn_picture(key: ImageKey) -> bytes:
    return encoded(drawn_image(key[1], 40, 40))


def evaluated(folder: Path, *, dataset: str, person: str = "Person") -> Evaluation:
    names, embeddings = tied_set(0, num_people=120)
    names = [name.replace("Person", person) for name in names]
    people = folder / "people.txt"
    people.write_text("\n".join(f"{person}_{number}" for number in range(40) if number % 6))
    pairs = write_pairs(folder / "pairs.txt", names, per_fold=30)
    return evaluate(names, embeddings, Request(pairs=pairs, open_set_people=people, dataset=dataset, bootstrap=100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return evaluated(folder, dataset="drawn")


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, folder: Path) -> Page:
    write_report(evaluation, folder, subject="runs/drawn", read_picture=drawn_picture)
    return Page(folder / "report.html")


def test_the_page_is_well_formed_and_needs_no_other_file(page: Page, folder: Path) -> None:
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in page.sources)
    assert not re.search(r"https?://|url\(|@import", (folder / "report.html").read_text())


def test_the_page_shows_the_figures_of_every_protocol_and_what_they_mean(page: Page, evaluation: Evaluation) -> None:
    outcome = evaluation.verification
    assert f"{100 * outcome.accuracy:.2f}% ± {100 * outcome.se:.2f}" in page.text
    for name, (draw,) in evaluation.open.items():
        rate = draw.dir_at_far(1e-2)
        assert f"{name} {DEFINITIONS[name.partition('/')[0]]}" in page.text
        assert f"{100 * rate.value:.2f}% ± {100 * rate.se:.2f} {rate.point.threshold:.4f}" in page.text
    assert f"closed-full {DEFINITIONS['closed-full']}" in page.text
    for fold, accuracy in enumerate(outcome.fold_accuracies, start=1):
        assert f" {fold} {100 * accuracy:.2f}% " in page.text
    assert "drawn/open-best-rowden/dir_rank1_at_far_1e-2" in page.text
    assert "closed-surrogate needs the 5,749 people of LFW" in page.text
    assert "None: published figures are of LFW" in page.text
    assert page.text.count("runs/drawn: ") == 1


def test_the_hardest_pairs_stand_with_their_pictures_and_scores(page: Page, evaluation: Evaluation) -> None:
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 2 * 2 * NUM_HARDEST
    outcome = evaluation.verification
    genuine, impostor = outcome.scores[outcome.is_genuine], outcome.scores[~outcome.is_genuine]
    shown = [float(score) for score in re.findall(r"score (-?\d\.\d{4}) ", page.text)]
    assert shown == [*np.sort(genuine)[:NUM_HARDEST], *np.sort(impostor)[::-1][:NUM_HARDEST]]


def test_without_pictures_the_names_stand_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    write_html(evaluation, tmp_path / "report.html", figures=[])
    page = Page(tmp_path / "report.html")
    assert not page.sources
    assert page.text.count("score ") >= 2 * NUM_HARDEST


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "").replace(" ", "")  # a name holds no folder, a line of pairs splits at spaces
    evaluation = evaluated(tmp_path, dataset=EVIL, person=evil)
    write_html(evaluation, tmp_path / "report.html", figures=[], subject=EVIL, read_picture=drawn_picture)
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert evil in page.text
    assert EVIL in page.text


@pytest.mark.slow  # all protocols on the whole of LFW
def test_lfw_stands_beside_the_published_figures(face_data: Path, tmp_path: Path) -> None:
    names, embeddings = load_embeddings_npz(face_data / "lfw_embeddings_mobilefacenet.npz")
    protocols = face_data / "protocols"
    request = Request(
        pairs=protocols / "pairs.txt",
        view1=(protocols / "pairsDevTrain.txt", protocols / "pairsDevTest.txt"),
        open_set_people=protocols / "lfw_ytf_596_subjects.txt",
        convention="insightface",
    )
    write_html(evaluate(names, embeddings, request), tmp_path / "report.html", figures=[])
    text = Page(tmp_path / "report.html").text
    assert "this evaluation 99.22% ± 0.20" in text
    for row in PUBLISHED:
        assert f"{row.model} {row.verification:.2f}%" in text
    assert "192-pair-mc 98.27% ± 0.19 88.58% 66.51%" in text
    assert "ResNet-50, ArcFace 99.53% not published not published" in text
