"""What docs/data.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest
from drawn_faces import write_faces

from facetrain.config import DataConfig
from facetrain.data.pack import pack

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_stock_webdataset_pipeline_reads_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"Ann": 3, "Bob": 2, "Zoë": 1}
    pack([write_faces(tmp_path / "faces", counts)], tmp_path / "shards" / "faces", images_per_shard=3, workers=1)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    capsys.readouterr()
    exec(compile(block, "docs/data.md", "exec"), {})
    lines = sorted(f"{name} (112, 112, 3)" for name, count in counts.items() for _ in range(count))
    assert sorted(capsys.readouterr().out.splitlines()) == lines


def test_defaults_in_the_table_are_those_of_the_config() -> None:
    rows = re.findall(r"^\| `data\.(\w+)` \| (\S+) \|", PAGE, re.MULTILINE)
    assert {key for key, _ in rows} == {"cache_dir", "cache_bytes", "fetch_timeout_s", "fetch_attempts"}
    for key, value in rows:
        default = getattr(DataConfig(), key)
        assert value == ("null" if default is None else f"{default:g}")
