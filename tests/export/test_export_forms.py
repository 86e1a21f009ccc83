"""Each file form, read here without the exporters' own code, and read back with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from plans_for_export import make_plan, plans
from safetensors.numpy import load_file

from placer.core.errors import ViolationError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export import EXPORTERS, export_plan

WITH_REPLICAS = [
    (name, suffix)
    for name, exporter in EXPORTERS.items()
    for suffix in exporter.suffixes
    if name != "vllm-placement-file"
]
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)


@pytest.mark.parametrize(("name", "suffix"), WITH_REPLICAS)
@ONE_FOLDER
@given(made=plans())
def test_what_was_written_reads_back_as_the_plan(
    name: str, suffix: str, made: tuple[Plan, ModelSpec], tmp_path: Path
) -> None:
    plan, model = made
    path = tmp_path / f"plan{suffix}"
    assert export_plan(plan, model, name, path)
    assert np.array_equal(EXPORTERS[name].read_back(path, model), plan.slot_expert_LP)


@pytest.mark.parametrize(("name", "suffix"), WITH_REPLICAS)
def test_the_same_plan_gives_the_same_bytes(name: str, suffix: str, tmp_path: Path) -> None:
    plan, model = make_plan()
    paths = [tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"]
    for path in paths:
        export_plan(plan, model, name, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths, "no temporary file stays behind"


def deepseek_like() -> tuple[Plan, ModelSpec]:
    """61 hidden layers of which the first three are dense, as DeepSeek-V3 has them."""
    return make_plan(num_experts=16, redundant=4, moe_layers=tuple(range(3, 61)), num_hidden_layers=61)


def test_sglang_rows_are_hidden_layers(tmp_path: Path) -> None:
    plan, model = deepseek_like()
    export_plan(plan, model, "sglang", tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert list(data) == ["physical_to_logical_map"]
    rows = data["physical_to_logical_map"]
    assert len(rows) == 61
    assert rows[3:] == plan.slot_expert_LP.tolist()
    assert rows[:3] == [[*range(16), 0, 1, 2, 3]] * 3


def test_sglang_tensor_file_holds_the_json_file_s_map(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan, model = deepseek_like()
    export_plan(plan, model, "sglang", tmp_path / "plan.pt")
    export_plan(plan, model, "sglang", tmp_path / "plan.json")
    data = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert list(data) == ["physical_to_logical_map"]
    assert data["physical_to_logical_map"].dtype == torch.int64
    assert {"physical_to_logical_map": data["physical_to_logical_map"].tolist()} == json.loads(
        (tmp_path / "plan.json").read_text()
    )


def test_sglang_fills_a_dense_layer_in_the_middle(tmp_path: Path) -> None:
    plan, model = make_plan(num_experts=4, redundant=0, moe_layers=(0, 2), num_hidden_layers=4)
    export_plan(plan, model, "sglang", tmp_path / "plan.json")
    rows = json.loads((tmp_path / "plan.json").read_text())["physical_to_logical_map"]
    assert [rows[1], rows[3]] == [[0, 1, 2, 3]] * 2
    assert [rows[0], rows[2]] == plan.slot_expert_LP.tolist()


def test_trtllm_keys_are_absolute_layers(tmp_path: Path) -> None:
    plan, model = deepseek_like()
    export_plan(plan, model, "trtllm", tmp_path / "plan.yaml")
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert data == {
        "num_slots": 20,
        "initial_global_assignments": dict(zip(range(3, 61), plan.slot_expert_LP.tolist(), strict=True)),
        "layer_updates_per_iter": 0,
    }


def test_ascend_counts_moe_layers_from_zero(tmp_path: Path) -> None:
    plan, model = deepseek_like()
    export_plan(plan, model, "ascend", tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["moe_layer_count"] == 58
    assert [layer["layer_id"] for layer in data["layer_list"]] == list(range(58))
    assert {layer["device_count"] for layer in data["layer_list"]} == {4}
    last = data["layer_list"][57]["device_list"]
    assert [device["device_id"] for device in last] == [0, 1, 2, 3]
    assert last[1]["device_expert"] == plan.slot_expert_LP[57, 5:10].tolist()


def test_vllm_rows_count_moe_layers_from_zero(tmp_path: Path) -> None:
    plan, model = deepseek_like()
    export_plan(plan, model, "vllm", tmp_path / "plan.jsonl")
    text = (tmp_path / "plan.jsonl").read_text()
    assert text.count("\n") == 1
    record = json.loads(text)
    assignments = record.pop("initial_global_assignments")
    assert record == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 4,
        "num_slots": 20,
    }
    assert list(assignments) == [str(row) for row in range(58)]
    assert list(assignments.values()) == plan.slot_expert_LP.tolist()
    export_plan(plan, model, "vllm", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == plan.slot_expert_LP.tolist()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@ONE_FOLDER
@given(made=plans())
def test_eplb_arrays_invert_each_other(suffix: str, made: tuple[Plan, ModelSpec], tmp_path: Path) -> None:
    plan, model = made
    path = tmp_path / f"plan{suffix}"
    export_plan(plan, model, "eplb", path)
    maps = load_file(path) if suffix == ".safetensors" else dict(np.load(path))
    for row in range(model.num_sites):
        for expert in range(model.num_experts):
            slots = [slot for slot in range(plan.num_slots) if plan.slot_expert_LP[row, slot] == expert]
            found = maps["log2phy"][row, expert].tolist()
            assert found == slots + [-1] * (len(found) - len(slots))
            assert maps["logcnt"][row, expert] == len(slots)
    assert np.array_equal(maps["phy2log"], plan.slot_expert_LP)
    assert maps["log2phy"].shape[2] == maps["logcnt"].max()


def one_placement(layers: int) -> tuple[Plan, ModelSpec]:
    """Three experts on each of two ranks, the same in every layer up to the order of slots."""
    rows = [[0, 2, 4, 1, 3, 5], [4, 2, 0, 5, 3, 1]]
    plan, model = make_plan(
        num_experts=6, num_ranks=2, redundant=0, moe_layers=tuple(range(layers)), num_hidden_layers=layers
    )
    return replace_slots(plan, [rows[layer % 2] for layer in range(layers)]), model


def replace_slots(plan: Plan, rows: list[list[int]]) -> Plan:
    return Plan(
        model=plan.model,
        num_experts=plan.num_experts,
        num_ranks=plan.num_ranks,
        ranks_per_node=1,
        moe_layers=plan.moe_layers,
        slot_expert_LP=np.array(rows),
        mode="per_rank",
    )


def test_vllm_placement_file_names_the_rank_of_each_expert(tmp_path: Path) -> None:
    plan, model = one_placement(3)
    export_plan(plan, model, "vllm-placement-file", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {"expert_to_ep_rank": [0, 1, 0, 1, 0, 1]}
    found_LP = EXPORTERS["vllm-placement-file"].read_back(tmp_path / "plan.json", model)
    assert found_LP.tolist() == [[0, 2, 4, 1, 3, 5]] * 3


def test_vllm_placement_file_refuses_replicas(tmp_path: Path) -> None:
    plan, model = make_plan(redundant=4)
    with pytest.raises(ViolationError, match="no replicas; the plan has 4 redundant slots"):
        export_plan(plan, model, "vllm-placement-file", tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_vllm_placement_file_refuses_layers_that_differ(tmp_path: Path) -> None:
    plan, model = one_placement(2)
    changed = replace_slots(plan, [[0, 2, 4, 1, 3, 5], [0, 2, 1, 4, 3, 5]])
    with pytest.raises(ViolationError, match="expert 1 is on rank 1 in layer 0 and on rank 0 in layer 1"):
        export_plan(changed, model, "vllm-placement-file", tmp_path / "plan.json")


def test_the_engine_s_flags_name_the_file_and_the_redundancy(tmp_path: Path) -> None:
    plan, model = make_plan(num_experts=8, num_ranks=4, redundant=4)
    flags = export_plan(plan, model, "sglang", tmp_path / "plan.json")
    assert f"--init-expert-location {tmp_path / 'plan.json'}" in flags
    assert "--ep-num-redundant-experts 4" in flags
    assert "--ep-size 4" in flags
    assert "#41141" in export_plan(plan, model, "vllm", tmp_path / "plan.jsonl")
    assert "#49572" in export_plan(plan, model, "vllm", tmp_path / "plan.json")
