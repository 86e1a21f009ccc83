"""`placer simulate --serve` and `--sweep`: reports, resumption, and refusals of one line."""

import json
from pathlib import Path

import pytest
import yaml
from cli_runner import placer, refused, run_json

TRACE = "trace.safetensors"
SERVE = ("simulate", "plan.json", "--trace", TRACE, "--cluster", "node4", "--serve", "serve.yaml", "-o", "report.json")
SWEEP = ("simulate", "--sweep", "sweep.yaml", "-o", "sweep.json")
LOAD = {"arrivals": {"requests": 40, "rate_per_s": 200.0, "input": {"mean": 60}, "output": {"mean": 12}}, "seed": 3}

pytestmark = pytest.mark.usefixtures("work")


def write(name: str, **data: object) -> None:
    Path(name).write_text(yaml.safe_dump(data), encoding="utf-8")


def test_a_serving_run_writes_its_report() -> None:
    write("serve.yaml", **LOAD)
    data = run_json(*SERVE)
    assert data["output"] == "report.json"
    written = json.loads(Path("report.json").read_text())
    assert written == {key: value for key, value in data.items() if key != "output"}
    assert written["requests"]["finished"] == written["requests"]["arrived"] == 40
    assert written["about"]["mode"] == "per_rank"
    assert {"p50", "p99"} <= set(written["latency"]["ttft_ms"])
    before = Path("report.json").read_bytes()
    outcome = placer(*SERVE)
    assert outcome.code == 0, outcome.err
    assert Path("report.json").read_bytes() == before, "same seed, same bytes"
    assert "goodput: TTFT within 2000 ms" in outcome.out


def test_requests_of_a_file_pools_apart_and_rebalancing() -> None:
    lines = [{"timestamp": 2 * at, "input_length": 50, "output_length": 20} for at in range(30)]
    Path("requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(
        "serve.yaml",
        requests="requests.jsonl",
        placement="affinity",
        routing="in_order",
        limits={"tokens_per_rank": 64},
        rebalance={"window_iterations": 5, "solver": "eplb", "manner": "overlap"},
        disaggregated={"kv_bytes_per_token": 1000},
    )
    data = run_json(*SERVE)
    assert data["requests"]["finished"] == 30
    assert data["transmit_bytes"]["kv_handoff"] == 30 * 50 * 1000
    assert set(data["pools"]) == {"prefill", "decode"}
    moved = sum(one["experts"] for pool in data["pools"].values() for one in pool["migrations"])
    assert moved > 0
    sent = sum(one["bytes_inside"] + one["bytes_between"] for p in data["pools"].values() for one in p["migrations"])
    assert data["transmit_bytes"]["migration"] == sent > 0
    assert all(par >= 1 for pool in data["pools"].values() for par in pool["par_windows"])


def test_a_load_above_capacity_ends_at_the_horizon_and_says_so() -> None:
    write(
        "serve.yaml",
        arrivals={"requests": None, "rate_per_s": 5000.0, "input": {"mean": 2000}},
        limits={"horizon_s": 0.5, "tokens_per_rank": 256},
    )
    outcome = placer(*SERVE, "--json")
    assert outcome.code == 0
    assert "would never end" in outcome.err
    report = json.loads(outcome.out)
    assert (report["overloaded"], report["stopped_by"], report["end_s"]) == (True, "horizon", 0.5)


def test_a_sweep_keeps_the_points_it_has(work: Path) -> None:
    grid = {"trace": TRACE, "solver": "eplb", "time_s": 5, "serve": LOAD, "modes": ["per_rank", "allgather"]}
    write("sweep.yaml", **grid, clusters=["node4"], batches=[1, 64], redundant=[0, 3])
    data = run_json(*SWEEP)
    assert len(data["points"]) == 8
    no_plan = [point for point in data["points"] if "error" in point]
    assert {point["redundant"] for point in no_plan} == {3}, "11 slots do not divide over 4 ranks"
    assert 0 < len(data["pareto"]) < 8
    written = json.loads(Path("sweep.json").read_text())
    assert written["points"] == data["points"]
    # a point that is there is not made again, and a larger sweep adds to it
    marked = written["points"][0]
    marked["report"]["message"] = "kept"
    Path("sweep.json").write_text(json.dumps(written))
    write("sweep.yaml", **grid, clusters=["node4", "node2"], batches=[1, 64], redundant=[0, 3])
    again = run_json(*SWEEP)
    assert len(again["points"]) == 16
    assert next(p for p in again["points"] if p["id"] == marked["id"])["report"]["message"] == "kept"
    outcome = placer(*SWEEP)
    assert outcome.code == 0
    assert "no plan" in outcome.out
    assert "*" in outcome.out


def test_ep_sizes_cut_the_cluster() -> None:
    write("sweep.yaml", trace=TRACE, solver="linear", clusters=["2x2"], ep_sizes=[1, 2, 4, 8], serve=LOAD)
    points = run_json(*SWEEP)["points"]
    assert [(point["ranks"], point["report"]["ranks"]) for point in points] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    write("sweep.yaml", trace=TRACE, clusters=["2x2"], ep_sizes=[3])
    refused(2, *SWEEP, says="ep_sizes has 3; no multiple of the 2 ranks of a node")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"arrival": {}}, "unknown key 'arrival'; did you mean 'arrivals'?"),
        ({"arrivals": {"rate": 1.0}}, "unknown key 'arrivals.rate'; did you mean 'rate_per_s'?"),
        ({"arrivals": {"rate_per_s": -1.0}}, "arrivals.rate_per_s is -1.0"),
        ({"arrivals": {"kind": "steady"}}, "steady"),
        ({"limits": {"horizon_s": 0}}, "limits.horizon_s is 0"),
        ({"limits": {"tokens_per_rank": 1.5}}, "tokens_per_rank"),
        ({"slo": {"ttft_ms": "fast"}}, "slo.ttft_ms"),
        ({"placement": "best"}, "best"),
        ({"seed": -1}, "seed is -1"),
        ({"disaggregated": {}}, "kv_bytes_per_token"),
        ({"rebalance": {"manner": "soon"}}, "soon"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], says: str, work: Path) -> None:
    write("serve.yaml", **settings)
    refused(3, *SERVE, says=("serve.yaml", says), folder=work)


def test_bad_files_and_flags_are_refused(work: Path) -> None:
    write("serve.yaml", requests="nowhere.jsonl")
    refused(3, *SERVE, says="nowhere.jsonl: cannot be read", folder=work)
    Path("bad.jsonl").write_text('{"timestamp": 0, "input_length": 3, "output_length": 0}\n')
    write("serve.yaml", requests="bad.jsonl")
    refused(3, *SERVE, says="bad.jsonl line 1: output_length is 0", folder=work)
    write("serve.yaml", rebalance={"solver": "magic"})
    refused(2, *SERVE, says="rebalance.solver is 'magic'", folder=work)
    write("sweep.yaml", solver="magic", trace=TRACE)
    refused(2, *SWEEP, says="solver is 'magic'", folder=work)
    write("sweep.yaml", clusters=[])
    refused(3, *SWEEP, says="clusters is empty", folder=work)
    write("sweep.yaml")
    refused(2, *SWEEP, says="names no trace", folder=work)
    refused(2, *SWEEP, "--cluster", "node4", says="leave out PLAN, --cluster and --mode", folder=work)
    refused(2, *SWEEP, "--serve", "serve.yaml", says="both given", folder=work)
    refused(2, *SERVE, "--iterations", "3", says="take no --fidelity", folder=work)
    refused(2, "simulate", "plan.json", "--serve", "serve.yaml", "-o", "x.json", says="--serve needs PLAN", folder=work)
    refused(2, "simulate", "plan.json", "-o", "x.json", says="simulate needs PLAN", folder=work)
    write("sweep.yaml", trace=TRACE)
    Path("sweep.json").write_text("{}")
    refused(3, *SWEEP, says="is not a sweep that could be resumed", folder=work)
    refused(2, *SWEEP[:-1], TRACE, says="is read by this command", folder=work)
