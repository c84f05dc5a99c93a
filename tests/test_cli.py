import sys
from pathlib import Path

import pytest
from commands import assert_user_error, facetrain, run

import facetrain as package
from facetrain.cli import main

COMMANDS = [
    *("synth", "pack", "inspect", "audit", "train", "check", "estimate", "doctor", "launch", "sync"),
    *("lfw", "compare", "retrieval", "embed", "export", "index", "search", "completion"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_printed_and_is_no_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: facetrain {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    words = capsys.readouterr().out.split()
    assert set(COMMANDS) <= set(words)


def test_the_shell_completes_commands_flags_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "faces.tar").touch()
    ask = 'source completion.sh; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _facetrain; echo "${COMPREPLY[*]}"'
    for words, expected in (
        (["facetrain", "se"], "search"),
        (["facetrain", "embed", "--check"], "--checkpoint"),
        (["facetrain", "train", "--train.global"], "--train.global_pairs"),
        (["facetrain", "embed", "fac"], ""),  # files are the shell's own
    ):
        assert run("bash", "-c", ask, "ask", *words, cwd=tmp_path).stdout.strip() == expected


def test_a_script_can_ask_for_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--show", "run.rendezvous_timeout_s", "--run.rendezvous_timeout_s", "90"])
    assert capsys.readouterr().out == "90.0\n"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"{package.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tarin"], ["'tarin'", "train"]),
        (["train", "--train.stepz", "3"], ["train.stepz"]),
        (["check", "--train.stepz", "3"], ["train.stepz"]),
        (["train", "--train.step", "3"], ["train.step"]),
        (["train", "--train.steps", "many"], ["train.steps", "many"]),
        (["train", "--run.resume", "perhaps"], ["run.resume", "perhaps"]),
        (["train", "--train.schedule", "step"], ["train.drop_steps"]),
        (["check", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["check", "--data.shards", "nowhere"], ["nowhere"]),
        (["train", "--data.shards", "nowhere", "--run.dir", "nowhere"], ["nowhere"]),
        (["check", "--data.shards", "http://host/shards"], ["data.cache_dir", "http://host/shards"]),
        (["check", "--run.device", "tpu"], ["run.device", "tpu"]),
        (["check", "--show", "run.dirr"], ["--show", "'run.dirr'"]),
        (["check", "--world-sizes", "2,two"], ["--world-sizes", "'two'"]),
        (["check", "--world-sizes", "2,3", "--train.global_pairs", "8"], ["train.global_pairs", "3 processes", "8"]),
        (["check", "--run.rendezvous_timeout_s", "0"], ["run.rendezvous_timeout_s", "1 or more"]),
        (["check", "--run.seed", str(1 << 64)], ["run.seed", "0 to 4294967295", str(1 << 64)]),
        (["check", "--run.timeout_s", "1e300"], ["run.timeout_s", "1e+09 at most", "1e+300"]),
        (["check", "--run.seed", "-1"], ["run.seed", "0 to 4294967295", "-1"]),
        (["estimate", "--identities", "0"], ["--identities", "128 or more", "0"]),
        (["pack", "nowhere", "out"], ["nowhere"]),
        (["pack", "only-one-path"], ["out"]),
        (["pack", "--image", "3", "a", "b"], ["--image"]),
        (["pack", "nowhere.rec", "out"], ["nowhere.rec"]),
        (["pack", "nowhere", "out", "--copy", "--detector", "nowhere.onnx"], ["nowhere.onnx"]),
        (["pack", "nowhere", "out", "--max-images", "0"], ["max_images", "0"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["audit", "nowhere", "--out", "o"], ["checkpoint"]),
        (["audit", "nowhere", "--out", "o", "--checkpoint", "run"], ["run"]),
        (["audit", "s", "--out", "o", "--checkpoint", "r", "--min-score", "2"], ["--min-score", "2"]),
        (["synth", "out", "--num-identities", "few"], ["num_identities", "few"]),
        (["lfw", "--pairs", "p.txt", "--out", "o"], ["--checkpoint", "--embeddings"]),
        (["lfw", "--pairs", "p.txt", "--out", "o", "--checkpoint", "run"], ["--images"]),
        (["lfw", "--pairs", "p.txt", "--out", "o", "--embeddings", "nowhere.npz"], ["nowhere.npz"]),
        (["lfw", "--pairs", "p.txt", "--out", "o", "--checkpoint", "nowhere", "--images", "i"], ["nowhere"]),
        (["lfw", "--embeddings", "e.npz", "--pairs", "p.txt"], ["out"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--bin", "b"], ["--bin"]),
        (["lfw", "--checkpoint", "r", "--out", "o", "--images", "i", "--bin", "b"], ["--images", "--bin"]),
        (["lfw", "--checkpoint", "r", "--out", "o", "--bin", "b", "--pairs", "p.txt"], ["--bin"]),
        (["lfw", "--checkpoint", "r", "--out", "o", "--bin", "nowhere.bin"], ["nowhere.bin"]),
        (["lfw", "--checkpoint", "n.onnx", "--out", "o", "--images", "i"], ["n.onnx"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--view1", "only-one.txt"], ["view1"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--closed-gallery", "g.txt"], ["--closed-probes"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--bootstrap", "5"], ["bootstrap", "100", "5"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--draws", "0"], ["--draws", "0"]),
        (["lfw", "--embeddings", "e.npz", "--out", "o", "--convention", "mine"], ["convention", "mine"]),
        (["compare", "a.npz", "b.npz"], ["a.npz"]),
        (["compare", "a.npz", "run"], ["--images", "run"]),
        (["compare", "a.npz", "b.npz", "--images", "i"], ["--images"]),
        (["lfw", "--embeddings", "e.npz", "--pairs", "p", "--out", "o", "--search", "ivf"], ["--distractors"]),
        (["doctor", "--distributed"], ["--distributed", "launch/torchrun.sh --doctor"]),
        (["doctor", "--train.stepz", "3"], ["train.stepz"]),
        (["launch", "slurm"], ["config"]),
        (["launch", "pbs", "--config", "c"], ["pbs", "slurm"]),
        (["launch", "slurm", "--config", "nowhere.yaml", "--nodes", "2"], ["nowhere.yaml"]),
        (["launch", "slurm", "--config", "c", "--nodes", "0"], ["--nodes", "1 or more", "0"]),
        (["sync", "nowhere"], ["nowhere", "run folder"]),
        (["retrieval", "--out", "o"], ["--checkpoint", "--embeddings"]),
        (["retrieval", "--out", "o", "--embeddings", "e.npz", "--images", "i"], ["--checkpoint"]),
        (["retrieval", "--out", "o", "--embeddings", "nowhere.npz"], ["nowhere.npz"]),
        (["retrieval", "--out", "o", "--embeddings", "e.npz", "--clusterings", "-1"], ["--clusterings", "-1"]),
    ],
)
def test_a_users_error_is_one_line_and_code_2(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("facetrain: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_more_processes_than_pairs_divide_into_is_an_error(tmp_path: Path) -> None:
    done = facetrain("check", "--train.global_pairs", "10", cwd=tmp_path, WORLD_SIZE="4", RANK="0")
    assert_user_error(done, "train.global_pairs", "10", "4")


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_world_size_that_no_launcher_set_is_ignored(tmp_path: Path, command: str) -> None:
    done = facetrain(command, "--train.global_pairs", "10", "--data.shards", "nowhere", cwd=tmp_path, WORLD_SIZE="4")
    assert_user_error(done, "nowhere")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    assert_user_error(facetrain("train", "--train.stepz", "3", cwd=tmp_path), "train.stepz")


def test_the_traceback_is_there_on_demand(tmp_path: Path) -> None:
    done = facetrain("check", "--train.stepz", "3", cwd=tmp_path, FACETRAIN_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_eval_lfw_is_the_lfw_command() -> None:
    done = run(sys.executable, "-m", "eval.lfw", "--help")
    assert done.returncode == 0
    assert "usage: facetrain lfw" in done.stdout
    assert_user_error(run(sys.executable, "-m", "eval.lfw", "--pairz", "x"), "pair")


def test_another_rank_that_is_left_alone_with_its_trouble_says_which_it_is(tmp_path: Path) -> None:
    done = facetrain("train", "--train.stepz", "3", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert_user_error(done, "rank 1", "train.stepz")


def test_under_torchrun_the_line_is_printed_once(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*torchrun, "-m", "facetrain.train", "--train.stepz", "3", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("facetrain: error: ") == 1
