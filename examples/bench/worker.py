"""One job of the bench in a process of its own: prepare a source, or solve one case with one method and judge it.

    python examples/bench/worker.py '{"kind": "solve", "case": {...}, "method": "lpt", "folder": "...", "seed": 0}'

Prints one JSON object on standard output; what native libraries print goes to standard error. Before the clock starts,
the method solves a tiny problem of the same kind, so that kernels are compiled; reading the profile is not timed
either. Back ends that run in a process of their own (integer programs) are timed with the start of that process.
"""

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from instances import Case, prepare, problem_of  # noqa: E402
from methods import ILPS, name_and_limit  # noqa: E402
from partitioners import TOOLS, solve_by_partition  # noqa: E402

from placer.core.check import check  # noqa: E402
from placer.core.errors import DependencyError, InfeasibleError, PlacerError, UsageError  # noqa: E402
from placer.core.evaluate_profile import evaluate_profile  # noqa: E402
from placer.core.problem import PlacementProblem  # noqa: E402
from placer.pipeline import judge  # noqa: E402
from placer.pipeline.planning import make_plan  # noqa: E402
from solvers.balance.load import par_bound  # noqa: E402
from solvers.registry import run_solver  # noqa: E402
from solvers.result import SolveResult  # noqa: E402
from traces.profile_store import load_profile  # noqa: E402
from traces.store import load_trace  # noqa: E402

__all__ = ["closed_form_bound", "peak_mib", "pin_to_one_core", "solve_job"]

OBJECTIVE_NAMES = {"touched": "ranks_touched", "cut": "cut", "par": "par"}
"""What a solver calls the bench's objective; its bound counts only if it bounds that."""

WARM_LIMIT_S, WARM_SLACK_S, WARM_TRIES = 1.0, 0.5, 6
"""A search that compiles one kernel may run out of time before the next: it is warm once a try ends in time."""
REFUSALS: dict[type[PlacerError], str] = {
    DependencyError: "absent",
    UsageError: "refused",
    InfeasibleError: "infeasible",
}


def pin_to_one_core() -> None:
    """This process and those it starts run on the first core it may use, where the system can say so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def peak_mib() -> float:
    """The most memory this process has had, or the largest it has waited for if that was more, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss of a new program starts from its parent's memory; the high-water mark of the address space does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        own = int(line.split()[1]) * 1024
    return max(own, children) / 2**20


def cpu_seconds() -> float:
    """Processor seconds of this process and of those it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def closed_form_bound(case: Case, problem: PlacementProblem) -> tuple[float | None, str]:
    """A bound that needs no solver, and its name: k distinct experts fill ceil(k / slots) ranks; the heaviest expert.

    There is none for the cut.
    """
    if case.objective == "par":
        return par_bound(problem), "load: mean, heaviest, company"
    if case.objective == "cut":
        return None, ""
    per_layer = []
    for sets in problem.profile.sets:
        size_H = (sets.expert_HK >= 0).sum(axis=1)
        weight_H = sets.weight_H * (size_H > 0)
        per_layer.append((-(-size_H // problem.slots_per_rank) * weight_H).sum() / max(1, weight_H.sum()))
    return float(np.mean(per_layer)), "capacity: ceil(k / slots)"


def run_method(problem: PlacementProblem, name: str, limit_s: float, seed: int) -> SolveResult:
    """One solve by a registered solver or by a partitioner."""
    if name in TOOLS:
        return solve_by_partition(problem, name, seed=seed)
    return run_solver(name, problem, seed=seed, time_limit_s=limit_s)


def warm_up(case: Case, folder: Path, name: str) -> None:
    """Compiles what the method needs, on a tiny problem of the same kind; its refusals are for the real one to say.

    Integer programs have nothing to compile.
    """
    if name in ILPS:
        return
    redundant = 4 if case.redundant else 0
    cluster = "2x2" if name == "eplb_hierarchical" else "node4"
    try:
        tiny = problem_of(case, load_profile(folder / "warm.profile"), cluster=cluster, redundant=redundant)
        for _ in range(WARM_TRIES):
            started = time.perf_counter()
            run_method(tiny, name, WARM_LIMIT_S, 0)
            if time.perf_counter() - started < WARM_LIMIT_S + WARM_SLACK_S:
                break
    except PlacerError as error:
        print(f"warm-up: {error}", file=sys.stderr)


def solve_job(job: dict[str, Any]) -> dict[str, Any]:
    """The row of one (case, method): how it went, what it found, what that does to requests not planned on."""
    case, folder = Case.from_dict(job["case"]), Path(job["folder"])
    name, limit_s = name_and_limit(job["method"], case)
    warm_up(case, folder, name)
    profile = load_profile(folder / "plan.profile")
    problem = problem_of(case, profile)
    row: dict[str, Any] = {"status": "", "message": "", "max_par": problem.max_par, "start_mib": round(peak_mib(), 1)}
    wall, cpu = time.perf_counter(), cpu_seconds()
    result: SolveResult | None = None
    try:
        result = run_method(problem, name, limit_s, job["seed"])
    except PlacerError as error:
        status = next((REFUSALS[kind] for kind in REFUSALS if isinstance(error, kind)), "error")
        row |= {"status": status, "message": str(error)}
    row |= {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(cpu_seconds() - cpu, 3),
        "peak_mib": round(peak_mib(), 1),
    }
    if result is None:
        return row
    row |= {"status": result.status, "stopped_by": result.stopped_by, "message": result.message}
    if result.slot_expert_LP is None:
        return row
    return row | figures(case, problem, result, folder)


def figures(case: Case, problem: PlacementProblem, result: SolveResult, folder: Path) -> dict[str, Any]:
    """Objective and bound on the planning half in the bench's own terms, and the judgement on the other half."""
    plan = make_plan(problem, result, 0)
    broken = sorted({violation.code for violation in check(replace(problem, max_par=None), plan)})
    found = evaluate_profile(plan, problem.profile)
    if case.objective == "cut":
        objective = None if found.kept is None else 1 - found.kept
    else:
        objective = found.ranks_touched if case.objective == "touched" else found.par
    bound, bound_by = closed_form_bound(case, problem)
    own = result.bound if result.objective_name == OBJECTIVE_NAMES[case.objective] else None
    if own is not None and (bound is None or own > bound):
        bound, bound_by = own, result.bound_by
    # with replicas the profile's PAR is an estimate, which `check` makes the same way
    cap_met = not any(violation.code == "max-par" for violation in check(problem, plan))
    row: dict[str, Any] = {
        "solved_by": result.solver,
        "objective": objective,
        "bound": bound,
        "bound_by": bound_by,
        "gap": None,
        "par": found.par,
        "cap_met": cap_met,
        "broken": broken,
        "judged": None,
    }
    if objective is not None and bound is not None and cap_met:
        row["gap"] = 0.0 if objective == 0 else max(0.0, (objective - bound) / objective)
        if bound > objective * (1 + 1e-9):
            row["status"], row["message"] = "error", f"bound {bound} by {bound_by} is above the objective {objective}"
    if (folder / "judge.trace").is_file():
        judged = judge(plan, load_trace(folder / "judge.trace"), problem.cluster)
        names = ("ranks_touched", "par", "par_window_mean", "par_window_p99", "kept")
        row["judged"] = {key: getattr(judged, key) for key in names}
    return row


def main() -> None:
    """Does the job on the command line and prints its answer."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pin_to_one_core()
    job = json.loads(sys.argv[1])
    case = Case.from_dict(job["case"])
    if job["kind"] == "prepare":
        prepare(case.source, Path(job["folder"]), Path(job["data"]))
        done: dict[str, Any] = {"status": "prepared"}
    else:
        done = solve_job(job)
    answer.write(json.dumps(done))
    answer.close()


if __name__ == "__main__":
    main()
