"""Solvers that the portfolio's tests register: they answer, fail or are interrupted as the test says."""

from collections.abc import Callable
from typing import Any

import numpy as np

from placer.core.problem import PlacementProblem
from solvers.registry import SOLVERS, SolverInfo
from solvers.result import SolveResult
from solvers.stages import Stage

__all__ = ["BEHAVIOUR", "answering", "raising", "solve_first", "solve_second", "stand_in_stage"]

BEHAVIOUR: dict[str, Callable[..., SolveResult]] = {}
"""What each stand-in does, set by the test."""


def solve_first(problem: PlacementProblem, **options: Any) -> SolveResult:
    return BEHAVIOUR["first"](problem, **options)


def solve_second(problem: PlacementProblem, **options: Any) -> SolveResult:
    return BEHAVIOUR["second"](problem, **options)


def answering(slots_LP: np.ndarray | None, **fields: Any) -> Callable[..., SolveResult]:
    given = {"solver": "stand_in", "status": "solved", "stopped_by": "effort", **fields}
    return lambda problem, **options: SolveResult(slot_expert_LP=slots_LP, **given)


def raising(error: BaseException) -> Callable[..., SolveResult]:
    def solve(problem: PlacementProblem, **options: Any) -> SolveResult:
        raise error

    return solve


def stand_in_stage(monkeypatch: Any, name: str, kind: Any, behaviour: Callable[..., SolveResult], **row: Any) -> Stage:
    """Registers the stand-in `name` ("first" or "second") and returns its row."""
    takes = ("seed", "time_limit_s", "gap", "start_LP", "progress")
    monkeypatch.setitem(SOLVERS, name, SolverInfo("portfolio_stand_ins", f"solve_{name}", "", takes, align=False))
    monkeypatch.setitem(BEHAVIOUR, name, behaviour)
    return Stage(solver=name, kind=kind, **row)
