"""The hit-rate table of examples/device, on a small trace: it runs, and its rows stand as theory has them."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_cases import random_trace

from traces.store import save_trace

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "device" / "hit_rates.py"


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_table_runs_and_belady_leads_what_loads_on_demand(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.safetensors"
    save_trace(random_trace(0, tokens=200, experts=12, stay=0.6, requests=5), path)
    run_script(monkeypatch, path, "--requests", 4, "--json", tmp_path / "rates.json")
    assert "SRP" in capsys.readouterr().out.splitlines()[0]
    found = json.loads((tmp_path / "rates.json").read_text())
    assert list(found["tables"]) == ["one stream", "decode batches of 4"]
    for rows in found["tables"].values():
        belady = np.array(rows["Belady"]["hit rate"])
        for name in ("random", "LRU", "LFU", "SCH v2"):
            assert (np.array(rows[name]["hit rate"]) <= belady).all()
            assert np.allclose(np.array(rows[name]["hit rate"]) + rows[name]["loads"], 1)
        assert (np.diff([row["hit rate"] for row in rows.values()], axis=1) >= 0).all()
    assert found["tables"]["one stream"]["ExpertFlow, predictor 1.0"]["hit rate"] == [1.0] * 4


def test_a_trace_too_short_for_a_window_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.safetensors"
    save_trace(random_trace(0, tokens=10, requests=1), path)
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "window is 16; the longest request has 10 tokens, give no more than that\n"
