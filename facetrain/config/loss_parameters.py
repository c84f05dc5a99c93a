"""What belongs to one loss alone: sections of section `loss`."""

from dataclasses import dataclass
from typing import Literal

from facetrain.config.bounds import at_least, more_than_0


@dataclass(frozen=True, kw_only=True)
class AngularConfig:
    """angular, npair-angular (Wang 2017)."""

    angle_deg: float = 45.0
    """Alpha: the largest angle that a negative may see the pair under, in degrees."""
    negatives: Literal["all", "positives"] = "all"
    """all: the 2 (N - 1) embeddings of other identities; positives: the N - 1 positives among them."""
    weight: float = 2.0
    """npair-angular: what the angular loss is multiplied by."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 0 < self.angle_deg < 90:
            raise ValueError(f"loss.angular.angle_deg: expected degrees in (0, 90), got {self.angle_deg}")
        more_than_0("loss.angular.weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """softmax, arcface, proxy-nca, group: one learned vector for each identity that is trained on."""

    learning_rate_factor: float = 1.0
    """Their learning rate over that of the network."""
    weight_decay: float = 0.0
    """Their weight decay."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.classes.learning_rate_factor", self.learning_rate_factor)
        if self.weight_decay < 0:
            raise ValueError(f"loss.classes.weight_decay: expected 0 (off) or more, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class ArcFaceConfig:
    """arcface (Deng 2019)."""

    margin_rad: float = 0.5
    """What is added to the angle between a face and its own class, in radians."""
    scale: float = 64.0
    """What cosines are multiplied by."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 0 <= self.margin_rad < 1.5:
            raise ValueError(f"loss.arcface.margin_rad: expected radians in [0, 1.5), got {self.margin_rad}")
        more_than_0("loss.arcface.scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class ProxyNcaConfig:
    """proxy-nca (Movshovitz-Attias 2017)."""

    scale: float = 1.0
    """What squared distances of unit vectors are multiplied by."""
    own_in_denominator: bool = False
    """Keep the own proxy in the denominator, as common code does and the paper doesn't."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.proxy_nca.scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """group (Elezi 2020)."""

    anchors: int = 1
    """Images of each identity, drawn at random, whose class is given; fewer than train.images_per_identity."""
    iterations: int = 1
    """Refinement steps."""
    temperature: float = 10.0
    """What logits are divided by before the first softmax."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        at_least("loss.group.anchors", self.anchors, 0)
        at_least("loss.group.iterations", self.iterations, 1)
        more_than_0("loss.group.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """contrastive (Hadsell 2006)."""

    margin: float = 1.0
    """Distance of unit vectors that other identities are pushed to."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.contrastive.margin", self.margin)


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """triplet (Schroff 2015, Hermans 2017)."""

    margin: float = 0.2
    """In squared distances of unit vectors."""
    mining: Literal["random", "semi-hard", "batch-hard"] = "semi-hard"
    """random: one random triplet for each image; semi-hard: all whose negative lies beyond the positive, within the
    margin; batch-hard: farthest positive and nearest negative of each image."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.triplet.margin", self.margin)


@dataclass(frozen=True, kw_only=True)
class LiftedConfig:
    """lifted (Oh Song 2016)."""

    margin: float = 1.0
    """In distances of unit vectors."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.lifted.margin", self.margin)


@dataclass(frozen=True, kw_only=True)
class RankedListConfig:
    """ranked-list (Wang 2019)."""

    alpha: float = 1.2
    """Distance of unit vectors that other identities are pushed to."""
    margin: float = 0.4
    """How far below alpha the own identity is pulled."""
    temperature: float = 5.0
    """Of the negatives' weights exp(temperature (alpha - distance)); at most 5."""
    negative_share: float = 0.5
    """Weight of the negatives' part; the positives' has the rest."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        more_than_0("loss.ranked_list.margin", self.margin)
        if self.alpha <= self.margin:
            raise ValueError(f"loss.ranked_list.alpha: expected more than the margin {self.margin}, got {self.alpha}")
        if not 0 <= self.temperature <= 5:
            raise ValueError(f"loss.ranked_list.temperature: expected 0 to 5, got {self.temperature}")
        if not 0 <= self.negative_share <= 1:
            raise ValueError(
                f"loss.ranked_list.negative_share: expected a fraction in [0, 1], got {self.negative_share}"
            )


@dataclass(frozen=True, kw_only=True)
class MultiSimilarityConfig:
    """multi-similarity (Wang 2019)."""

    alpha: float = 2.0
    """Sharpness among positives."""
    beta: float = 50.0
    """Sharpness among negatives."""
    base: float = 0.5
    """Cosine that both are compared with."""
    epsilon: float = 0.1
    """Slack, in cosines, within which its miner keeps a pair."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for key in ("alpha", "beta"):
            more_than_0(f"loss.multi_similarity.{key}", getattr(self, key))
        at_least("loss.multi_similarity.epsilon", self.epsilon, 0)
