"""The parts of a self-contained HTML page: everything is inside, so that it opens anywhere, offline, as one file.

Text is escaped here and nowhere else: functions take plain text, and return `Html` that goes into other parts as it is.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup, with all text in it escaped."""

    __slots__ = ()


def page(title: str, parts: Iterable[Html]) -> str:
    """Return a whole page."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def text(words: str, tag: str = "p", css: str = "") -> Html:
    """Return escaped text in an element."""
    attribute = f' class="{css}"' if css else ""
    return Html(f"<{tag}{attribute}>{escape(words)}</{tag}>")


def section(title: str, *parts: Html) -> Html:
    """Return a titled part of the page."""
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>")


def box(css: str, parts: Iterable[Html]) -> Html:
    """Return parts in a container of a class of the page's style."""
    return Html(f'<div class="{css}">\n' + "\n".join(parts) + "\n</div>")


def folded(summary: str, content: Html) -> Html:
    """Return content that one click on the summary unfolds."""
    return Html(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def explained(name: str, explanation: str) -> Html:
    """Return a name whose explanation is one click away."""
    return folded(name, text(explanation)) if explanation else Html(escape(name))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table that scrolls by itself where the window is too narrow for it.

    Args:
        head: The columns' names.
        rows: Cells, text or `Html`; the first names the row.
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in others)}</tr>'
        for first, *others in rows
    ]
    body = f"<thead><tr>{columns}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return Html(f'<div class="scroll" tabindex="0"><table>\n{body}</table></div>')  # focus, so that keys scroll it


def picture(data: bytes, media_type: str, description: str) -> Html:
    """Return an image whose bytes are in the page."""
    content = base64.b64encode(data).decode("ascii")
    return Html(f'<img src="data:{media_type};base64,{content}" alt="{escape(description)}">')


def _cell(words: str) -> str:
    return words if isinstance(words, Html) else escape(words)


_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f5f6f8; --ink: #1b1f24; --quiet: #59636e;
  --line: #d5dae0; --accent: #0b63a5; --shadow: #59636e99; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --card: #1e2329; --ink: #e6e9ed; --quiet: #9da7b3; --line: #353c45; --accent: #6cb6ff;
    --shadow: #9da7b399; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.quiet, footer { color: var(--quiet); font-size: 0.9rem; }
.tiles { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr));
  margin: 1.25rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.tile p { margin: 0; }
.tile .value { font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
/* A shadow at a side where a table goes on: covers of the ground's colour scroll with it, shadows stay. */
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 0.5rem; margin: 0.75rem 0;
  background:
    linear-gradient(to right, var(--ground) 50%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 50%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0.8rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { background: var(--card); color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
tr:has(.this) { background: var(--card); }
summary { cursor: pointer; color: var(--accent); }
th details p { white-space: normal; width: clamp(14rem, 40vw, 26rem); font-weight: 400; color: var(--quiet); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.figures img { width: 100%; height: auto; display: block; background: #ffffff; border: 1px solid var(--line);
  border-radius: 0.5rem; }
.pairs { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)); }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.6rem; min-width: 0; }
.faces { display: grid; grid-template-columns: 1fr 1fr; gap: 0.4rem; }
.faces img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; border-radius: 0.25rem; }
.pair p { margin: 0.3rem 0 0; font-size: 0.8rem; line-height: 1.35; }
.pair .score { font-weight: 600; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.found { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.5rem; padding: 0.9rem 0;
  border-top: 1px solid var(--line); }
.found .faces { grid-template-columns: 1fr; }
.known, .unknown { border-left: 0.3rem solid var(--accent); }
.known .score { color: var(--accent); }
.unknown { border-left-color: var(--quiet); border-left-style: dashed; }
footer { margin-top: 3rem; }
@media (max-width: 40rem) { th, td { padding: 0.4rem 0.5rem; } table { font-size: 0.85rem; } }
"""
