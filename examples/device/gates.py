"""Predicted against measured on one machine and its disk: D2MoE's steps, budgets, caches, reading ahead, batches.

    python examples/device/gates.py OUT.json --bank NAME NESTED COPIES TRACE [--limits 20 none]

A bank is a plane file, the same experts as whole copies, and a trace (bits recorded, or drawn with D2MoE's capacities;
"synthetic": top-2 routing made for the planes' layers and experts).
Plans know one half of the requests, the other half runs. For each bandwidth limit the machine is calibrated, all is
predicted with fidelity flow, and only then measured: every policy in each round, in random order, reads around the page
cache. OUT is written after every group; groups that it has are kept, so a run that was stopped goes on. `--table` only
prints it. Nothing else should run on the machine.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from policies import Bank, Policy, budget_policies, halves_of, steps_of
from rich.console import Console

from placer.core.atomic import write_text_atomically
from placer.core.device.planes import PlaneIndex
from placer.core.timeline import Timeline
from placer.execute.device import run_device
from placer.execute.device.calibrate import calibrate_device
from placer.pipeline import open_trace
from placer.report.gates import GateRow, GateVerdict, gate_tables, judge_gates
from placer.report.tables import DataTable, render
from sim.device import simulate_device
from traces.plane_store import load_plane_index, verify_planes
from traces.synthetic import synthesize
from traces.trace import RoutingTrace

SEEN = ("read_mode", "asked_bytes", "disk_read_bytes", "peak_plane_bytes", "rss_before_bytes", "peak_rss_bytes")
SHARES = (0.25, 0.5, 0.75)
AGAIN = "on demand, again"


def ask_for_realtime(say: Console) -> None:
    """Realtime priority for this process and its threads, where it may have it: the noise is far less."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    except (AttributeError, PermissionError):
        say.print("no realtime priority (it needs root, on Linux): expect more noise")


def calibrated(name: str, nested: Path, copies: Path, limit: float | None, say: Console) -> tuple[Bank, dict]:
    """The bank with this machine as it is now, and how well the calibrations fit."""
    about, found = {}, []
    for path in (nested, copies):
        index = load_plane_index(path)
        verify_planes(index)
        device, fit = calibrate_device(index, memory_mib=index.total_bytes / 2**20 + 1, limit=limit)
        about[path.name] = {"device": device.to_dict(), "fit": fit}
        found += [index, device]
    say.print(f"{name}: calibrated at {'full speed' if limit is None else f'{limit:g} MB/s'}")
    bank = Bank(name=name, nested=found[0], device=found[1], copies=found[2], copies_device=found[3])
    return bank, about


def mean_us(timeline: Timeline) -> float:
    """Mean iteration."""
    return float(timeline.iteration_ns().mean()) / 1e3


def measured_rounds(policies: list[Policy], rounds: int, seed: int, say: Console) -> dict[str, list[Timeline]]:
    """Every policy once a round, in random order; the first twice, to know the noise."""
    rng = np.random.default_rng(seed)
    arms = {policy.name: policy for policy in policies} | {AGAIN: policies[0]}
    found: dict[str, list[Timeline]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in rng.permutation(list(arms)).tolist():
            one = arms[name]
            found[name].append(run_device(one.plan, one.work, one.index, one.device, warm_up=1, verify=False))
        say.print(f"  round {turn + 1} of {rounds}")
    return found


def group_of(group: str, policies: list[Policy], rounds: int, seed: int, say: Console) -> dict:
    """Rows of one group; the first policy is the baseline."""
    predicted = {one.name: simulate_device(one.plan, one.work, one.device) for one in policies}
    say.print(f"{group}: {len(policies)} policies predicted, now measured")
    measured = measured_rounds(policies, rounds, seed, say)
    first, rows = policies[0].name, []
    for one in policies:
        times = [mean_us(timeline) for timeline in measured[one.name]]
        ratios = [mean_us(base) / time for base, time in zip(measured[first], times, strict=True)]
        row = GateRow(
            group=group,
            name=one.name,
            placement=one.name,
            mode="device",
            homes="",
            measured_us=float(np.median(times)),
            measured_low_us=min(times),
            measured_high_us=max(times),
            predicted_us=mean_us(predicted[one.name]),
            ratio=float(np.median(ratios)),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            predicted_ratio=mean_us(predicted[first]) / mean_us(predicted[one.name]),
        )
        about = measured[one.name][0].about
        extra = {
            "tokens_per_s": 1e6 * float(one.work.tokens_B.mean()) / row.measured_us,
            "memory_bytes": one.plan.memory_bytes,
            "plan": {name: getattr(one.plan, name) for name in ("order", "cache", "cache_bytes", "buffer_bytes")},
            "phases_us": {
                name: {phase: float(ns_I.mean()) / 1e3 for phase, ns_I in timeline.phase_ns().items()}
                for name, timeline in (("measured", measured[one.name][0]), ("predicted", predicted[one.name]))
            },
            "about": {key: about[key] for key in SEEN if key in about},
        }
        rows.append(asdict(row) | extra)
    again = [mean_us(a) / mean_us(b) for a, b in zip(measured[first], measured[AGAIN], strict=True)]
    made = {"rounds": rounds, "iterations": policies[0].work.num_iterations, "seed": seed, "fidelity": "flow"}
    return {**made, "rows": rows, "again": {"low": min(again), "high": max(again), "median": float(np.median(again))}}


def judged(data: dict) -> tuple[list[GateRow], GateVerdict]:
    """All rows and the verdict; the noise floor is the worst round of a baseline against itself."""
    groups = data["groups"].values()
    rows = [GateRow(**{key: row[key] for key in GateRow.__slots__}) for group in groups for row in group["rows"]]
    noise = max(abs(np.log(group["again"][end])) for group in groups for end in ("low", "high"))
    return rows, judge_gates(rows, float(np.expm1(noise)))


def tables(data: dict) -> list[DataTable]:
    """The gates, then throughput and memory of each policy."""
    rows, verdict = judged(data)
    found = list(gate_tables(rows, verdict))
    columns = ("policy", "tokens/s", "of demand", "budget MiB", "planes held MiB", "rise of memory MiB", "read MiB")
    for name, group in data["groups"].items():
        base = group["rows"][0]["tokens_per_s"]
        lines = []
        for row in group["rows"]:
            seen = row["about"]
            rise = (seen["peak_rss_bytes"] - seen["rss_before_bytes"]) / 2**20 if seen.get("peak_rss_bytes") else None
            sizes = (row["memory_bytes"], seen["peak_plane_bytes"])
            mib = [size / 2**20 for size in sizes]
            read = seen["disk_read_bytes"] / 2**20 if seen.get("disk_read_bytes") is not None else None
            lines.append((row["name"], row["tokens_per_s"], row["tokens_per_s"] / base, *mib, rise, read))
        found.append(DataTable(title=f"Throughput: {name}", columns=columns, rows=tuple(lines)))
    return found


def trace_of(text: str, index: PlaneIndex, seed: int) -> RoutingTrace:
    """The trace in a file, or synthetic routing of uneven popularity for the planes' model."""
    if text != "synthetic":
        return open_trace(Path(text))
    layers, experts, _ = index.shape_LEK
    return synthesize(
        num_layers=layers,
        num_experts=experts,
        top_k=2,
        num_tokens=16_384,
        num_requests=128,
        seed=seed,
        popularity_sigma=0.8,
    )


def policies_for(bank: Bank, halves: tuple[RoutingTrace, RoutingTrace], batch: int, iterations: int) -> list[Policy]:
    """D2MoE's steps, three budgets, and at the middle one caches and reading ahead."""
    steps = steps_of(bank, halves[1], batch, iterations)
    return steps + budget_policies(bank, *halves, batch, iterations, SHARES, SHARES[1])


def main() -> None:
    """Parses the arguments, runs what OUT does not have yet, prints the gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bank", nargs=4, action="append", default=[], metavar=("NAME", "NESTED", "COPIES", "TRACE"))
    parser.add_argument("--limits", nargs="+", default=("none",), help="megabytes per second, or none")
    parser.add_argument("--batches", nargs="+", type=int, default=(4, 16))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    say = Console(width=150)
    if not given.table:
        ask_for_realtime(say)
    data = json.loads(given.out.read_text()) if given.out.exists() else {"groups": {}, "calibrations": {}}
    for name, nested, copies, trace in [] if given.table else given.bank:
        index = load_plane_index(Path(nested))
        halves = halves_of(trace_of(trace, index, given.seed), index.ladder, given.seed)
        for text in given.limits:
            speed = "disk" if text == "none" else f"{text} MB/s"
            wanted = {f"{name}, {speed}, batch {batch}": batch for batch in given.batches}
            wanted = {group: batch for group, batch in wanted.items() if group not in data["groups"]}
            if not wanted:
                continue
            limit = None if text == "none" else float(text)
            bank, about = calibrated(name, Path(nested), Path(copies), limit, say)
            data["calibrations"][f"{name}, {speed}"] = about
            for group, batch in wanted.items():
                data["groups"][group] = group_of(
                    group, policies_for(bank, halves, batch, given.iterations), given.rounds, given.seed, say
                )
                write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    if not data["groups"]:
        parser.error(f"{given.out} has no groups yet: give at least one --bank")
    if not given.table:
        data["verdict"] = judged(data)[1].to_dict()
        write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    for table in tables(data):
        render(table, say)


if __name__ == "__main__":
    main()
