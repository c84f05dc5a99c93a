from pathlib import Path

import pytest

from facetrain.command_line import config_yaml, differing_keys, load_config, parse_config
from facetrain.config import Config, DataConfig, EvalConfig, TrainConfig


def error_of(*argv: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(argv, prog="facetrain train")
    return str(caught.value)


def test_no_flags_give_the_defaults() -> None:
    assert parse_config([], prog="facetrain train") == Config()


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {steps: 1, global_pairs: 4, learning_rate: 0.5}")
    (tmp_path / "b.yaml").write_text("train: {steps: 2, global_pairs: 8}")
    argv = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--train.steps", "3"]
    assert parse_config(argv, prog="x").train == TrainConfig(steps=3, global_pairs=8, learning_rate=0.5)


def test_the_resolved_config_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(crop_px=100, exclude=("0166921", "null", "1e3"), colour="grey"),
        train=TrainConfig(schedule="step", drop_steps=(5, 7), learning_rate=1e-5),
    )
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {learning_rate: 1e-3}")
    assert parse_config(["--config", str(tmp_path / "c.yaml")], prog="x").train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz", "3"], ["train.stepz"]),
        (["--train.step", "3"], ["train.step"]),  # an abbreviation is not a key
        (["--train.steps", "many"], ["train.steps", "many", "int"]),
        (["--train.steps", "-1"], ["train.steps", "0 or more", "-1"]),
        (["--run.resume", "perhaps"], ["run.resume", "perhaps", "never"]),
        (["--train.zero_stage", "4"], ["train.zero_stage", "4"]),
        (["--train.learning_rate", ".nan"], ["train.learning_rate", "finite", "nan"]),
        (["--loss.temperature", ".inf"], ["loss.temperature", "finite", "inf"]),
        (["--train.schedule", "step"], ["train.drop_steps", "train.schedule=step"]),
        (["--train.drop_steps", "[3]"], ["train.drop_steps", "train.schedule=step"]),
        (["--train.schedule", "step", "--train.drop_steps", "[5, 3]"], ["train.drop_steps", "rising", "[5, 3]"]),
        (["--data.crop_px", "113"], ["data.crop_px", "112", "113"]),
        (["--data.colour_jitter", "1"], ["data.colour_jitter", "[0, 1)"]),
        (["--model.imagenet_weights", "w.pth"], ["model.imagenet_weights", "torchvision:NAME"]),
        (["--loss.name", "tuplet", "--loss.symmetric", "true"], ["loss.symmetric", "npair-mc", "tuplet"]),
        (["--loss.name", "group", "--loss.temperature", "2"], ["loss.temperature", "npair-mc", "group"]),
        (["--loss.group.anchors", "2"], ["loss.group.anchors", "loss.name group", "npair-mc"]),
        (["--loss.name", "angular", "--loss.classes.weight_decay", "1"], ["loss.classes.weight_decay", "softmax"]),
        (["--loss.name", "angular", "--loss.angular.weight", "3"], ["loss.angular.weight", "npair-angular"]),
        (["--loss.name", "angular", "--loss.angular.angle_deg", "90"], ["loss.angular.angle_deg", "(0, 90)", "90"]),
        (["--loss.name", "group", "--loss.group.anchors", "2"], ["loss.group.anchors", "images_per_identity = 2", "2"]),
        (["--loss.name", "ranked-list", "--loss.ranked_list.margin", "2"], ["loss.ranked_list.alpha", "2"]),
        (["--train.images_per_identity", "3"], ["train.images_per_identity", "even", "3"]),
        (["--train.images_per_identity", "6"], ["train.images_per_identity", "128", "6"]),
        (["--train.images_per_identity", "4", "--mining.mode", "gathered"], ["images_per_identity", "'gathered'", "4"]),
        (["--train.overlap", "true", "--model.norm", "none", "--loss.name", "angular"], ["train.overlap", "'angular'"]),
        (["--train.overlap", "true"], ["train.overlap", "model.norm", "batch"]),
        (["--mining.mode", "tables"], ["mining.mode", "gathered"]),
        (["--mining.table_max_age_steps", "1"], ["mining.table_max_age_steps", "2 or more", "1"]),
        (["--mining.table_refresh_share", "1"], ["mining.table_refresh_share", "[0, 1)"]),
        (["--mining.mode", "quota", "--mining.virtual_nodes", "6"], ["mining.virtual_nodes", "divisor", "128", "6"]),
        (["--mining.mode", "gathered", "--mining.lag_steps", "1"], ["mining.lag_steps", "data.workers", "4", "1"]),
        (["--mining.similarity_cap", "1.5"], ["mining.similarity_cap", "(0, 1]", "1.5"]),
        (["--tracking.sweep", "a/b"], ["tracking.sweep", "without /", "a/b"]),
        (["--tracking.experiment", ""], ["tracking.experiment", "a name"]),
        (["--eval.dataset", "faces (clean)"], ["eval.dataset", "letters", "faces (clean)"]),
        (["--eval.dataset", ".hidden"], ["eval.dataset", ".hidden"]),
        (["--mining.max_appearances", "0"], ["mining.max_appearances", "1 or more", "0"]),
        (["--mining.images_per_class", "3"], ["mining.images_per_class", "3"]),
        (["--eval.images", "[lfw]"], ["eval.pairs", "eval.images"]),
        (["--eval.view1", "[a, b]"], ["eval.view1", "eval.images"]),
        (["--eval.images", "[lfw]", "--eval.view1", "[a]"], ["eval.view1", "pairsDevTest.txt", "['a']"]),
        (["--eval.best_metric", "accuracy"], ["eval.best_metric", "'accuracy'", "heldout/FIGURE"]),
        (["--eval.best_metric", "heldout/eer"], ["eval.best_metric", "'heldout/eer'", "vr_at_far_1e-3"]),
        (["--eval.best_metric", "heldout/rank1"], ["eval.best_metric", "'heldout/rank1'", "accuracy, auc"]),
        (
            ["--eval.best_metric", "lfw/closed_full/rank1"],
            ["eval.best_metric", "'lfw/closed_full/rank1'", "closed-full"],
        ),
        (["--eval.best_metric", "lfw/closed-full/accuracy"], ["eval.best_metric", "rank1, rank5"]),
        (
            ["--eval.images", "[a]", "--eval.pairs", "p", "--eval.best_metric", "lfw/open-best-rowden/rank1"],
            ["eval.best_metric", "needs eval.images and eval.open_set_people"],
        ),
        (["--eval.best_metric", "lfw/accuracy"], ["eval.best_metric", "lfw/PROTOCOL/FIGURE"]),
        (["--eval.best_metric", "set/closed-full/rank1"], ["eval.best_metric", "lfw/PROTOCOL/FIGURE"]),
        (["--eval.best_metric", "lfw/closed-full/rank1"], ["eval.best_metric", "needs eval.images"]),
        (
            ["--eval.images", "[lfw]", "--eval.pairs", "p", "--eval.best_metric", "lfw/view1/accuracy"],
            ["eval.best_metric", "needs eval.images and eval.view1"],
        ),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_key(argv: list[str], words: list[str]) -> None:
    message = error_of(*argv)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 3}", ["train.stepz"]),
        ("trian: {steps: 3}", ["trian"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("train: {global_pairs: 1}", ["train.global_pairs", "2 or more"]),
        ("train: [1, 2]", ["train", "[1, 2]"]),
        ("train: {steps: null}", ["train.steps", "null"]),
        ("run: {resume: null}", ["run.resume", "null"]),
        ("loss: {group: [1, 2]}", ["loss.group", "keys and values", "[1, 2]"]),
        ("loss: {group: null}", ["loss.group", "null"]),
        ("loss: {group: {anchors: null}}", ["loss.group.anchors", "null"]),
        ("[1, 2]", ["c.yaml"]),
        ("train: {steps: 3", ["c.yaml"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    message = error_of("--config", str(file))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_config_file_is_named() -> None:
    assert "nowhere.yaml" in error_of("--config", "nowhere.yaml")


def test_differing_keys_name_both_values() -> None:
    other = Config(train=TrainConfig(steps=7, zero_stage=1))
    assert differing_keys(Config(), other, ignore=["train.zero_stage"]) == ["train.steps: 1000 != 7"]


def test_every_key_has_a_docstring_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"], prog="facetrain train")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for key in Config().flat():
        help_text = text.rsplit(f"  --{key} ", 1)[1].split("  --", 1)[0].split("(type:")[0]
        assert len(help_text.split()) > 2, key


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("heldout/accuracy", False),
        ("lfw/view1/accuracy", False),
        ("lfw/verification/accuracy", True),
        ("lfw/open-best-rowden/dir_rank1_at_far_1e-2", True),
    ],
)
def test_choosing_a_checkpoint_on_what_is_published_is_known(metric: str, expected: bool) -> None:
    config = EvalConfig(
        images=("lfw",),
        pairs="pairs.txt",
        view1=("train.txt", "test.txt"),
        open_set_people="people.txt",
        best_metric=metric,
    )
    assert config.chooses_on_test is expected
