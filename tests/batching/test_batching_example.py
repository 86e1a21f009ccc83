"""The example's four tables on a small synthetic trace: what they say of it, by their JSON."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from traces.store import save_trace
from traces.synthetic import synthesize

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "device" / "batching.py"


def test_the_tables_of_a_small_trace(tmp_path, monkeypatch, capsys):
    trace = synthesize(num_layers=3, num_experts=16, top_k=2, num_tokens=1500, num_requests=34, seed=4)
    token_id_T = np.random.default_rng(0).integers(0, 50, 1500).astype(np.int32)
    save_trace(replace(trace, token_id_T=token_id_T, known_sha256=""), tmp_path / "t.safetensors")
    words = [str(EXAMPLE), str(tmp_path / "t.safetensors"), "--batch", "4", "--queue", "12", "--wait", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "out.json")])
    spec = importlib.util.spec_from_file_location("batching_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # each of these starts a process
    monkeypatch.setattr(example, "EXACT_PAIRS", 1)
    example.main()
    assert "loads" in capsys.readouterr().out
    predictors, batching, paper, split = json.loads((tmp_path / "out.json").read_text())["tables"]
    by_name = {row["predictor"]: row for row in predictors["rows"]}
    assert by_name["transition"]["pairs %"] > by_name["popularity"]["pairs %"]
    assert by_name["oracle"]["pairs %"] == 100
    assert by_name["oracle"]["hit %, rho 1"] >= by_name["none (LRU)"]["hit %, rho 1"]
    first, *aware = batching["rows"][:5]
    assert all(row["loads per token"] < first["loads per token"] for row in aware)
    assert all(row["longest"] <= 8 for row in aware if "wait <= 8" in row["batches"])
    assert paper["rows"][1]["experts of a batch"] < paper["rows"][0]["experts of a batch"]
    for row in split["rows"]:
        assert row["re-batched"] <= row["experts, given"]
    assert split["rows"][1]["bound"] <= split["rows"][1]["CP-SAT"] <= split["rows"][1]["re-batched"]
