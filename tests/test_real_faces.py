"""The README's commands on real faces, with few steps: pack, train, continue, evaluate."""

import json
import sys
from pathlib import Path

import pytest
from commands import ROOT, facetrain, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def lists(face_data: Path) -> tuple[str, ...]:
    protocols = face_data / "protocols"
    return ("--pairs", str(protocols / "pairs.txt"), "--open-set-people", str(protocols / "lfw_ytf_596_subjects.txt"))


def test_pack_train_continue_and_evaluate_as_the_readme_says(face_data, tmp_path):
    tars = sorted(face_data.glob("faces_train-*.tar"))
    packed = facetrain("pack", *tars, tmp_path / "shards")
    assert packed.returncode == 0, packed.stderr
    assert "18230 images of 2869 identities, 0 rejected" in packed.stdout

    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    config = ("--config", ROOT / "configs" / "faces_cpu.yaml", "--data.shards", tmp_path / "shards")
    few = ("--train.steps", "3", "--train.save_every_steps", "2", "--train.log_every_steps", "1")
    few += ("--train.global_pairs", "32", "--train.precision", "float32", "--tracking.backend", "none")  # in less time
    training = (*launcher, "facetrain.train", *config, *few, "--run.dir", tmp_path / "run")
    first = run(*training, cwd=tmp_path, timeout_s=300)
    assert first.returncode == 0, first.stderr
    assert "2769 identities are trained on, 100 held out" in first.stderr
    (tmp_path / "run" / "results.json").unlink()  # as if it had been stopped before its end
    again = run(*training, cwd=tmp_path, timeout_s=300)
    assert "continues at step 3" in again.stderr

    images = sorted(face_data.glob("lfw_aligned-*.tar"))
    evaluation = ("--checkpoint", tmp_path / "run", "--images", *images, *lists(face_data), "--no-mirror")
    done = run(*launcher, "facetrain", "lfw", *evaluation, "--out", tmp_path / "lfw", cwd=tmp_path, timeout_s=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "lfw" / "results.json").read_text())
    assert results["closed-full"]["probes"] == 7484
    assert results["open-best-rowden"]["impostors"] == 9494
    assert 0.5 < results["verification"]["accuracy"] < 0.8  # three steps teach next to nothing


def test_an_lfw_with_images_missing_is_refused_before_anything_is_embedded(face_data, tmp_path):
    packed = facetrain("pack", face_data / "faces_train-00.tar", tmp_path / "shards")
    assert packed.returncode == 0, packed.stderr
    done = facetrain(
        *("check", "--data.shards", tmp_path / "shards", "--run.dir", tmp_path / "run"),
        *(
            "--eval.images",
            f"[{face_data / 'lfw_aligned-00.tar'}]",
            "--eval.pairs",
            face_data / "protocols" / "pairs.txt",
        ),
    )
    assert done.returncode == 2
    assert "of 13,233 images are missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
