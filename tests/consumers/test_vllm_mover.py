"""An exported plan, reached by vLLM's own weight mover on four processes; bad plans never get that far."""

from pathlib import Path

import pytest
from consumer_plans import EXPERTS, MOE_LAYERS, RANKS, REDUNDANT, bad_plans, consumer_plan
from engines import need_engine, run_driver

from placer.core.errors import ViolationError
from placer.export import EXPORTERS, export_plan

pytestmark = pytest.mark.engine


def test_vllm_moves_every_weight_to_the_slot_the_plan_names(tmp_path: Path) -> None:
    need_engine("vllm")
    files, wanted = [], []
    for seed in range(2):
        plan, model = consumer_plan(seed)
        files.append(str(tmp_path / f"plan{seed}.json"))
        export_plan(plan, model, "vllm", Path(files[-1]))
        wanted.append(plan.slot_expert_LP.tolist())
    request = {
        "files": files,
        "wanted": wanted,
        "num_experts": EXPERTS,
        "redundant": REDUNDANT,
        "ep_size": RANKS,
        "scratch": str(tmp_path),
    }
    answer = run_driver("vllm_driver.py", request)
    assert Path(answer.pop("file")).parts[-4:] == ("vllm", "distributed", "eplb", "rebalance_execute.py")
    weights, maps, slots = 2, 2, EXPERTS + REDUNDANT
    assert answer == {"wrong_slots": 0, "wrong_maps": 0, "checked_slots": weights * maps * slots * len(MOE_LAYERS)}


@pytest.mark.parametrize("fault", bad_plans())
def test_bad_plans_never_reach_an_engine(fault: str, tmp_path: Path) -> None:
    _, model = consumer_plan(0)
    for name, exporter in EXPORTERS.items():
        with pytest.raises(ViolationError):
            export_plan(bad_plans()[fault], model, name, tmp_path / f"plan{exporter.suffixes[0]}")
    assert not list(tmp_path.iterdir())
