"""The model card says what a run is, from what, and how good."""

from pathlib import Path

from facetrain.config import Config, DataConfig, EvalConfig, RunConfig
from facetrain.data.manifest import Manifest
from facetrain.evaluation.model_card import write_model_card

RESULTS = {
    "verification": {"accuracy": 0.9, "se": 0.01, "vr_at_far_1e-3": 0.5},
    "open-best-rowden": {"rank1": 0.25, "dir_rank1_at_far_1e-2": 0.03, "gallery": 3143},
    "open-counts": {"rank1": 0.2, "all": {"dir_rank1_at_far_1e-2": 0.02}},
    "thresholds": {"verification": {"1e-2": 0.4}},
}


def test_the_card_names_data_results_and_config(synthetic: Path, tmp_path: Path) -> None:
    data = DataConfig(shards="https://me:secret@host/shards", cache_dir="c", holdout_identities=7, exclude=("a", "b"))
    lfw, manifest = EvalConfig(images=("lfw",), pairs="pairs.txt"), Manifest.load(synthetic / "shards")
    config = Config(run=RunConfig(dir="runs/faces"), data=data, eval=lfw)
    head = write_model_card(tmp_path, config, manifest, RESULTS, "0123456789abcdef")
    card = (tmp_path / "model_card.md").read_text()
    assert card.startswith(head)
    assert "secret" not in card
    for words in (
        "# faces\n",
        "revision 0123456789ab.",
        "npair-mc, N = ",
        "48 identities, less 7 held out and 2 excluded",
        manifest.sha256,
        "identification and verification on `lfw`",
        "| verification | accuracy | 90.00% +- 1.00 (SE) |",
        "| verification | vr_at_far_1e-3 | 50.00% |",
        "| open-best-rowden | dir_rank1_at_far_1e-2 | 3.00% |",
        "| open-counts/all | dir_rank1_at_far_1e-2 | 2.00% |",
        "## Intended use",
        "`report.html` beside this card",
        "## Limits",
        "LFW is a narrow set",
        "holdout_identities: 7",
    ):
        assert words in card
    assert "1e-2 | 40" not in card  # a threshold is no result
    assert [path.name for path in tmp_path.iterdir()] == ["model_card.md"]


def test_a_run_without_evaluation_says_so(synthetic: Path, tmp_path: Path) -> None:
    card = write_model_card(tmp_path, Config(), Manifest.load(synthetic / "shards"), {"thresholds": {}}, "")
    assert "None: the run held no identities out" in card
    assert "LFW is" not in card


def test_a_run_judged_by_held_out_identities_alone_speaks_of_no_other_set(synthetic: Path, tmp_path: Path) -> None:
    config, manifest = Config(data=DataConfig(holdout_identities=7)), Manifest.load(synthetic / "shards")
    card = write_model_card(tmp_path, config, manifest, {"heldout": {"accuracy": 0.9, "se": 0.01}}, "")
    assert "| heldout | accuracy | 90.00% +- 1.00 (SE) |" in card
    for words in ("lfw`", "LFW is", "report.html"):  # it has neither
        assert words not in card
    assert "None: nothing could be measured" in write_model_card(tmp_path, config, manifest, {"thresholds": {}}, "")


def test_limits_are_those_of_the_set_that_was_evaluated(synthetic: Path, tmp_path: Path) -> None:
    config = Config(eval=EvalConfig(dataset="synthetic", images=("drawn",), pairs="pairs.txt"))
    card = write_model_card(tmp_path, config, Manifest.load(synthetic / "shards"), RESULTS, "")
    assert "LFW is" not in card
    assert "Figures are of the set that they stand beside" in card
