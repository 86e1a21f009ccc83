"""Ranks touched against load balance on a real trace, planned on half of the requests and judged on the other half.

    python examples/02_real_trace.py TRACE [--cluster node8] [--model PRESET] [--splits 4] [-o RESULT.json]

Prints one row per plan: linear, EPLB, load only, and placer at several load caps; mean over the splits and the first
split by itself. Seconds are processor seconds of one core, after a warm-up that compiles the kernels.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from placer.config import Settings, load_cluster
from placer.core.atomic import write_text_atomically
from placer.core.evaluate import Evaluation
from placer.pipeline import judge, open_trace, profile_of, solve
from placer.report.tables import DataTable, render
from traces.hf_config import MODELS
from traces.trace import RoutingTrace

CAPS = (1.02, 1.03, 1.05, 1.10, 1.12, 1.15, 1.20, float("inf"))
ROWS = [("linear", 1.10), ("eplb", 1.10), ("lpt", 1.10), *(("coactivation", cap) for cap in CAPS)]


def one(train: RoutingTrace, test: RoutingTrace, cluster_name: str, solver: str, cap: float) -> dict[str, float]:
    """What one plan does to the judged half, and what it cost to find."""
    cluster = load_cluster(cluster_name)
    profile = profile_of(train, Settings().profile)
    started = time.process_time()
    solved = solve(profile, cluster, solver=solver, max_par=cap, time_limit_s=600)
    seconds = time.process_time() - started
    judged = judge(solved.plan, test, cluster)
    assert isinstance(judged, Evaluation)
    return {
        "ranks touched": judged.ranks_touched,
        "PAR": judged.par,
        "PAR window mean": judged.par_window_mean,
        "PAR window p99": judged.par_window_p99,
        "cpu s": seconds,
    }


def main() -> None:
    """Parses the arguments, runs every row on every split, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--cluster", default="node8")
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    trace = open_trace(given.trace, MODELS.get(given.model))
    solve(trace.split_by_request(0.5, 0)[0].select_layers([0]), load_cluster(given.cluster), time_limit_s=5)
    results = {}
    for solver, cap in ROWS:
        name = solver if solver != "coactivation" else f"placer, max-par {cap:g}"
        runs = [one(*trace.split_by_request(0.5, seed), given.cluster, solver, cap) for seed in range(given.splits)]
        results[name] = {key: [run[key] for run in runs] for key in runs[0]}
    columns = tuple(next(iter(results.values())))
    rows = tuple((name, *(float(np.mean(row[c])) for c in columns), row["ranks touched"][0], row["PAR"][0])
                 for name, row in results.items())  # fmt: skip
    title = f"{given.trace.name}, {given.cluster}, per_rank: mean of {given.splits} splits by request; split 0"
    table = DataTable(title=title, columns=("plan", *columns, "ranks, split 0", "PAR, split 0"), rows=rows)
    render(table, Console(width=110))
    if given.output:
        about = {"trace": given.trace.name, "sha256": trace.sha256, "cluster": given.cluster, "mode": "per_rank"}
        about |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "splits": given.splits}
        write_text_atomically(given.output, json.dumps({"about": about, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
