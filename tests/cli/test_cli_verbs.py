"""Every verb does what its help says, for people and for machines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import placer, run_json

from placer.core.plan import Plan
from placer.core.timeline import Timeline
from placer.export import EXPORTERS
from solvers.registry import SOLVERS
from traces.store import load_trace

TRACE, CLUSTER = "trace.safetensors", ("--cluster", "node4")
SOLVE_KEYS = {
    "solver", "status", "stopped_by", "objective", "bound", "gap", "seconds", "ranks_touched", "nodes_touched", "par",
    "par_window_mean", "par_window_p99", "kept", "seed", "plan",
}  # fmt: skip
"""What is promised to scripts."""

MORE_SOLVE_KEYS = {
    "objective_name", "bound_by", "mode", "max_par", "tokens", "copies_sent", "par_max", "iteration_us", "message",
    "certificate", "trail",
    "moved_experts", "moved_bytes", "moved_layers",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("work")


def ok(*arguments: object) -> str:
    outcome = placer(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def write_npz(path: str, **arrays: Any) -> None:
    np.savez(path, **arrays)


def ids(layers: int = 2, tokens: int = 40, experts: int = 8, top_k: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k].astype(np.uint8)


def test_trace_info() -> None:
    data = run_json("trace", "info", TRACE)
    assert data["kind"] == "RoutingTrace"
    assert (data["tokens"], data["requests"], data["num_experts"], data["top_k"]) == (600, 30, 8, 2)
    assert data["moe_layers"] == [0, 1]
    assert data["sha256"] == load_trace(Path(TRACE)).sha256
    assert {"skew", "imbalance", "affinity_ratio", "mean_k", "empty_rows"} <= set(data["statistics"])
    text = ok("trace", "info", TRACE)
    assert "600" in text
    assert "affinity_ratio" in text


def test_trace_info_of_a_profile_and_of_counts() -> None:
    assert run_json("trace", "info", "profile.safetensors")["kind"] == "Profile"
    Path("counts.json").write_text(json.dumps({"logical_count": [[1, 2, 3, 4], [4, 3, 2, 1]]}))
    data = run_json("trace", "info", "counts.json")
    assert (data["kind"], data["num_experts"], data["windows"]) == ("LoadCounts", 4, 1)


def test_trace_info_of_a_single_token() -> None:
    """No statistic is NaN, which JSON has no word for."""
    write_npz("one.npz", expert_TLK=ids(tokens=1))
    assert run_json("trace", "info", "one.npz")["tokens"] == 1


def test_trace_import_of_npz_keeps_every_column() -> None:
    expert_TLK = ids()
    names = np.array(["maths", "law"])
    write_npz("in.npz", expert_TLK=expert_TLK, weight_TLK=np.full(expert_TLK.shape, 0.5, np.float16),
              request_id_T=np.arange(40) // 4, subject_T=np.arange(40) % 2, subjects=names)  # fmt: skip
    data = run_json("trace", "import", "in.npz", "--from", "npz", "-o", "out.safetensors")
    assert (data["kind"], data["tokens"], data["requests"]) == ("RoutingTrace", 40, 10)
    trace = load_trace(Path("out.safetensors"))
    np.testing.assert_array_equal(trace.expert_LTK, expert_TLK.transpose(1, 0, 2))
    assert trace.weight_LTK is not None
    assert trace.tags["subject"].names == ("maths", "law")


def test_trace_import_of_json_lines_and_of_counts() -> None:
    lines = [{"request_id": i % 3, "experts": [[i % 4, 3 - i % 4 if i % 4 != 2 else 0], [1, 2]]} for i in range(12)]
    Path("in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert run_json("trace", "import", "in.jsonl", "-o", "out.safetensors")["tokens"] == 12
    Path("counts.json").write_text(json.dumps({"logical_count": [[[1, 2], [4, 3]], [[5, 5], [1, 1]]]}))
    assert run_json("trace", "import", "counts.json", "-o", "counts.safetensors")["windows"] == 2
    assert run_json("solve", "counts.safetensors", "--cluster", "node2", "--max-par", "inf")["par"] >= 1


def test_trace_split_parts_share_no_request() -> None:
    data = run_json("trace", "split", TRACE, "--train", "a.safetensors", "--test", "b.safetensors", "--seed", "3")
    a, b = (load_trace(Path(name)) for name in ("a.safetensors", "b.safetensors"))
    assert not set(a.request_id_T.tolist()) & set(b.request_id_T.tolist())
    assert a.num_tokens + b.num_tokens == 600
    assert (data["train"]["requests"], data["test"]["requests"]) == (15, 15)


def test_profile_gives_the_plan_that_the_trace_gives() -> None:
    data = run_json("profile", TRACE, "-o", "p.safetensors")
    assert data["tokens"] == 600
    assert data["bytes"] == Path("p.safetensors").stat().st_size
    one = run_json("solve", TRACE, *CLUSTER, "-o", "one.json")
    other = run_json("solve", "p.safetensors", *CLUSTER, "-o", "other.json")
    assert Path("one.json").read_bytes() == Path("other.json").read_bytes()
    for key in ("ranks_touched", "nodes_touched", "par", "par_window_mean", "par_window_p99", "kept"):
        assert one[key] == pytest.approx(other[key], abs=1e-12), key


def test_profile_settings_reach_the_counting_and_the_judgement() -> None:
    """Windows of 100 tokens vary more than the one window of 2,048."""
    Path("c.yaml").write_text("profile: {window_tokens: 100}")
    wide = run_json("solve", TRACE, *CLUSTER)
    narrow = run_json("solve", TRACE, *CLUSTER, "--config", "c.yaml")
    assert narrow["par_window_mean"] > wide["par_window_mean"] == wide["par"]
    ok("profile", TRACE, "-o", "p.safetensors", "--config", "c.yaml")
    counted = run_json("solve", "p.safetensors", *CLUSTER)
    assert counted["par_window_mean"] == pytest.approx(narrow["par_window_mean"], abs=1e-12)


@pytest.mark.parametrize("solver", ["auto", *(name for name in SOLVERS if name not in ("moetuner", "cpsat"))])
@pytest.mark.parametrize("mode", ["per_rank", "per_expert"])
def test_solve_with_every_solver(solver: str, mode: str) -> None:
    options = (TRACE, "--cluster", "2x2", "--mode", mode, "--max-par", "inf", "-o", "p.json")
    redundant = ("--redundant", "4") if solver == "replicated" else ()
    data = run_json("solve", *options, "--solver", solver, "--seed", "5", *redundant)
    assert set(data) == SOLVE_KEYS | MORE_SOLVE_KEYS
    assert data["solver"] in SOLVERS
    assert solver in ("auto", data["solver"])
    assert (data["status"], data["seed"], data["plan"], data["mode"]) == ("solved", 5, "p.json", mode)
    assert data["bound"] is None or data["bound"] <= data["objective"] + 1e-9
    plan = Plan.load(Path("p.json"))
    assert (plan.solver, plan.seed, plan.mode) == (data["solver"], 5, mode)
    assert run_json("check", "p.json", "--trace", TRACE, "--cluster", "2x2")["legal"]


@pytest.mark.parametrize("solver", ["moetuner", "cpsat"])
def test_solve_with_the_exact_solvers(solver: str) -> None:
    """On two ranks and four experts, where they are done at once (each in a process of its own)."""
    write_npz("tiny.npz", expert_TLK=ids(tokens=20, experts=4), request_id_T=np.arange(20) // 2)
    data = run_json("solve", "tiny.npz", "--cluster", "node2", "--solver", solver, "--time", "10s", "--max-par", "inf")
    assert set(data) == SOLVE_KEYS | MORE_SOLVE_KEYS
    assert (data["solver"], data["status"]) == (solver, "solved")


def test_solve_tells_who_improved_what() -> None:
    """As it happens on standard error, and afterwards to scripts; and stops at the gap asked for."""
    outcome = placer("solve", TRACE, *CLUSTER, "--json")
    trail = json.loads(outcome.out)["trail"]
    assert outcome.notes.splitlines()[-len(trail) :] == [f"note: {line}" for line in trail]
    assert any(" -> " in line and " after " in line for line in trail)
    data = run_json("solve", TRACE, *CLUSTER, "--gap", "99%")
    assert data["stopped_by"] in ("gap", "optimal")
    assert not any(line.startswith("cpsat") for line in data["trail"])
    assert run_json("solve", TRACE, *CLUSTER, "--solver", "lpt")["trail"] == []


def test_solve_of_counts_has_the_same_keys() -> None:
    data = run_json("solve", "profile.safetensors", *CLUSTER)
    assert set(data) >= SOLVE_KEYS


def test_solve_without_output_prints_the_plan() -> None:
    data = run_json("solve", TRACE, *CLUSTER)
    assert data["plan"]["format"] == "placer-plan"
    Path("p.json").write_text(json.dumps(data["plan"]))
    assert ok("check", "p.json", "--trace", TRACE, *CLUSTER).endswith("p.json: legal\n")


@pytest.mark.parametrize("mode", ["per_expert", "per_rank", "per_node", "coherent", "allgather"])
def test_solve_in_every_mode(mode: str) -> None:
    outcome = placer("solve", TRACE, "--cluster", "2x2", "--mode", mode, "-o", "p.json")
    assert outcome.code == 0
    assert ("balance only" in outcome.err) == (mode == "allgather"), "locality buys nothing under allgather: said so"
    assert f"iteration_us ({mode})" in outcome.out
    assert Plan.load(Path("p.json")).mode == mode


def test_solve_from_a_plan_is_no_worse_than_it() -> None:
    before = run_json("solve", TRACE, *CLUSTER, "--solver", "linear", "--max-par", "inf", "-o", "start.json")
    after = run_json("solve", TRACE, *CLUSTER, "--from", "start.json", "--solver", "coactivation", "--max-par", "inf")
    assert after["ranks_touched"] <= before["ranks_touched"]


def test_solve_says_when_the_plan_to_start_from_is_not_used() -> None:
    outcome = placer("solve", TRACE, *CLUSTER, "--from", "plan.json", "--solver", "lpt")
    assert outcome.code == 0
    assert "--from is not used" in outcome.err


def test_solve_keeps_the_cap_or_says_that_a_baseline_does_not() -> None:
    data = run_json("solve", TRACE, *CLUSTER, "--max-par", "1.09")
    assert data["max_par"] == 1.09
    assert data["par"] <= 1.09 + 1e-9
    outcome = placer("solve", TRACE, *CLUSTER, "--max-par", "1.0001", "--solver", "linear")
    assert outcome.code == 0
    assert "warning: max-par" in outcome.err


def test_check_of_a_legal_plan() -> None:
    data = run_json("check", "plan.json", "--trace", TRACE, *CLUSTER)
    assert data["legal"] is True
    assert (data["violations"], data["regressions"], data["warnings"]) == ([], [], [])
    assert data["evaluation"]["tokens"] == 600
    assert run_json("check", "plan.json", "--trace", "profile.safetensors", *CLUSTER)["legal"]


def test_check_of_an_illegal_plan_ends_with_6() -> None:
    change_slot("plan.json", "bad.json", 0)
    outcome = placer("check", "bad.json", "--trace", TRACE, *CLUSTER)
    assert (outcome.code, outcome.out) == (6, "")
    assert all(line.startswith("placer: ") for line in outcome.err.splitlines())
    outcome = placer("check", "bad.json", "--trace", TRACE, *CLUSTER, "--json")
    assert outcome.code == 6
    data = json.loads(outcome.out)
    assert data["legal"] is False
    assert data["violations"][0]["code"] in ("missing-expert", "same-rank-replicas")
    assert data["evaluation"] is None


def change_slot(source: str, target: str, slot: int) -> None:
    """One expert gives way to another, so that one is missing."""
    data = json.loads(Path(source).read_text())
    row = data["slot_expert_LP"][0]
    row[slot] = row[(slot + len(row) // 2) % len(row)]
    Path(target).write_text(json.dumps(data))


def test_check_against_a_cap() -> None:
    assert placer("check", "plan.json", "--trace", TRACE, *CLUSTER, "--max-par", "3").code == 0
    outcome = placer("check", "plan.json", "--trace", TRACE, *CLUSTER, "--max-par", "1.0")
    assert outcome.code == 6
    assert outcome.err.startswith("placer: max-par at plan: ")


def test_check_against_a_baseline() -> None:
    """7 for what is worse; and never for a plan against itself."""
    run_json("solve", TRACE, *CLUSTER, "--solver", "linear", "--max-par", "inf", "-o", "linear.json")
    run_json("solve", TRACE, *CLUSTER, "--solver", "lpt", "--max-par", "inf", "-o", "lpt.json")
    common = ("--trace", TRACE, *CLUSTER)
    assert placer("check", "plan.json", *common, "--baseline", "plan.json", "--max-regression", "0%").code == 0
    outcome = placer("check", "linear.json", *common, "--baseline", "lpt.json")
    assert outcome.code == 7
    assert "linear.json, judged on this trace" in outcome.out
    assert outcome.err.startswith("placer: par is ")
    assert "at most 2 % is allowed" in outcome.err
    outcome = placer("check", "linear.json", *common, "--baseline", "lpt.json", "--json")
    assert outcome.code == 7
    data = json.loads(outcome.out)
    assert data["legal"] is True
    assert data["regressions"]
    assert placer("check", "linear.json", *common, "--baseline", "lpt.json", "--max-regression", "99%").code == 0


def test_check_takes_eplb_as_a_baseline_although_it_repeats_experts() -> None:
    """One expert takes nearly all: EPLB gives it more replicas than there are ranks."""
    expert_TLK = np.zeros((50, 1, 1), dtype=np.uint8)
    expert_TLK[:3, 0, 0] = [1, 2, 3]
    write_npz("hot.npz", expert_TLK=expert_TLK, request_id_T=np.arange(50))
    common = ("--cluster", "node2", "--redundant", "4", "--max-par", "inf")
    outcome = placer("solve", "hot.npz", *common, "--solver", "eplb", "-o", "eplb.json")
    assert outcome.code == 0
    assert "same-rank-replicas" in outcome.err
    run_json("solve", "hot.npz", *common, "--solver", "lpt", "-o", "lpt.json")
    outcome = placer("check", "lpt.json", "--trace", "hot.npz", "--cluster", "node2", "--baseline", "eplb.json")
    assert outcome.code in (0, 7), outcome.err
    assert placer("check", "eplb.json", "--trace", "hot.npz", "--cluster", "node2").code == 6


@pytest.mark.parametrize("fidelity", ["port", "phase"])
def test_simulate(fidelity: str) -> None:
    data = run_json(
        "simulate",
        "plan.json",
        "--trace",
        TRACE,
        *CLUSTER,
        "--fidelity",
        fidelity,
        "-o",
        "t.json",
        "--chrome",
        "c.json",
    )
    timeline = Timeline.load(Path("t.json"))
    assert data["about"] == timeline.about
    assert timeline.about["fidelity"] == fidelity
    assert timeline.about["plan_sha256"] == Plan.load(Path("plan.json")).sha256
    assert data["timelines"][0]["mean_us"] == pytest.approx(timeline.iteration_ns().mean() / 1e3)
    assert json.loads(Path("c.json").read_text())["traceEvents"]
    assert (data["output"], data["chrome"]) == ("t.json", "c.json")


def test_simulate_at_port_takes_the_time_that_solve_predicts() -> None:
    judged = run_json("check", "plan.json", "--trace", TRACE, *CLUSTER)["evaluation"]["iteration_us"]["per_rank"]
    data = run_json("simulate", "plan.json", "--trace", TRACE, *CLUSTER, "--fidelity", "port", "-o", "t.json")
    assert data["timelines"][0]["mean_us"] == pytest.approx(judged)


def test_simulate_other_modes_batches_and_iterations() -> None:
    Path("c.yaml").write_text("solve: {batch_tokens: 100}")
    common = ("simulate", "plan.json", "--trace", TRACE, *CLUSTER, "-o", "t.json", "--config", "c.yaml")
    assert run_json(*common)["timelines"][0]["iterations"] == 6
    data = run_json(*common, "--iterations", "2", "--mode", "coherent")
    assert (data["timelines"][0]["iterations"], data["about"]["mode"]) == (2, "coherent")


def test_compare() -> None:
    ok("simulate", "plan.json", "--trace", TRACE, *CLUSTER, "-o", "port.json", "--fidelity", "port")
    data = run_json("compare", "time.json", "port.json", "--chrome", "both.json")
    assert [t["name"] for t in data["timelines"]] == ["time.json", "port.json"]
    assert data["timelines"][0]["ratio"] == 1.0
    assert data["timelines"][1]["ratio"] >= 1.0, "ranks that wait for nobody are no slower"
    assert Path("both.json").exists()
    text = ok("compare", "time.json", "port.json")
    assert "Iteration time" in text
    assert "Phases" in text


@pytest.mark.parametrize("engine", list(EXPORTERS))
def test_export_to_every_engine(engine: str) -> None:
    suffix = EXPORTERS[engine].suffixes[0]
    # the linear plan is alike in all layers, which vLLM's placement file needs
    run_json("solve", TRACE, *CLUSTER, "--solver", "linear", "-o", "plan.json")
    data = run_json("export", "plan.json", "--to", engine, "-o", f"map{suffix}")
    assert data["output"] == f"map{suffix}"
    assert data["load_with"]
    assert Path(f"map{suffix}").stat().st_size > 0
    assert f"load it with: {data['load_with']}\n" in ok("export", "plan.json", "--to", engine, "-o", f"map{suffix}")


def test_export_to_sglang_is_the_plan() -> None:
    ok("export", "plan.json", "--to", "sglang", "-o", "map.json")
    data = json.loads(Path("map.json").read_text())
    assert data == {"physical_to_logical_map": Plan.load(Path("plan.json")).slot_expert_LP.tolist()}


def test_version_and_help() -> None:
    from placer import __version__

    assert ok("--version") == f"placer {__version__}\n"
    text = ok("--help")
    for verb in ("trace", "profile", "solve", "check", "simulate", "run", "compare", "export"):
        assert verb in text
        assert "Usage: placer" in ok(verb, "--help")


def test_help_names_every_solver_and_engine() -> None:
    solve, export = ok("solve", "--help"), ok("export", "--help")
    assert [name for name in SOLVERS if name not in solve] == []
    assert [name for name in EXPORTERS if name not in "".join(export.split())] == []
