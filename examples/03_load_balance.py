"""Load-only placement against EPLB's rules and the lower bound, layer by layer, on recorded load counts.

    python examples/03_load_balance.py COUNTS.json [--ranks 64] [--redundant 64]

COUNTS is what SGLang's --init-expert-location takes, {"logical_count": [[...], ...]}; zero rows (dense) are dropped.
Milliseconds are the median of 9 runs after a warm-up, one core.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from placer.report.tables import DataTable, render
from solvers.balance.eplb import eplb_slots
from solvers.balance.load import max_load_bound, mean_par, rank_load_LR
from solvers.balance.lpt import lpt_slots
from traces.counts import LoadCounts
from traces.readers import read_any


def median_ms(solve: Callable[[], np.ndarray]) -> float:
    """Median wall milliseconds of 9 calls, after one that compiles."""
    solve()
    times = []
    for _ in range(9):
        started = time.perf_counter()
        solve()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def main() -> None:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--redundant", type=int, default=64)
    given = parser.parse_args()
    counts = read_any(given.counts)
    if not isinstance(counts, LoadCounts):
        parser.error(f"{given.counts}: holds tokens, not counts")
    load_LE, ranks = counts.load_LE, given.ranks
    slots = load_LE.shape[1] + given.redundant
    bound_L = np.array([max_load_bound(load_E, ranks, slots // ranks) for load_E in load_LE])
    solvers = {
        "eplb": lambda: eplb_slots(load_LE, slots, ranks),
        "placer lpt": lambda: lpt_slots(load_LE, slots, ranks),
    }
    peaks, rows = {}, []
    for name, solve in solvers.items():
        load_LR = rank_load_LR(load_LE, solve(), ranks)
        peaks[name] = load_LR.max(axis=1)
        above = 100 * (peaks[name] / bound_L - 1)
        rows.append((name, mean_par(load_LR), float(above.mean()), float(above.max()), median_ms(solve)))
    columns = ("solver", "PAR", "mean % above bound", "worst % above bound", "ms")
    worse = int((peaks["placer lpt"] > peaks["eplb"] * (1 + 1e-12)).sum())
    title = f"{load_LE.shape[0]} layers x {load_LE.shape[1]} experts, {ranks} ranks, {given.redundant} redundant slots"
    notes = (f"layers where placer is less balanced than eplb: {worse}",)
    render(DataTable(title=title, columns=columns, rows=tuple(rows), notes=notes), Console(width=110))


if __name__ == "__main__":
    main()
