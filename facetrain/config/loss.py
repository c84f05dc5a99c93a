"""Section `loss`: the objective."""

from dataclasses import dataclass, field, fields
from typing import Literal

from facetrain.config.bounds import at_least
from facetrain.config.loss_parameters import (
    AngularConfig,
    ArcFaceConfig,
    ClassesConfig,
    ContrastiveConfig,
    GroupConfig,
    LiftedConfig,
    MultiSimilarityConfig,
    ProxyNcaConfig,
    RankedListConfig,
    TripletConfig,
)

NPAIR_LOSSES = ("npair-mc", "npair-ovo", "tuplet")
"""Losses of a rank's own rows against the gathered columns."""

LossName = Literal[
    "npair-mc",
    "npair-ovo",
    "tuplet",
    "angular",
    "npair-angular",
    "softmax",
    "arcface",
    "proxy-nca",
    "group",
    "contrastive",
    "triplet",
    "lifted",
    "ranked-list",
    "multi-similarity",
]

_OF_UNIT_VECTORS = (
    "angular",
    "arcface",
    "proxy-nca",
    "contrastive",
    "triplet",
    "lifted",
    "ranked-list",
    "multi-similarity",
)

_SECTIONS_OF: dict[str, tuple[str, ...]] = {
    "angular": ("angular",),
    "npair-angular": ("angular",),
    "softmax": ("classes",),
    "arcface": ("arcface", "classes"),
    "proxy-nca": ("proxy_nca", "classes"),
    "group": ("group", "classes"),
    "contrastive": ("contrastive",),
    "triplet": ("triplet",),
    "lifted": ("lifted",),
    "ranked-list": ("ranked_list",),
    "multi-similarity": ("multi_similarity",),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective."""

    name: LossName = "npair-mc"
    """npair-mc: the multi-class N-pair loss (Sohn, NeurIPS 2016); npair-ovo: one against one; tuplet: other anchors;
    the others: docs/methods.md."""
    l2_weight: float = 0.002
    """Weight of the penalty mean ||f||^2 over all 2N embeddings, whatever the loss; 0 is none."""
    symmetric: bool = False
    """npair-mc: the mean of anchors against all positives and of positives against all anchors."""
    temperature: float | None = None
    """npair-mc, npair-ovo, tuplet: a number: cosines divided by it take the place of inner products; null: embeddings
    aren't normalised."""
    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """In which gradients of gathered embeddings are summed over ranks; bfloat16: half the bytes, 0.05% error."""
    memory_batches: int = 0
    """npair-mc, npair-ovo, tuplet: how many batches before this one give further negatives, as they were embedded then
    (cross-batch memory); 0 is none."""
    tile_bytes: int = 1 << 25
    """Memory for logits at a time, in bytes: the n x N of a rank are made in tiles of rows, scores of identities in
    tiles of identities; losses of pytorch-metric-learning have none."""
    angular: AngularConfig = field(default_factory=AngularConfig)
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    arcface: ArcFaceConfig = field(default_factory=ArcFaceConfig)
    proxy_nca: ProxyNcaConfig = field(default_factory=ProxyNcaConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    triplet: TripletConfig = field(default_factory=TripletConfig)
    lifted: LiftedConfig = field(default_factory=LiftedConfig)
    ranked_list: RankedListConfig = field(default_factory=RankedListConfig)
    multi_similarity: MultiSimilarityConfig = field(default_factory=MultiSimilarityConfig)

    def __post_init__(self) -> None:
        """Check the bounds, and that only the chosen loss has settings."""
        if self.l2_weight < 0:
            raise ValueError(f"loss.l2_weight: expected 0 or more, got {self.l2_weight}")
        if self.symmetric and self.name != "npair-mc":
            raise ValueError(f"loss.symmetric: goes with loss.name=npair-mc, got '{self.name}'")
        if self.temperature is not None and self.name not in NPAIR_LOSSES:
            raise ValueError(f"loss.temperature: goes with loss.name {', '.join(NPAIR_LOSSES)}, got '{self.name}'")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"loss.temperature: expected more than 0, or null, got {self.temperature}")
        at_least("loss.memory_batches", self.memory_batches, 0)
        if self.memory_batches and (self.name not in NPAIR_LOSSES or self.symmetric):
            got = "loss.symmetric" if self.symmetric else f"'{self.name}'"
            raise ValueError(
                f"loss.memory_batches: goes with loss.name {', '.join(NPAIR_LOSSES)}, not symmetric, got {got}"
            )
        self._check_whose()

    @property
    def has_classes(self) -> bool:
        """Whether the loss learns a vector for each identity."""
        return "classes" in _SECTIONS_OF.get(self.name, ())

    @property
    def of_unit_vectors(self) -> bool:
        """Whether norms of embeddings make no difference to the loss, but for `l2_weight`."""
        return self.name in _OF_UNIT_VECTORS or self.temperature is not None

    @property
    def scores_per_pair(self) -> int:
        """How many numbers each pair of the global batch adds to the smallest tile."""
        return 2 if self.has_classes or "angular" in self.name else 1 + self.memory_batches

    def _check_whose(self) -> None:
        """Refuse settings of another loss than the chosen one."""
        for section in dict.fromkeys(section for sections in _SECTIONS_OF.values() for section in sections):
            users = [loss for loss, sections in _SECTIONS_OF.items() if section in sections]
            settings = getattr(self, section)
            for key in () if self.name in users else fields(settings):
                if getattr(settings, key.name) != key.default:
                    raise ValueError(
                        f"loss.{section}.{key.name}: goes with loss.name {', '.join(users)}, got '{self.name}'"
                    )
        if self.name == "angular" and self.angular.weight != AngularConfig.weight:
            raise ValueError("loss.angular.weight: goes with loss.name npair-angular, got 'angular'")
