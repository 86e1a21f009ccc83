"""How cost grows: seconds against layers, experts, ranks and tokens in turn, and the three largest shapes in use.

    python examples/bench/scaling.py [--part sweeps|shapes|all] [--limit 60] -o FOLDER

Sweeps: processor seconds of one process on one core, after a warm-up; where a search has a time limit it gets --limit
seconds, and a point that needs them all is left out of the slope, since it measures the limit. Slope: log seconds
against log size, least squares. Writes scaling.json, scaling.png (with matplotlib) and shapes.json into FOLDER.

Legend: L layers, E experts, R ranks, T tokens.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import worker  # isort: skip  # first: it sets the number of threads before numpy is loaded

import numpy as np
from bench import about_run, jobs_of, run_bench
from instances import Case, Objective, Source, problem_of, shape_case
from scaling_plot import plot
from table import markdown

from placer.core.atomic import write_text_atomically
from placer.core.errors import PlacerError
from placer.core.profile import Profile
from solvers.registry import SOLVERS, run_solver
from traces.summarize import summarize
from traces.synthetic import synthesize
from traces.trace import RoutingTrace

__all__ = ["BASE", "SWEEPS", "measure", "slope", "sweep", "table_of"]

BASE = {"L": 4, "E": 64, "R": 8, "T": 8_192}
SWEEPS = {"L": (4, 8, 16, 32), "E": (32, 64, 128, 256), "R": (4, 8, 16, 32), "T": (4_096, 8_192, 16_384, 32_768)}
TOP_K = 4
METHODS: dict[str, Objective] = {
    "summarize": "touched",
    "eplb": "par",
    "lpt": "par",
    "coactivation": "touched",
    "affinity": "cut",
}
"""What is timed, and the objective that it is timed on (par: one redundant slot a rank); a solver that is not
registered is left out."""

SHAPES = ((60, 384, "8x8", 64), (94, 128, "2x8", 0), (48, 512, "4x8", 0))
SHAPE_METHODS = ("linear", "eplb", "lpt", "auto")
REPEATS, SHORT_S, LONG_S, LEAST_POINTS = 3, 0.2, 1.0, 3


def slope(size: list[int], seconds: list[float | None]) -> float | None:
    """Exponent of seconds = a * size ** slope by least squares over the points that have seconds; None below three."""
    points = [(np.log(x), np.log(y)) for x, y in zip(size, seconds, strict=True) if y is not None and y > 0]
    if len(points) < LEAST_POINTS:
        return None
    return float(np.polyfit(*np.array(points).T, 1)[0])


def measure(method: str, trace: RoutingTrace, profile: Profile, ranks: int, limit_s: float) -> tuple[float, str]:
    """Processor seconds of one run (the median of several short ones), and how it ended."""
    if method == "summarize":
        return _median(lambda: str(summarize(trace, threads=1) and "effort"))
    objective = METHODS[method]
    spare = ranks if objective == "par" else 0
    case = Case(source=Source(name="sweep"), cluster=f"node{ranks}", objective=objective, redundant=spare)
    problem = problem_of(case, profile)
    return _median(lambda: run_solver(method, problem, time_limit_s=limit_s).stopped_by)


def _median(run: Callable[[], str]) -> tuple[float, str]:
    times: list[float] = []
    end = ""
    while (len(times) < REPEATS and sum(times) < LONG_S) or sum(times) < SHORT_S:
        started = worker.cpu_seconds()
        end = run()
        times.append(worker.cpu_seconds() - started)
    return float(np.median(times)), end


def sweep(axis: str, sizes: tuple[int, ...], methods: list[str], limit_s: float) -> dict[str, Any]:
    """Seconds of every method along one axis, the others at BASE; None where the limit or an error stopped it."""
    found: dict[str, Any] = {name: {"size": list(sizes), "seconds": [], "end": [], "slope": None} for name in methods}
    for size in sizes:
        at = {**BASE, axis: size}
        trace = synthesize(
            num_layers=at["L"], num_experts=at["E"], top_k=TOP_K, num_tokens=at["T"], num_requests=64, seed=7
        )
        profile = summarize(trace, threads=1)
        for name in methods:
            try:
                seconds, end = measure(name, trace, profile, at["R"], limit_s)
            except PlacerError as error:
                seconds, end = 0.0, f"error: {error}"
            whole = not end.startswith("error") and end != "time_limit"
            found[name]["seconds"].append(round(seconds, 5) if whole else None)
            found[name]["end"].append(end)
            print(f"{axis} = {size}: {name} {seconds:.3f} s, {end}", file=sys.stderr)
    for row in found.values():
        row["slope"] = slope(row["size"], row["seconds"])
    return found


def table_of(sweeps: dict[str, dict[str, Any]]) -> str:
    """Slopes and the seconds at both ends of each axis, as Markdown."""
    lines = ["| axis | method | slope | seconds |", "|---|---|---:|---|"]
    for axis, methods in sweeps.items():
        for name, row in methods.items():
            steep = "-" if row["slope"] is None else f"{row['slope']:.2f}"
            seconds = ", ".join("limit" if value is None else f"{value:.3g}" for value in row["seconds"])
            lines.append(f"| {axis} = {', '.join(map(str, row['size']))} | {name} | {steep} | {seconds} |")
    return "\n".join(lines)


def run_sweeps(folder: Path, limit_s: float) -> None:
    """All sweeps; scaling.json is written after each."""
    worker.pin_to_one_core()
    methods = [name for name in METHODS if name == "summarize" or name in SOLVERS]
    for _ in range(2):
        sweep(
            "T", (1_024,), methods, 5.0
        )  # compiles; a search that ran out of time while it did is warm the second time
    result: dict[str, Any] = {
        "about": {**about_run("scaling"), "base": BASE, "top_k": TOP_K, "limit_s": limit_s, "seconds": "processor"},
        "sweeps": {},
    }
    for axis, sizes in SWEEPS.items():
        result["sweeps"][axis] = sweep(axis, sizes, methods, limit_s)
        write_text_atomically(folder / "scaling.json", json.dumps(result, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no scaling.png: matplotlib is absent; pip install -e '.[bench]'", file=sys.stderr)
    else:
        plot(result["sweeps"], folder / "scaling.png")
    print(table_of(result["sweeps"]))


def run_shapes(folder: Path, limit_s: float) -> None:
    """The three large shapes as rows of the bench, each in a process of its own."""
    cases = [shape_case(*shape, redundant=spare, limit_s=limit_s) for *shape, spare in SHAPES]
    jobs = {key: job for key, job in jobs_of(cases).items() if job["method"] in SHAPE_METHODS}
    print(markdown(run_bench(jobs, folder / "shapes.json", about_run("shapes"))))


def main() -> None:
    """Parses the arguments and runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("sweeps", "shapes", "all"), default="all")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a search gets")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if given.part != "shapes":
        run_sweeps(given.output, given.limit)
    if given.part != "sweeps":
        run_shapes(given.output, given.limit)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
