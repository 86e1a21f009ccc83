"""A file that is wrong on disk is never reported as written, and never replaces a good one."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans_for_export import make_plan

import placer.export
from placer.core.errors import DependencyError, InputFileError, UsageError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export import EXPORTERS, export_plan

EVERY = [
    (name, suffix)
    for name, exporter in EXPORTERS.items()
    for suffix in exporter.suffixes
    if name != "vllm-placement-file"
]


@pytest.mark.parametrize(("name", "suffix"), EVERY)
def test_a_write_that_changes_one_slot_fails_and_leaves_the_old_file(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model = make_plan()
    path = tmp_path / f"plan{suffix}"
    path.write_text("what was there")
    honest = EXPORTERS[name].encode

    def swap_two_slots(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
        slots = plan.slot_expert_LP.copy()
        slots[1, [0, 11]] = slots[1, [11, 0]]
        return honest(replace(plan, slot_expert_LP=slots), model, suffix)

    monkeypatch.setitem(placer.export.EXPORTERS, name, replace(EXPORTERS[name], encode=swap_two_slots))
    assert plan.slot_expert_LP[1, 0] != plan.slot_expert_LP[1, 11]
    with pytest.raises(InputFileError, match="layer 4 slot 0 reads back as expert"):
        export_plan(plan, model, name, path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "suffix"), EVERY)
def test_a_truncated_write_fails(name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = make_plan()
    honest = EXPORTERS[name].encode

    def cut(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
        payload = honest(plan, model, suffix)
        return payload[: len(payload) // 2]

    monkeypatch.setitem(placer.export.EXPORTERS, name, replace(EXPORTERS[name], encode=cut))
    with pytest.raises(InputFileError, match=f"plan{suffix}"):
        export_plan(plan, model, name, tmp_path / f"plan{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "suffix"), EVERY)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_input_error_or_another_map_never_a_crash(
    name: str, suffix: str, data: st.DataObject
) -> None:
    plan, model = make_plan()
    payload = bytearray(EXPORTERS[name].encode(plan, model, suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    del payload[data.draw(st.integers(0, 2 * len(payload))) :]
    try:
        found_LP = EXPORTERS[name].decode(bytes(payload), model, suffix)
    except InputFileError:
        return
    assert found_LP.ndim == 2
    assert len(found_LP) == model.num_sites


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sglang", '{"physical_to_logical_map": [[0]], "made_by": "placer"}'),
        ("sglang", "[]"),
        ("sglang", '{"physical_to_logical_map": [[0, 1.5]]}'),
        ("sglang", '{"physical_to_logical_map": [[0], [0, 1]]}'),
        ("sglang", '{"physical_to_logical_map": [[99999999999999999999]]}'),
        ("trtllm", "num_slots: 3"),
        ("trtllm", "num_slots: [unclosed"),
        ("trtllm", "num_slots: 1\ninitial_global_assignments: {3: [0], 4: [0], 5: [0]}\nlayer_updates_per_iter: 1"),
        ("trtllm", "num_slots: 2\ninitial_global_assignments: {3: [0], 4: [0], 5: [0]}\nlayer_updates_per_iter: 0"),
        ("trtllm", "num_slots: 1\ninitial_global_assignments: {0: [0], 1: [0], 2: [0]}\nlayer_updates_per_iter: 0"),
        ("ascend", "{}"),
        ("ascend", '{"moe_layer_count": 3, "layer_list": [1, 2, 3]}'),
        ("vllm-initial-mapping", "{}\n{}\n"),
        ("vllm-initial-mapping", "{}"),
        ("vllm-expert-map", "[[0], [0]]"),
        ("vllm-placement-file", '{"expert_to_ep_rank": [0, 0, 0, 0, 1, 1, 1, 2]}'),
        ("vllm-placement-file", '{"expert_to_ep_rank": [0, 1]}'),
        ("vllm-placement-file", '{"expert_to_ep_rank": [-1, 0, 0, 0, 0, 0, 0, 0]}'),
        ("eplb", "not a zip"),
    ],
)
def test_a_file_of_another_form_is_refused(name: str, text: str, tmp_path: Path) -> None:
    _, model = make_plan()
    path = tmp_path / f"plan{EXPORTERS[name].suffixes[0]}"
    path.write_text(text)
    with pytest.raises(InputFileError, match=f"plan{EXPORTERS[name].suffixes[0]}: "):
        EXPORTERS[name].read_back(path, model)


def test_eplb_arrays_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    plan, model = make_plan()
    export_plan(plan, model, "eplb", tmp_path / "plan.npz")
    maps = dict(np.load(tmp_path / "plan.npz"))
    maps["logcnt"][2, 3] += 1
    np.savez(tmp_path / "plan.npz", **maps)
    with pytest.raises(InputFileError, match="row 2 expert 3 do not invert phy2log"):
        EXPORTERS["eplb"].read_back(tmp_path / "plan.npz", model)


def test_an_unknown_engine_is_told_which_exist(tmp_path: Path) -> None:
    plan, model = make_plan()
    with pytest.raises(UsageError, match=r"'megatron'; placer exports to sglang, vllm, .*trtllm, ascend, eplb$"):
        export_plan(plan, model, "megatron", tmp_path / "plan.json")


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_suffix_the_engine_would_not_recognise_is_refused(name: str, tmp_path: Path) -> None:
    plan, model = make_plan()
    with pytest.raises(UsageError, match=rf"{name} reads files ending in \."):
        export_plan(plan, model, name, tmp_path / "plan.txt")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    plan, model = make_plan()
    with pytest.raises(InputFileError, match="create the folder first"):
        export_plan(plan, model, "sglang", tmp_path / "absent" / "plan.json")


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    _, model = make_plan()
    with pytest.raises(InputFileError, match="cannot be read"):
        EXPORTERS["sglang"].read_back(tmp_path / "absent.json", model)


def test_a_tensor_file_without_torch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = make_plan()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"pip install 'placer\[torch\]', or export to .json"):
        export_plan(plan, model, "sglang", tmp_path / "plan.pt")
    export_plan(plan, model, "sglang", tmp_path / "plan.json")


def test_importing_the_exporters_does_not_import_torch() -> None:
    import subprocess

    script = "import sys, placer.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
