"""`facetrain audit`: its lists are what `facetrain pack` takes, and its page shows whom they are about."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from facetrain import audit
from facetrain.checkpoint.weights import save_weights
from facetrain.cli import main
from facetrain.config import Config, DataConfig, ModelConfig
from facetrain.data.shards import ShardSet
from facetrain.models import build_backbone


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: it knows an image again, which is all that is asked of it here."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(data=DataConfig(image_px=32), model=ModelConfig(name="casianet", embedding_dim=16, norm="none"))
    torch.manual_seed(0)
    save_weights(dict(build_backbone(config.model, channels=3, image_px=32).state_dict()), config, folder)
    return folder


def test_planted_people_are_found_left_out_and_joined(
    synthetic: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = tmp_path / "faces"
    shutil.copytree(synthetic / "faces" / "train", faces)
    stranger = sorted((synthetic / "faces" / "heldout").iterdir())[3]
    shutil.copytree(stranger, faces / "A Stranger, <once>")
    twin = sorted(faces.iterdir())[7]
    shutil.copytree(twin, faces / "twin")
    main(["pack", str(faces), str(tmp_path / "shards"), "--workers", "1"])
    against = ["--against", str(synthetic / "faces" / "heldout"), "--checkpoint", str(network), "--device", "cpu"]
    out = tmp_path / "audit"
    main(["audit", str(tmp_path / "shards"), *against, "--out", str(out), "--min-score", "0.999999"])
    told = capsys.readouterr().out
    assert "identities like people of the test (exclude.txt): 1; pairs of identities (merge.txt): 1;" in told
    assert (out / "exclude.txt").read_text() == "A Stranger, <once>\n"
    assert set((out / "merge.txt").read_text().strip().split("\t")) == {twin.name, "twin"}
    found = json.loads((out / "audit.json").read_text())
    assert found["overlaps"][0]["other"] == stranger.name
    assert found["overlaps"][0]["score"] == pytest.approx(1, abs=1e-6)
    html = (out / "audit.html").read_text()
    assert html.count("<img ") == 2 * (50 + 100 + 50)
    assert "; 1 reach 1.000, and they stand in merge.txt." in html
    assert "A Stranger, &lt;once&gt;, images: " in html
    assert "<once>" not in html
    lists = ["--exclude", str(out / "exclude.txt"), "--merge", str(out / "merge.txt")]
    main(["pack", str(faces), str(tmp_path / "clean"), "--workers", "1", *lists])
    table = ShardSet.open(tmp_path / "clean").table
    assert table.num_identities == 48
    assert table.num_images == 4 * 49


def test_without_a_test_set_it_looks_for_duplicates_alone(synthetic: Path, network: Path, tmp_path: Path) -> None:
    (tmp_path / "exclude.txt").write_text("Somebody of an audit before\n")
    main(["audit", str(synthetic / "shards"), "--checkpoint", str(network), "--device", "cpu", "--out", str(tmp_path)])
    assert not (tmp_path / "exclude.txt").exists()
    assert json.loads((tmp_path / "audit.json").read_text()).keys() == {"min_score", "duplicates", "mixtures"}


def test_no_list_has_more_than_the_page_shows(
    synthetic: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "FEWEST_SHOWN", 5)
    monkeypatch.setattr(audit, "MOST_SHOWN", 30)
    words = ["--checkpoint", str(network), "--device", "cpu", "--out", str(tmp_path)]
    for min_score, num_listed, num_shown in (("1", 0, 5), ("-1", 30, 30)):
        main(["audit", str(synthetic / "shards"), *words, "--min-score", min_score])
        assert len((tmp_path / "merge.txt").read_text().splitlines()) == num_listed
        assert len(json.loads((tmp_path / "audit.json").read_text())["duplicates"]) == num_shown
    assert "and the first 30, which are shown here, stand in merge.txt" in (tmp_path / "audit.html").read_text()


def test_without_a_second_image_of_anybody_a_score_is_asked_for_first(
    synthetic: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in sorted((synthetic / "faces" / "train").iterdir())[:4]:
        (tmp_path / "faces" / folder.name).mkdir(parents=True)
        shutil.copy(next(folder.iterdir()), tmp_path / "faces" / folder.name)
    main(["pack", str(tmp_path / "faces"), str(tmp_path / "shards"), "--workers", "1"])
    words = ["--checkpoint", str(network), "--device", "cpu", "--out", str(tmp_path / "audit")]
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path / "shards"), *words])
    assert "--min-score: expected one, since no identity of " in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()
