"""Ranks touched against load balance on a real trace, planned on half of the requests and judged on the other half.

    python examples/02_real_trace.py TRACE [--cluster node8] [--model PRESET] [--splits 3] [--redundant 8] [-o FILE]

Prints one row per plan: linear, EPLB, load only, and placer at several load caps, with PAR capped in windows too and
without; mean over the splits and the first split by itself. With --redundant slots the plan at the default cap is shown
under every engine's replica choice as well. Without them, where every block of experts can be listed, the least ranks
touched that any placement can have on the planning half is proven (solver `blocks`) and the proof verified.
Seconds are processor seconds of one core, after a warm-up that compiles the kernels.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from placer.config import Settings, load_cluster
from placer.config.settings import SolveSettings
from placer.core.atomic import write_text_atomically
from placer.core.certificates import verify
from placer.core.evaluate import Evaluation
from placer.core.modes import REPLICA_CHOICES
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from placer.pipeline import judge, open_trace, profile_of, solve
from placer.report.tables import DataTable, render
from solvers.exact.blocks import applies_to, solve_blocks
from traces.hf_config import MODELS
from traces.trace import RoutingTrace

CAPS = (1.03, 1.05, 1.10, 1.12, 1.15, 1.20)
REPLICA_CAPS = (1.03, 1.10)
BOUND_CAPS = (1.05, 1.10, float("inf"))
WINDOWS = {"": "balanced", ", no window cap": None}
Row = dict[str, float]


def one(
    profile: Profile, test: RoutingTrace, cluster_name: str, solver: str, cap: float, windows: str | None, spare: int
) -> tuple[Row, Plan]:
    """What one plan does to the judged half, and what it cost to find."""
    cluster = load_cluster(cluster_name)
    settings = SolveSettings(max_window_par=windows)  # type: ignore[arg-type]  # one of the two words it takes
    started = time.process_time()
    solved = solve(
        profile, cluster, solver=solver, max_par=cap, redundant=spare, time_limit_s=600, solve_settings=settings
    )
    seconds = time.process_time() - started
    return {**judged_row(solved.plan, test, cluster_name), "cpu s": seconds}, solved.plan


def judged_row(plan: Plan, test: RoutingTrace, cluster_name: str) -> Row:
    """What a plan does to the judged half."""
    judged = judge(plan, test, load_cluster(cluster_name))
    assert isinstance(judged, Evaluation)
    return {
        "ranks touched": judged.ranks_touched,
        "PAR": judged.par,
        "PAR window mean": judged.par_window_mean,
        "PAR window p99": judged.par_window_p99,
        "iteration us": judged.iteration_us["per_rank"],
    }


def wanted(spare: int) -> list[tuple[str, str, float, str | None]]:
    """(name, solver, cap, windows) of every row."""
    search = "replicated" if spare else "coactivation"
    rows: list[tuple[str, str, float, str | None]] = [
        ("linear", "linear", float("inf"), None),
        ("eplb", "eplb", float("inf"), None),
        ("lpt", "lpt", float("inf"), None),
    ]
    for suffix, windows in WINDOWS.items():
        caps = REPLICA_CAPS if spare else CAPS
        rows += [(f"placer, max-par {cap:g}{suffix}", search, cap, windows) for cap in caps]
    return [*rows, ("placer, no cap", search, float("inf"), None)]


def bounds(profile: Profile, cluster_name: str, time_limit_s: float) -> dict[str, Row]:
    """Least ranks touched on the planning half under each cap on its own counts: found, proven, gap; verified."""
    free = PlacementProblem(profile=profile, cluster=load_cluster(cluster_name))
    found: dict[str, Row] = {}
    for cap in BOUND_CAPS if applies_to(free) else ():
        problem = replace(free, max_par=None if cap == float("inf") else cap)
        result = solve_blocks(problem, time_limit_s=time_limit_s)
        assert result.certificate is not None
        assert result.objective is not None
        proven = min(verify(problem, result.certificate), result.objective)
        found[f"{cap:g}"] = {"found": result.objective, "proven": proven, "gap": 1 - proven / result.objective}
    return found


def main() -> None:
    """Parses the arguments, runs every row on every split, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--cluster", default="node8")
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--redundant", type=int, default=0, metavar="SLOTS")
    parser.add_argument("--bound-time", type=float, default=60.0, metavar="SECONDS", help="for each proven bound")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    trace = open_trace(given.trace, MODELS.get(given.model))
    small = trace.split_by_request(0.5, 0)[0].select_layers([0])
    solve(small, load_cluster(given.cluster), redundant=given.redundant, time_limit_s=5)
    results: dict[str, dict[str, list[float]]] = {}
    proven: dict[str, Row] = {}
    for split in range(given.splits):
        train, test = trace.split_by_request(0.5, split)
        profile = profile_of(train, Settings().profile)
        runs: dict[str, Row] = {}
        for name, solver, cap, windows in wanted(given.redundant):
            runs[name], plan = one(profile, test, given.cluster, solver, cap, windows, given.redundant)
            if given.redundant and name in ("eplb", "placer, max-par 1.1"):
                for choice in REPLICA_CHOICES:
                    row = judged_row(replace(plan, replica_choice=choice), test, given.cluster)
                    runs[f"{name}, {choice}"] = {**row, "cpu s": 0.0}
        for name, run in runs.items():
            for key, value in run.items():
                results.setdefault(name, {}).setdefault(key, []).append(value)
        if split == 0 and not given.redundant:
            proven = bounds(profile, given.cluster, given.bound_time)
    columns = tuple(next(iter(results.values())))
    rows = tuple((name, *(float(np.mean(row[c])) for c in columns), row["ranks touched"][0], row["PAR"][0])
                 for name, row in results.items())  # fmt: skip
    title = f"{given.trace.name}, {given.cluster}, {given.redundant} redundant, per_rank: mean of {given.splits} splits"
    console = Console(width=130)
    render(DataTable(title=title, columns=("plan", *columns, "ranks, split 0", "PAR, split 0"), rows=rows), console)
    if proven:
        cells = tuple((cap, row["found"], row["proven"], 100 * row["gap"]) for cap, row in proven.items())
        heads = ("max-par, planning half", "ranks touched, found", "proven least", "gap %")
        title = "what any placement can reach on the planning half of split 0"
        render(DataTable(title=title, columns=heads, rows=cells), console)
    if given.output:
        about = {"trace": given.trace.name, "sha256": trace.sha256, "cluster": given.cluster, "mode": "per_rank"}
        about |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "splits": given.splits}
        about |= {"redundant": given.redundant}
        text = json.dumps({"about": about, "rows": results, "bounds": proven}, indent=1)
        write_text_atomically(given.output, text + "\n")


if __name__ == "__main__":
    main()
