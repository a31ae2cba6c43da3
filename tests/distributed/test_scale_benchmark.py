"""The benchmark of several processes measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import on_linux

pytest.importorskip("matplotlib", reason="the benchmark draws with it")


@on_linux
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_short_run(tmp_path: Path) -> None:
    from benchmarks import scale

    name = "MLP 4×64, batch 64"
    scale.main(["--rounds", "1", "--worlds", "2", "--rows", name, "--output", str(tmp_path / "scale")])
    (row,) = json.loads((tmp_path / "scale.json").read_text())["rows"]
    channels = 32 + 4 * 64
    assert (row["row"], row["processes"], row["channels"]) == (name, 2, channels)
    assert row["bytes"] == 8 * channels + 16 * 5 + 8
    assert row["same_parameters"] and all(ms > 0 for ms in row["ms"].values())
    assert f"| {name} | 2 |" in (tmp_path / "scale.md").read_text()
    assert (tmp_path / "scale.png").is_file() and not (tmp_path / "scale.partial.json").exists()
