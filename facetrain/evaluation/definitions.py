"""What each protocol is, in words for a reader of a report, and what others have published under it."""

from collections.abc import Mapping
from dataclasses import dataclass

DEFINITIONS: Mapping[str, str] = {
    "verification": (
        "Are two images of one person? The pairs come in folds. For each fold the threshold is chosen that is most"
        " often right on all other folds, exactly, and then measured on the fold. Reported are the mean over the"
        " folds and its standard error, the sample standard deviation of the folds / sqrt(number of folds)."
    ),
    "VR@FAR": (
        "The share of genuine pairs that are accepted (score >= threshold) at the threshold where impostor pairs"
        " are accepted at this rate: the k-th largest impostor score, k = floor(FAR x impostor pairs + 0.5). A FAR"
        " finer than 1 / impostor pairs has no figure. The standard error is the binomial one."
    ),
    "EER": "The rate at which false accepts and false rejects are equal, on the ROC joined by straight lines.",
    "AUC": "The chance that a genuine pair scores above an impostor pair; a tie counts one half.",
    "closed-best-rowden": (
        "After Best-Rowden et al., TIFS 2014: a gallery of one image for each of 4,249 people, and 3,143 probes of"
        " 596 of them, from list files, since the lists were handed out privately."
    ),
    "closed-surrogate": (
        "Stands in for the private lists of closed-best-rowden: the gallery holds the lowest-numbered image of the"
        " 596 people of the open set and of 3,653 others, drawn anew in each draw; the probes are the 596 people's"
        " other 3,143 images."
    ),
    "closed-full": (
        "Everybody's lowest-numbered image is in the gallery, and all other images are probes. It needs no list,"
        " and is strictly harder than the published closed set."
    ),
    "open-best-rowden": (
        "After Best-Rowden et al., TIFS 2014: the people of LFW who are also in YouTube Faces and have two images"
        " or more. One image of each is held out as a genuine probe (the lowest-numbered, or one drawn), the others"
        " are the gallery. All images of everybody else are impostor probes."
    ),
    "open-best-rowden-single": (
        "The people of open-best-rowden with one gallery image each, the lowest-numbered; the next one is the probe."
    ),
    "open-counts": (
        "After Guenther et al., 2017, without any list: people with four or more images are known; their first"
        " three images are the gallery and the others genuine probes. Impostor probes are the images of people with"
        " two or three images (known-unknown), with one (unknown-unknown), or of both (all)."
    ),
    "rank": (
        "A person scores by the best of their gallery images. A probe's rank is 1 + the number of other people who"
        " score as high as its own person or higher, so that ties count against the system."
    ),
    "DIR@FAR": (
        "The share of genuine probes whose own person has rank 1 and scores at or above the threshold at which"
        " this share of impostor probes (FAR) finds somebody in the gallery. The threshold is the k-th largest of"
        " the impostor probes' best scores, k = floor(FAR x impostor probes + 0.5); ties can raise the realised"
        " FAR."
    ),
    "insightface": (
        "Verification as InsightFace's code counts it, to compare with figures printed by it: squared distances, the"
        " threshold on a grid (0.01 for accuracy, 0.001 for VAL), and the population standard deviation of the folds."
        " The exact figures are those above."
    ),
    "view1": (
        "LFW's lists to choose models by: the threshold is the best one of pairsDevTrain.txt, the accuracy that of"
        " pairsDevTest.txt, with its binomial standard error."
    ),
    "blufr": (
        "Liao et al., IJCB 2014: in each of ten trials every pair of test images is scored for VR, and a gallery of"
        " 1,000 people with one image each is searched for genuine and impostor probes. std is the sample standard"
        " deviation over the trials; the benchmark's own figure is mean - std."
    ),
}
"""By protocol or measure."""


@dataclass(frozen=True)
class Published:
    """Figures from a paper on LFW, in percent. Its identification is on the private lists of Best-Rowden et al."""

    model: str
    verification: float
    verification_se: float | None = None
    """Standard error."""
    rank1: float | None = None
    """Closed set."""
    dir_at_far: float | None = None
    """DIR@FAR=1%, rank 1, open set."""


PUBLISHED: tuple[Published, ...] = (
    Published("triplet", 95.88, 0.30, 55.14, 25.96),
    Published("triplet + class mining", 96.68, 0.30, 60.93, 34.60),
    Published("192-pair-ovo", 96.92, 0.24, 66.21, 34.14),
    Published("192-pair-mc", 98.27, 0.19, 88.58, 66.51),
    Published("320-pair-mc", 98.33, 0.17, 90.17, 71.76),
    Published("720-pair-mc", 98.45, 0.10, 91.15, 73.93),
    Published("LightCNN-A", 97.77, None, 84.79, 63.09),
    Published("LightCNN-B", 98.13, None, 89.21, 69.46),
    Published("ResNet-50, triplet", 98.98),
    Published("ResNet-50, ArcFace", 99.53),
)
"""All trained on CASIA-WebFace. Source: Sohn 2016 for the triplet and N-pair rows (CasiaNet, from scratch)."""


def definition(name: str) -> str:
    """Return what a protocol is; `open-counts/all` is a part of `open-counts`.

    A protocol that has no definition yet has none to show: the empty string.
    """
    return DEFINITIONS.get(name, DEFINITIONS.get(name.partition("/")[0], ""))
