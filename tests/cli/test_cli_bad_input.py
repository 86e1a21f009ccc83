"""Every line of the issue's list of bad input: one clear line on standard error, the tree's exit code, no file written.

Exit codes: 2 usage, 3 input file, 4 mismatch, 5 infeasible, 6 violation.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_runner import placer, refused

from placer.config import load_cluster
from placer.export import EXPORTERS

TRACE, CLUSTER = "trace.safetensors", ("--cluster", "node4")
ON_TRACE = ("--trace", TRACE, *CLUSTER)


def write(path: str, content: bytes | str) -> str:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_json(path: str, data: Any) -> str:
    return write(path, json.dumps(data))


def write_cluster(path: str = "c.yaml", **changes: Any) -> str:
    return write(path, yaml.safe_dump(load_cluster("node4").to_dict() | changes))


def write_npz(path: str, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return path


def write_config(path: str, **changes: Any) -> str:
    """A Hugging Face config of a model with 2 layers of 8 experts."""
    config = {
        "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    return write_json(path, config | changes)


def change_plan(target: str = "bad.json", **changes: Any) -> str:
    return write_json(target, json.loads(Path("plan.json").read_text()) | changes)


def rows() -> list[list[int]]:
    return json.loads(Path("plan.json").read_text())["slot_expert_LP"]


def readers_of(path: str) -> list[tuple[object, ...]]:
    """Calls that open `path` as what is routed."""
    return [
        ("trace", "info", path),
        ("trace", "import", path, "-o", "new.out"),
        ("profile", path, "-o", "new.out"),
        ("solve", path, *CLUSTER, "-o", "new.out"),
        ("check", "plan.json", "--trace", path, *CLUSTER),
        ("simulate", "plan.json", "--trace", path, *CLUSTER, "-o", "new.out"),
    ]


PLAN_READERS: list[Callable[[str], tuple[object, ...]]] = [
    lambda path: ("check", path, *ON_TRACE),
    lambda path: ("check", "plan.json", *ON_TRACE, "--baseline", path),
    lambda path: ("simulate", path, *ON_TRACE, "-o", "new.out"),
    lambda path: ("export", path, "--to", "sglang", "-o", "new.json"),
    lambda path: ("solve", TRACE, *CLUSTER, "--from", path, "-o", "new.out"),
]


# --- empty files


def test_an_empty_trace(work: Path) -> None:
    write("empty", b"")
    for call in readers_of("empty"):
        refused(3, *call, says="empty: ", folder=work)


def test_an_empty_plan_timeline_and_cluster(work: Path) -> None:
    write("empty", b"")
    for call in PLAN_READERS:
        refused(3, *call("empty"), says="empty: is not JSON", folder=work)
    refused(3, "compare", "empty", says="empty: is not JSON", folder=work)
    write("empty.yaml", b"")
    refused(3, "solve", TRACE, "--cluster", "empty.yaml", says="empty.yaml: is empty; give name, nodes", folder=work)


def test_a_trace_without_tokens(work: Path) -> None:
    write_npz("none.npz", expert_TLK=np.zeros((0, 2, 2), dtype=np.uint8))
    for call in readers_of("none.npz"):
        refused(3, *call, says=("none.npz", "record some requests"), folder=work)


# --- truncated files


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", [TRACE, "profile.safetensors"])
def test_a_truncated_trace_or_profile(name: str, share: float, work: Path) -> None:
    content = Path(name).read_bytes()
    write("cut", content[: max(1, int(share * len(content)))])
    for call in readers_of("cut"):
        refused(3, *call, says="cut: ", folder=work)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_plan_timeline_or_npz(share: float, work: Path) -> None:
    def cut(name: str) -> str:
        content = Path(name).read_bytes()
        return write("cut", content[: max(1, int(share * len(content)))])

    cut("plan.json")
    for call in PLAN_READERS:
        refused(3, *call("cut"), says="cut: is not JSON", folder=work)
    refused(3, "compare", cut("time.json"), says="cut: is not JSON", folder=work)
    write_npz("whole.npz", expert_TLK=np.arange(96, dtype=np.uint8).reshape(12, 4, 2) % 8)
    cut("whole.npz")
    for call in readers_of("cut"):
        refused(3, *call, says="cut: ", folder=work)


# --- corrupt files


def test_corrupt_traces(work: Path) -> None:
    """A bit flipped anywhere in the header, or ids beyond the model's: never a traceback, never a wrong answer."""
    content = bytearray(Path(TRACE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    codes = set()
    for place in rng.choice(header, 60, replace=False).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        write("damaged", bytes(damaged))
        outcome = placer("trace", "info", "damaged", "--json")
        codes.add(outcome.code)
        if outcome.code:
            assert (outcome.code, outcome.out) == (3, "")
            assert outcome.err.startswith("placer: damaged: ")
            assert outcome.err.count("\n") == 1
    assert 3 in codes


def test_a_corrupt_archive(work: Path) -> None:
    write("broken.npz", b"PK\x03\x04" + b"garbage" * 30)
    for call in readers_of("broken.npz"):
        refused(3, *call, says="broken.npz: is a damaged archive", folder=work)


def test_corrupt_json(work: Path) -> None:
    write("bad.json", "{'format': placer-plan}")
    for call in PLAN_READERS:
        refused(3, *call("bad.json"), says="bad.json: is not JSON", folder=work)
    write("bad.jsonl", '{"experts": [[1, 2]]}\n{"experts": [[1, \n')
    for call in readers_of("bad.jsonl"):
        refused(3, *call, says=("bad.jsonl", "line 2"), folder=work)


# --- wrong magic


@pytest.mark.parametrize(
    "content", [b"GIF89a" + bytes(50), b"\x7fELF" + bytes(60), b"%PDF-1.7\n", bytes(100), b"PAR1" + bytes(20)],
    ids=["gif", "elf", "pdf", "zeros", "parquet"],
)  # fmt: skip
def test_wrong_magic(content: bytes, work: Path) -> None:
    write("strange", content)
    for call in readers_of("strange"):
        refused(3, *call, says="strange: is none of placer trace, npz, JSON lines", folder=work)
    for call in PLAN_READERS:
        refused(3, *call("strange"), says="strange: is not", folder=work)
    refused(3, "compare", "strange", says="strange: is not", folder=work)


def test_a_tensor_file_of_something_else(work: Path) -> None:
    """A checkpoint is a safetensors file too."""
    from safetensors.numpy import save_file

    save_file({"model.layers.0.mlp.weight": np.zeros((4, 4), dtype=np.float32)}, "model.safetensors")
    for call in readers_of("model.safetensors"):
        refused(3, *call, says="model.safetensors: is not a placer trace", folder=work)


def test_a_trace_in_the_place_of_a_plan_and_the_other_way_round(work: Path) -> None:
    for call in PLAN_READERS:
        refused(3, *call(TRACE), says=f"{TRACE}: is not JSON", folder=work)
        refused(3, *call("time.json"), says="time.json: is not a placer plan", folder=work)
    refused(3, "compare", "plan.json", says="plan.json: is not a placer Timeline", folder=work)
    for call in readers_of("plan.json"):
        refused(3, *call, says="plan.json: ", folder=work)


# --- a pickle that is not a tensor file


class Bomb:
    """Unpickling this would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("pwned"), "x"))


@pytest.mark.parametrize("name", ["dump.pt", "dump.pkl", "dump"])
@pytest.mark.parametrize("content", [{"records": [1, 2]}, [1, 2, 3], Bomb()], ids=["dict", "list", "code"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "zipped"])
def test_a_pickle_that_is_no_tensor_file(name: str, content: object, wrapped: bool, work: Path) -> None:
    data = pickle.dumps(content)
    if wrapped:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
        data = buffer.getvalue()
    write(name, data)
    for call in readers_of(name)[:3]:
        outcome = placer(*call)
        assert outcome.code in (3, 9), outcome.err  # 9 where torch is not installed
        assert outcome.out == ""
        assert outcome.err.startswith("placer: ")
        assert outcome.err.count("\n") == 1, outcome.err
    assert not Path("pwned").exists()
    assert not Path("new.out").exists()


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


# --- a plan for another trace


def test_a_plan_for_another_trace_of_the_same_shape_warns(work: Path) -> None:
    outcome = placer("check", "plan.json", "--trace", "other.safetensors", *CLUSTER)
    assert outcome.code == 0
    assert outcome.err.startswith("warning: the plan was solved for another trace (hash ")
    assert outcome.out.endswith("plan.json: legal\n")
    data = json.loads(placer("check", "plan.json", "--trace", "other.safetensors", *CLUSTER, "--json").out)
    assert len(data["warnings"]) == 1


def test_a_plan_for_another_cluster_of_the_same_shape_warns(work: Path) -> None:
    write_cluster(memory_gib=33)
    for call in (("check", "plan.json"), ("simulate", "plan.json", "-o", "new.out")):
        outcome = placer(*call, "--trace", TRACE, "--cluster", "c.yaml")
        assert outcome.code == 0
        assert "solved for another cluster" in outcome.err


@pytest.mark.parametrize("shape", [(3, 8), (2, 12)], ids=["layers", "experts"])
def test_a_plan_for_a_trace_of_another_shape_is_refused(shape: tuple[int, int], work: Path) -> None:
    layers, experts = shape
    ids = np.argsort(np.random.default_rng(0).random((40, layers, experts)), axis=2)[:, :, :2].astype(np.uint8)
    write_npz("shape.npz", expert_TLK=ids, request_id_T=np.arange(40) // 2)
    on_shape = ("--trace", "shape.npz", *CLUSTER)
    says = f"the plan has 2 MoE layers of 8 experts, the trace {layers} of {experts}"
    refused(4, "simulate", "plan.json", *on_shape, "-o", "new.out", says=says, folder=work)
    refused(4, "solve", "shape.npz", *CLUSTER, "--from", "plan.json", "-o", "new.out", says=says, folder=work)
    outcome = placer("check", "plan.json", *on_shape)
    assert (outcome.code, outcome.out) == (6, "")
    outcome = placer("check", "plan.json", *ON_TRACE, "--baseline", make_other(on_shape))
    assert (outcome.code, outcome.out) == (4, "")


def make_other(on_shape: tuple[str, ...]) -> str:
    assert placer("solve", "shape.npz", *CLUSTER, "--solver", "linear", "-o", "shape.json").code == 0
    return "shape.json"


@pytest.mark.parametrize("cluster", ["node2", "node8", "2x2", "node3"])
def test_a_plan_for_a_cluster_of_another_shape_is_refused(cluster: str, work: Path) -> None:
    on_cluster = ("--trace", TRACE, "--cluster", cluster)
    says = "the plan is for 4 ranks, 4 a node"
    refused(4, "simulate", "plan.json", *on_cluster, "-o", "new.out", says=says, folder=work)
    refused(6, "check", "plan.json", *on_cluster, says="ranks at plan.num_ranks: 4 ranks, 4 a node", folder=work)


def test_a_trace_recorded_on_more_ranks(work: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((40, 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    write_npz("ranks.npz", expert_TLK=ids, request_id_T=np.arange(40), source_rank_T=np.arange(40) % 16)
    says = "source ranks go up to 15, the cluster has 4 ranks"
    refused(4, "solve", "ranks.npz", *CLUSTER, "-o", "new.out", says=says, folder=work)


# --- bad plans that engines accept


def changed_slot(layer: int, slot: int, value: int) -> list[list[int]]:
    result = rows()
    result[layer][slot] = value
    return result


def twice_on_a_rank() -> list[list[int]]:
    """Four redundant slots; the last rank holds one expert twice."""
    return [[row[i] for i in (0, 1, 4, 2, 3, 0, 4, 5, 1, 6, 7, 7)] for row in rows()]


BAD_PLANS: dict[str, tuple[Callable[[], dict[str, Any]], int, int, str]] = {
    # name: (changes, exit code of check, of export, what both say)
    "fewer layer rows": (lambda: {"slot_expert_LP": rows()[:1]}, 6, 6, "1 rows"),
    "more layer rows": (lambda: {"slot_expert_LP": [*rows(), rows()[0]]}, 6, 6, "3 rows"),
    "too many slots": (lambda: {"slot_expert_LP": [[*row, 0] for row in rows()]}, 6, 6, "9 slots"),
    "too few slots": (lambda: {"slot_expert_LP": [row[:4] for row in rows()]}, 6, 6, "4 slots"),
    "an expert never placed": (lambda: {"slot_expert_LP": changed_slot(1, 0, rows()[1][5])}, 6, 6, "has no slot"),
    "id out of range": (lambda: {"slot_expert_LP": changed_slot(0, 3, 8)}, 6, 6, "expert 8"),
    "id -1": (lambda: {"slot_expert_LP": changed_slot(0, 3, -1)}, 6, 6, "empty (-1)"),
    "two replicas on one rank": (lambda: {"slot_expert_LP": twice_on_a_rank()}, 6, 6, "rank 3"),
    "extra JSON key": (lambda: {"physical_to_logical_map": [[0]]}, 3, 3, "unknown field 'physical_to_logical_map'"),
}


@pytest.mark.parametrize("name", list(BAD_PLANS))
def test_bad_plans_are_refused_by_check(name: str, work: Path) -> None:
    changes, code, _, says = BAD_PLANS[name]
    change_plan(**changes())
    outcome = placer("check", "bad.json", *ON_TRACE)
    assert (outcome.code, outcome.out) == (code, "")
    assert says in outcome.err
    assert all(line.startswith("placer: ") for line in outcome.err.splitlines())


@pytest.mark.parametrize("name", list(BAD_PLANS))
@pytest.mark.parametrize("engine", list(EXPORTERS))
def test_bad_plans_are_refused_by_export(name: str, engine: str, work: Path) -> None:
    changes, _, code, says = BAD_PLANS[name]
    change_plan(**changes())
    target = f"new{EXPORTERS[engine].suffixes[0]}"
    write(target, "what was there before")
    refused(code, "export", "bad.json", "--to", engine, "-o", target, says=says, folder=work)


@pytest.mark.parametrize(
    "name", [n for n in BAD_PLANS if n not in ("two replicas on one rank", "extra JSON key")]
)  # fmt: skip
def test_bad_plans_that_would_lose_tokens_are_not_simulated(name: str, work: Path) -> None:
    """Repeated experts waste a slot but no token: EPLB's plans can be simulated."""
    changes, *_ = BAD_PLANS[name]
    change_plan(**changes())
    outcome = placer("simulate", "bad.json", *ON_TRACE, "-o", "new.out")
    assert outcome.code in (4, 6), outcome.err
    assert (outcome.out, outcome.err.count("\n")) == ("", 1)
    assert not Path("new.out").exists()


@pytest.mark.parametrize("name", [n for n in BAD_PLANS if n != "extra JSON key"])
def test_bad_plans_are_no_start_and_no_baseline(name: str, work: Path) -> None:
    changes, *_ = BAD_PLANS[name]
    change_plan(**changes())
    refused(4, "solve", TRACE, *CLUSTER, "--from", "bad.json", "-o", "new.out", folder=work)
    if name != "two replicas on one rank":
        says = "the baseline plan is not legal here: "
        refused(4, "check", "plan.json", *ON_TRACE, "--baseline", "bad.json", says=says, folder=work)
