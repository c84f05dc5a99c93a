"""Draws docs/figures/batch_path.svg: the path of a batch. `python docs/batch_path_figure.py`."""

from pathlib import Path

BOXES = {
    "shards": (20, 60, "shards", "tars + index"),
    "plan": (20, 180, "plan", "(seed, step) -> N identities"),
    "loader": (220, 120, "loader", "decode, augment"),
    "step": (420, 120, "step", "2n images forward"),
    "loss": (620, 120, "loss", "n anchors x N positives"),
    "engine": (820, 120, "engine", "average, clip, update"),
    "mining": (420, 240, "mining", "hard negative classes"),
    "ranks": (620, 20, "all ranks", "positives, with gradient"),
    "after": (820, 240, "train, evaluate, track", "save, judge, log"),
}
ARROWS = (
    *(("shards", "loader"), ("plan", "loader"), ("loader", "step"), ("step", "loss"), ("loss", "engine")),
    *(("ranks", "loss"), ("loss", "ranks"), ("step", "mining"), ("mining", "plan"), ("engine", "after")),
)
WIDTH, HEIGHT = 170, 56


def main() -> None:
    """Write the figure."""
    lines = [_arrow(a, b) for a, b in ARROWS] + [_box(*box) for box in BOXES.values()]
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1b1f24;text-anchor:middle} .small{font-size:11px;fill:#59636e}"
        " rect{fill:#f5f6f8;stroke:#0b63a5} line{stroke:#59636e;marker-end:url(#head)}"
    )
    marker = '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
    head = f'{marker}<path d="M0,0 7,3 0,6z"/></marker>'
    body = "\n".join(lines)
    Path(__file__).with_name("figures").joinpath("batch_path.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 316"><style>{style}</style><defs>{head}</defs>\n'
        f'<rect width="1010" height="316" style="fill:#ffffff;stroke:none"/>\n{body}\n</svg>\n'
    )


def _box(left: int, top: int, title: str, about: str) -> str:
    middle = left + WIDTH // 2
    about = f'<text class="small" x="{middle}" y="{top + 42}">{about.replace(">", "&gt;")}</text>'
    return (
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{middle}" y="{top + 24}">{title}</text>{about}'
    )


def _arrow(a: str, b: str) -> str:
    """Join the nearest sides of two boxes."""
    (ax, ay, *_), (bx, by, *_) = BOXES[a], BOXES[b]
    if abs(ax - bx) >= WIDTH:
        right = ax < bx
        begin = (ax + (WIDTH if right else 0), ay + HEIGHT // 2)
        end = (bx + (0 if right else WIDTH), by + HEIGHT // 2)
    else:
        shift = 12 if ay < by else -12
        down = ay < by
        begin = (ax + WIDTH // 2 + shift, ay + (HEIGHT if down else 0))
        end = (bx + WIDTH // 2 + shift, by + (0 if down else HEIGHT))
    return f'<line x1="{begin[0]}" y1="{begin[1]}" x2="{end[0]}" y2="{end[1]}"/>'


if __name__ == "__main__":
    main()
