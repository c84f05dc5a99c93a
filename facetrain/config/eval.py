"""Section `eval`: what a run is judged on."""

import re
from dataclasses import dataclass

from facetrain.config.bounds import at_least

_OF_PAIRS = ("accuracy", "auc", "vr_at_far_1e-2", "vr_at_far_1e-3")
_MORE_IS_BETTER = {
    "heldout": _OF_PAIRS,
    "verification": _OF_PAIRS,
    "view1": ("accuracy",),
    "closed-full": ("rank1", "rank5"),
    "closed-surrogate": ("rank1", "rank5"),
    "open-best-rowden": ("rank1", "dir_rank1_at_far_1e-2"),
    "open-best-rowden-single": ("rank1", "dir_rank1_at_far_1e-2"),
    "open-counts": ("rank1",),
}
"""What a run measures of which more is better: of held-out pairs, and by each protocol of an evaluation set."""
_LISTS = {"verification": "pairs", "view1": "view1"} | dict.fromkeys(
    ("closed-surrogate", "open-best-rowden", "open-best-rowden-single"), "open_set_people"
)
"""The key of the list without which a protocol isn't run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a run is judged on while it trains and at its end."""

    every_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end alone."""
    at_start: bool = False
    """Evaluate the untrained network too, as step 0."""
    dataset: str = "lfw"
    """Name of the evaluation set in metrics and results; with 'lfw' its published counts are checked."""
    images: tuple[str, ...] = ()
    """Evaluation images: a folder of Name/Name_0001.jpg, or tars of it; none evaluates on held-out identities alone."""
    pairs: str | None = None
    """Verification pairs, in the form of LFW's pairs.txt."""
    view1: tuple[str, ...] = ()
    """LFW's View 1, pairsDevTrain.txt and pairsDevTest.txt: a set to choose models by."""
    open_set_people: str | None = None
    """List of the people of open-best-rowden, one name a line."""
    mirror: bool = True
    """Add the embedding of the mirrored image."""
    draws: int = 1
    """Seeded draws of the held-out probes of open-best-rowden; 1 takes the lowest-numbered image."""
    best_metric: str = "heldout/accuracy"
    """Metric, more being better, by which the best checkpoint is chosen, such as lfw/view1/accuracy."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        at_least("eval.every_steps", self.every_steps, 0)
        at_least("eval.draws", self.draws, 1)
        if not re.fullmatch(r"\w[\w.:\- ]*", self.dataset):  # else MLflow refuses all figures, by their names
            raise ValueError(f"eval.dataset: expected letters, digits, blanks and _ - . :, got '{self.dataset}'")
        if self.images and self.pairs is None and not self.view1:
            raise ValueError("eval.pairs: expected a pairs file, since eval.images is given")
        for name in ("pairs", "view1", "open_set_people"):
            if getattr(self, name) and not self.images:
                raise ValueError(f"eval.{name}: goes with eval.images, which is empty")
        if len(self.view1) not in (0, 2):
            raise ValueError(f"eval.view1: expected pairsDevTrain.txt and pairsDevTest.txt, got {list(self.view1)}")
        self._check_best_metric()

    @property
    def chooses_on_test(self) -> bool:
        """Whether the best checkpoint is chosen by what LFW is published on, which makes its figure optimistic."""
        return self.best_metric.startswith("lfw/") and not self.best_metric.startswith("lfw/view1/")

    def _check_best_metric(self) -> None:
        *source, figure = self.best_metric.split("/")
        what, protocol = f"eval.best_metric: '{self.best_metric}'", source[-1] if source else ""
        is_heldout = source == ["heldout"]
        is_known = is_heldout or (source[:-1] == [self.dataset] and protocol in _MORE_IS_BETTER.keys() - {"heldout"})
        if not is_known:
            protocols = ", ".join(list(_MORE_IS_BETTER)[1:])
            raise ValueError(
                f"{what}, expected heldout/FIGURE or {self.dataset}/PROTOCOL/FIGURE, the protocol of {protocols}"
            )
        if figure not in _MORE_IS_BETTER[protocol]:
            raise ValueError(f"{what}, expected a figure of {', '.join(_MORE_IS_BETTER[protocol])}")
        needed = _LISTS.get(protocol)
        if not is_heldout and not (self.images and (needed is None or getattr(self, needed))):
            raise ValueError(f"{what} needs eval.images{f' and eval.{needed}' if needed else ''}")
