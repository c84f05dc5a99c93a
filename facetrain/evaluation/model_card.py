"""The model card of a finished run: what it is, what it was trained on, how good it is, and what it isn't for."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facetrain import __version__
from facetrain.command_line import config_yaml
from facetrain.config import Config
from facetrain.data.manifest import Manifest
from facetrain.masking import mask_secrets

MODEL_CARD_FILE = "model_card.md"

_USE = """\
## Intended use

Comparing faces of people who agreed to it: verification of two images, and search in a gallery of enrolled people.
A score is the cosine of two embeddings. Decide by the threshold of a false accept rate measured on images like yours,
with a gallery as large as yours; `facetrain search --far` takes it from `results.json`.

**Not for** surveillance, covert identification, or decisions about people without a person who decides. The network
says nothing of age, sex, origin, mood or intent.

## Limits

- It knows what its training identities had: see the manifest's source. Whom they leave out, it tells apart worse.
{of_the_test_set}
- Faces must be aligned as in training; photographs through `--detector` are.
- Weights of face data may themselves be personal data, and carry the licence terms of the set.
"""


_OF_LFW = """\
- LFW is a narrow set, mostly of public figures, with known label errors. Its figures say little of any one group:
  `facetrain lfw --groups` reports groups apart."""
_OF_ANOTHER_SET = """\
- Figures are of the set that they stand beside; on other cameras, poses and people, they are others.
  `facetrain lfw --groups` reports groups of people apart."""


def write_model_card(folder: Path, config: Config, manifest: Manifest, results: Mapping[str, Any], commit: str) -> str:
    """Write `model_card.md` into a run folder, at once or not at all, and return it without its last part, the config.

    Args:
        folder: The run folder.
        config: Of the run; secrets in it are masked.
        manifest: Of the shards.
        results: As results.json holds them.
        commit: Git revision of the code; empty where it isn't known.
    """
    is_lfw = bool(config.eval.images) and config.eval.dataset == "lfw"
    use = _USE.format(of_the_test_set=_OF_LFW if is_lfw else _OF_ANOTHER_SET)
    card = "\n".join([*_head(config, manifest, commit), *_results(results, config), use])
    whole = f"{card}\n## Config\n\n```yaml\n{mask_secrets(config_yaml(config)).rstrip()}\n```\n"
    aside = folder / f".{MODEL_CARD_FILE}.{os.getpid()}"
    aside.write_text(whole, encoding="utf-8")
    aside.replace(folder / MODEL_CARD_FILE)
    return card


def _head(config: Config, manifest: Manifest, commit: str) -> Iterator[str]:
    data, train, model = config.data, config.train, config.model
    mined = "random classes" if config.mining.mode == "off" else f"classes mined ({config.mining.mode})"
    yield f"# {Path(config.run.dir).name}\n"
    yield f"Face embeddings by facetrain {__version__}{f', revision {commit[:12]}' if commit else ''}.\n"
    yield "| | |\n|---|---|"
    yield f"| network | {model.name}, input {data.image_px}x{data.image_px} {data.colour} |"
    yield f"| loss | {config.loss.name}, N = {train.global_pairs}, {mined} |"
    images = 2 * train.global_pairs * train.steps
    yield f"| training | {train.steps:,} steps, {images:,} images seen, seed {config.run.seed} |"
    yield f"| data | {manifest.images:,} images of {manifest.identities:,} identities, less {_left_out(config)} |"
    yield f"| alignment | {manifest.settings.alignment or 'images came aligned'} |"
    yield f"| manifest | sha256 {manifest.sha256} |"
    yield f"| source | fingerprint {manifest.source_sha256} |\n"


def _left_out(config: Config) -> str:
    return f"{config.data.holdout_identities:,} held out and {len(config.data.exclude):,} excluded"


def _results(results: Mapping[str, Any], config: Config) -> Iterator[str]:
    yield "## Results\n"
    rows = list(_rows(results))
    has_set, has_heldout = bool(config.eval.images), config.data.holdout_identities > 0
    if not rows:
        without = "the run held no identities out and had no evaluation set"
        yield f"None: {'nothing could be measured' if has_set or has_heldout else without}.\n"
        return
    on_set = [f"identification and verification on `{config.eval.dataset}`, by protocol"] if has_set else []
    on_heldout = ["`heldout`: verification of identities that were held out of training"] if has_heldout else []
    yield f"Of the final weights; {'; '.join([*on_set, *on_heldout])}.\n"
    yield "| protocol | figure | value |\n|---|---|---|"
    yield from rows
    what = "What the protocols are: `report.html` beside this card; thresholds" if has_set else "Thresholds"
    yield f"\n{what}: `results.json`.\n"


def _rows(results: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in results.items():
        if name == "thresholds":
            continue
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}/{name}" if prefix else name)
        elif name.endswith(("rank1", "accuracy", "rank1_at_far_1e-2", "vr_at_far_1e-3")):
            se = f" +- {100 * results['se']:.2f} (SE)" if name == "accuracy" and "se" in results else ""
            yield f"| {prefix} | {name} | {100 * value:.2f}%{se} |"
