"""An exported plan, read by SGLang's own code on every rank; bad plans, refused before SGLang would take them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consumer_plans import EXPERTS, HIDDEN_LAYERS, RANKS, REDUNDANT, bad_plans, consumer_plan
from engines import need_engine, run_driver

from placer.core.errors import ViolationError
from placer.export import export_plan

pytestmark = pytest.mark.engine


def case(file: str, dispatch: str, **rest: Any) -> dict[str, Any]:
    shape = {"num_layers": HIDDEN_LAYERS, "num_experts": EXPERTS, "redundant": REDUNDANT, "ep_size": RANKS}
    return {"file": file, "nodes": 2, "dispatch": dispatch, **shape, **rest}


def test_sglang_reads_exported_plans_on_every_rank(tmp_path: Path) -> None:
    need_engine("sglang")
    cases, wanted = [], []
    for seed, suffix in enumerate((".json", ".pt")):
        plan, model = consumer_plan(seed)
        path = tmp_path / f"plan{suffix}"
        export_plan(plan, model, "sglang", path)
        expert_HP = np.tile([*range(EXPERTS), *range(REDUNDANT)], (HIDDEN_LAYERS, 1))
        expert_HP[list(plan.moe_layers)] = plan.slot_expert_LP
        cases += [case(str(path), dispatch) for dispatch in ("static", "dynamic")]
        wanted += [expert_HP.tolist()] * 2
    answers = run_driver("sglang_driver.py", {"cases": cases})["cases"]
    assert len(answers) == 4
    for answer, asked, expert_HP in zip(answers, cases, wanted, strict=True):
        assert len(answer["ranks"]) == RANKS
        for rank in answer["ranks"]:
            assert rank["map"] == expert_HP
            assert rank["static"] == (asked["dispatch"] == "static")
            assert (rank["wrong_candidates"], rank["wrong_dispatch"], rank["local"]) == (0, 0, 5)


def test_what_sglang_accepts_our_exporter_refuses(tmp_path: Path) -> None:
    need_engine("sglang")
    plan, model = consumer_plan(0)
    export_plan(plan, model, "sglang", tmp_path / "good.json")
    good = json.loads((tmp_path / "good.json").read_text())["physical_to_logical_map"]
    cases = []
    faults = bad_plans()
    for fault, bad in faults.items():
        rows = bad.slot_expert_LP.tolist()
        if fault == "fewer layer rows":
            whole = good[:-1]
        elif fault == "more layer rows":
            whole = [*good, good[-1]]
        else:
            whole = [row[: len(rows[0])] + row[:1] * (len(rows[0]) - len(row)) for row in good]
            for layer, row in zip(bad.moe_layers, rows, strict=True):
                whole[layer] = row
        file = tmp_path / f"{fault.replace(' ', '_')}.json"
        file.write_text(json.dumps({"physical_to_logical_map": whole}))
        cases += [case(str(file), dispatch, check=False) for dispatch in ("static", "dynamic")]
        with pytest.raises(ViolationError):
            export_plan(bad, model, "sglang", tmp_path / "refused.json")
    assert not (tmp_path / "refused.json").exists()
    answers = run_driver("sglang_driver.py", {"cases": cases})["cases"]
    said = {
        fault: tuple(a.get("error", "accepted") for a in answers[2 * i : 2 * i + 2]) for i, fault in enumerate(faults)
    }
    assert said == {
        "fewer layer rows": ("accepted", "accepted"),
        "more layer rows": ("accepted", "accepted"),
        "too many slots": ("accepted", "accepted"),
        "too few slots": ("accepted", "accepted"),
        "an expert never placed": ("ZeroDivisionError", "accepted"),
        "id out of range": ("IndexError", "IndexError"),
        "id -1": ("accepted", "accepted"),
        "two replicas on one rank": ("accepted", "accepted"),
    }
