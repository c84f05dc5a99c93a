"""What a search found, as one HTML page with pictures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from facetrain import __version__
from facetrain.evaluation.html_page import Html, box, page, picture, text

MOST_SHOWN = 200
"""Faces on the page; search.json has all."""
_VERDICTS = {True: ("known", "pair known"), False: ("unknown", "pair unknown"), None: ("searched for", "pair")}


def search_page(
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[bytes],
    found: Iterable[Sequence[bytes]],
    about: str,
) -> str:
    """Return the page: each face beside the people it is most like.

    Args:
        rows: [n], as search.json holds them.
        pictures: [n], a JPEG of each face, or empty bytes.
        found: [n], of each of its matches the JPEG of the most alike image, or empty bytes; asked for as far as shown.
        about: The gallery and the threshold, in a line.
    """
    parts = [text("Who is this?", "h1"), text(about, css="quiet")]
    if len(rows) > MOST_SHOWN:
        parts.append(text(f"The first {MOST_SHOWN} of {len(rows):,} faces; search.json has all.", css="quiet"))
    shown = zip(rows[:MOST_SHOWN], pictures, found, strict=False)
    parts += [box("pairs found", _cards(row, face, faces)) for row, face, faces in shown]
    parts.append(text(f"facetrain {__version__}. Scores are cosine similarities.", "footer"))
    return page("Who is this?", parts)


def _cards(row: Mapping[str, Any], face: bytes, faces: Sequence[bytes]) -> list[Html]:
    verdict, css = _VERDICTS[row["is_known"]]
    cards = [_card(face, verdict, row["image"], css)]
    cards += [
        _card(data, f"score {match['score']:.4f}", match["person"])
        for match, data in zip(row["matches"], faces, strict=True)
    ]
    return cards


def _card(data: bytes, head: str, name: str, css: str = "pair") -> Html:
    shown = [box("faces", [picture(data, "image/jpeg", name)])] if data else []
    return box(css, [*shown, text(head, css="score"), text(name)])
