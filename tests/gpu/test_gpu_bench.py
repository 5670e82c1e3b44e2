"""A short `bench --device cuda`: every file, every provider, and plausible times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from on_device import SERVING

from compacter_kernels import cli


@pytest.mark.parametrize("impl", SERVING)
def test_bench(impl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "768/24/4", "--tokens", "1,4096", "--rounds", "3", "--impl", f"dense,dense-lowp,{impl}"]
    assert cli.main(["bench", "--device", "cuda", "--no-plot", *options, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.csv", "bench.txt"}
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    rows = {(row["tokens"], row["provider"], row["direction"]): row for row in table["rows"]}
    assert len(rows) == 2 * 2 * 4
    assert all(0 < row["ms_q20"] <= row["ms"] <= row["ms_q80"] for row in rows.values())
    fused = rows[4096, impl, "forward+backward"]
    assert fused["saved_bytes"] == 0
    assert fused["error_over_limit"] <= 1
    # The data is in no cache, so that no kernel is faster than memory.
    assert fused["model_gb_per_s"] < 1.5 * table["rates"]["copy_gb_per_s"]
    assert table["device"]["gpu"] in capsys.readouterr().out
