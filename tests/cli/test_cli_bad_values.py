"""Bad input, values: ids, layers, slots, memory, keys, NaN, empty layers. One line that names the value and the mend.

Exit codes: 2 usage, 3 input file, 4 mismatch, 5 infeasible, 6 violation.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from bad_input_cases import (
    CLUSTER,
    ON_TRACE,
    TRACE,
    change_plan,
    readers_of,
    rows,
    write,
    write_cluster,
    write_config,
    write_json,
    write_npz,
)
from cli_runner import placer, refused

# --- expert ids out of range


def test_ids_beyond_the_model(work: Path) -> None:
    config = write_config("config.json", num_local_experts=4)
    for verb in (("trace", "info"), ("profile", "-o", "new.out"), ("solve", *CLUSTER, "-o", "new.out")):
        line = refused(3, *verb, TRACE, "--model", config, says=f"{TRACE}: ", folder=work)
        assert re.search(r"expert id \d", line)
        assert "end at 3" in line


@pytest.mark.parametrize(("dtype", "bad"), [(np.int32, -2), (np.int64, 70_000), (np.int16, -300)])
def test_ids_that_no_model_has(dtype: type, bad: int, work: Path) -> None:
    expert_TLK = np.ones((30, 2, 2), dtype=dtype)
    expert_TLK[3, 1, 0] = bad
    write_npz("bad.npz", expert_TLK=expert_TLK)
    for call in readers_of("bad.npz"):
        refused(3, *call, says=("bad.npz", str(bad)), folder=work)


def test_ids_that_are_no_integers(work: Path) -> None:
    write_npz("bad.npz", expert_TLK=np.ones((30, 2, 2)))
    for call in readers_of("bad.npz"):
        refused(3, *call, says=("bad.npz", "float64"), folder=work)


# --- a trace with fewer layers than the model


def test_fewer_layers_than_the_model(work: Path) -> None:
    config = write_config("config.json", num_hidden_layers=4)
    for verb in (("trace", "info"), ("profile", "-o", "new.out"), ("solve", *CLUSTER, "-o", "new.out")):
        says = ("has 2 MoE layers", "has 4", "give the model that was recorded")
        refused(4, *verb, TRACE, "--model", config, says=says, folder=work)


# --- slots not divisible by ranks


def test_slots_that_do_not_divide_and_the_mend(work: Path) -> None:
    line = refused(5, "solve", TRACE, "--cluster", "node3", "-o", "new.out", says="8 slots do not divide over 3 ranks",
                   folder=work)  # fmt: skip
    mend = re.search(r"use (--redundant \d+)", line)[1].split()
    assert placer("solve", TRACE, "--cluster", "node3", *mend, "--max-par", "inf", "-o", "new.out").code == 0


def test_a_plan_with_slots_that_do_not_divide(work: Path) -> None:
    change_plan(slot_expert_LP=[[*row, 0] for row in rows()])
    refused(6, "check", "bad.json", *ON_TRACE, says="slots at plan.slot_expert_LP: 9 slots do not divide", folder=work)


# --- fewer slots than experts


def test_fewer_slots_than_experts(work: Path) -> None:
    refused(2, "solve", TRACE, *CLUSTER, "--redundant", "-4", "-o", "new.out", says="redundant is -4", folder=work)
    change_plan(slot_expert_LP=[row[:4] for row in rows()])
    refused(6, "check", "bad.json", *ON_TRACE, says="4 slots a layer; the problem has 8 + 0", folder=work)


def test_more_slots_than_replicas_can_fill(work: Path) -> None:
    for redundant in ("25", "28"):
        refused(5, "solve", TRACE, *CLUSTER, "--redundant", redundant, says="at most --redundant 24", folder=work)


# --- more experts than memory


def test_more_experts_than_memory(work: Path) -> None:
    write_cluster(memory_gib=0.01)
    says = ("GiB of experts a rank", "has 0.01 GiB", "use more ranks, fewer redundant slots or smaller weights")
    refused(5, "solve", TRACE, "--cluster", "c.yaml", "-o", "new.out", says=says, folder=work)
    refused(
        6, "check", "plan.json", "--trace", TRACE, "--cluster", "c.yaml", says=("memory at plan", *says), folder=work
    )


# --- a YAML with an unknown key


def test_a_cluster_with_an_unknown_key_names_the_nearest(work: Path) -> None:
    write_cluster(memory_gb=80)
    says = "c.yaml: unknown key 'memory_gb'; did you mean 'memory_gib'?"
    refused(3, "solve", TRACE, "--cluster", "c.yaml", "-o", "new.out", says=says, folder=work)
    refused(3, "simulate", "plan.json", "--trace", TRACE, "--cluster", "c.yaml", "-o", "new.out", says=says)


def test_settings_with_an_unknown_key_name_the_nearest(work: Path) -> None:
    write("s.yaml", "profile: {window_token: 100}")
    says = "s.yaml: unknown key 'profile.window_token'; did you mean 'window_tokens'?"
    refused(3, "solve", TRACE, *CLUSTER, "--config", "s.yaml", "-o", "new.out", says=says, folder=work)
    refused(3, "profile", TRACE, "--config", "s.yaml", "-o", "new.out", says=says, folder=work)


# --- NaN loads


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1.5", '"3"', "null", "1e400"])
def test_loads_that_are_no_counts(value: str, work: Path) -> None:
    write("counts.json", f'{{"logical_count": [[1, 2, {value}, 4], [1, 2, 3, 4]]}}')
    for call in readers_of("counts.json")[:4]:
        refused(3, *call, says="counts.json: logical_count", folder=work)


def test_weights_that_are_not_numbers(work: Path) -> None:
    weights = np.full((30, 2, 2), 0.5, dtype=np.float32)
    weights[7, 1, 0] = np.nan
    ids = np.tile(np.array([1, 2], dtype=np.uint8), (30, 2, 1))
    ids[::2] += 2
    write_npz("nan.npz", expert_TLK=ids, weight_TLK=weights)
    for call in readers_of("nan.npz"):
        refused(3, *call, says=("nan.npz", "weight_LTK", "nan"), folder=work)


def test_a_cluster_of_nan(work: Path) -> None:
    write_cluster(memory_gib=float("nan"))
    refused(3, "solve", TRACE, "--cluster", "c.yaml", says="c.yaml: cluster.memory_gib is nan", folder=work)
    refused(2, "solve", TRACE, *CLUSTER, "--max-par", "nan", says="max_par is nan", folder=work)


# --- an all-zero layer


def test_an_all_zero_layer(work: Path) -> None:
    """With the model given, the layer stays, and no placement of it would mean anything."""
    config = write_config("config.json", num_hidden_layers=3)
    write_json("counts.json", {"logical_count": [[5] * 8, [0] * 8, [7] * 8]})
    says = ("no token chose any expert in layer(s) [1]", "without --model, which drops them")
    refused(2, "solve", "counts.json", *CLUSTER, "--model", config, "-o", "new.out", says=says, folder=work)
    expert_TLK = np.tile(np.array([1, 2], dtype=np.uint8), (30, 3, 1))
    expert_TLK[::2] += 1
    expert_TLK[:, 1] = 255
    write_npz("blank.npz", expert_TLK=expert_TLK)
    refused(2, "solve", "blank.npz", *CLUSTER, "--model", config, "-o", "new.out", says=says, folder=work)
    for name in ("counts.json", "blank.npz"):
        mended = ("solve", name, "--cluster", "node1", "--max-par", "inf")
        assert placer(*mended).code == 0
        dense = write_config("dense.json", num_hidden_layers=3, mlp_layer_types=["moe", "dense", "moe"])
        assert placer(*mended, "--model", dense).code == 0


def test_a_layer_that_was_never_routed_is_dropped_and_said_so_without_a_model(work: Path) -> None:
    write_json("counts.json", {"logical_count": [[5] * 8, [0] * 8, [7] * 8]})
    outcome = placer("trace", "import", "counts.json", "-o", "new.out")
    assert outcome.code == 0
    assert "layers 1 (repaired)" in outcome.err
    assert placer("solve", "new.out", *CLUSTER).code == 0


def test_counts_that_are_all_zero(work: Path) -> None:
    write_json("counts.json", {"logical_count": [[0] * 8, [0] * 8]})
    for call in readers_of("counts.json")[:4]:
        refused(3, *call, says=("counts.json", "every count is 0"), folder=work)
