"""Runs a PuLP program with HiGHS or CBC and says honestly what came of it.

Written as PuLP 3.3 and 4 both take it. Version 3 calls a run that hit its time limit "Optimal", so the status is read
from the solution found (`sol_status`); version 4 answers with an object that tells the two apart.
"""

import importlib
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from placer.core.errors import DependencyError

__all__ = ["Backend", "State", "run_program", "value_of"]

Backend = Literal["highs", "cbc"]
State = Literal["optimal", "feasible", "infeasible", "none"]
"""optimal: proven, to the gap asked for. feasible: stopped with a solution. none: stopped without one."""


def run_program(
    program: Any, backend: Backend, relative_gap: float, time_limit_s: float, *, warm_start: bool = False
) -> tuple[State, float | None]:
    """What came of one run on one thread, and the lower bound in the program's own unit (None where none was read).

    `warm_start` hands over the variables' initial values (`setInitialValue`, all of them). Raises DependencyError where
    CBC is not installed.
    """
    import pulp

    with tempfile.TemporaryDirectory(prefix="placer-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "cbc.log"
        options = {"msg": False, "timeLimit": time_limit_s, "gapRel": relative_gap, "threads": 1}
        if backend == "highs":
            solver = _warm_highs(options) if warm_start else pulp.HiGHS(**options)
        else:
            solver = pulp.COIN_CMD(path=_cbc_program(), logPath=str(log), warmStart=warm_start, **options)
        answer = program.solve(solver)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return _state(program, answer), _lower_bound(program, answer, text)


def value_of(variable: Any) -> float:
    """Value of a variable in the solution; 0 for None, which stands for a variable that was left out."""
    import pulp

    return 0.0 if variable is None else float(pulp.value(variable) or 0.0)


def _warm_highs(options: dict[str, Any]) -> Any:
    """PuLP passes initial values to the HiGHS program only, not to its library; this does."""
    import pulp

    highspy = importlib.import_module("highspy")

    class WarmHighs(pulp.HiGHS):
        def callSolver(self, lp: Any) -> None:
            start = highspy.HighsSolution()
            start.col_value = [float(variable.varValue or 0.0) for variable in lp.variables()]
            lp.solverModel.setSolution(start)
            super().callSolver(lp)

    return WarmHighs(**options)


def _state(program: Any, answer: Any) -> State:
    if hasattr(answer, "has_solution"):  # PuLP 4
        if answer.has_solution:
            return "optimal" if answer.status.name == "Optimal" else "feasible"
        return "infeasible" if answer.status.name == "Infeasible" else "none"
    import pulp

    if program.status == pulp.LpStatusInfeasible:
        return "infeasible"
    states: dict[int, State] = {pulp.LpSolutionOptimal: "optimal", pulp.LpSolutionIntegerFeasible: "feasible"}
    return states.get(program.sol_status, "none")


def _lower_bound(program: Any, answer: Any, log: str) -> float | None:
    if getattr(answer, "best_bound", None) is not None:  # PuLP 4
        return float(answer.best_bound)
    if log:
        found = re.findall(r"^Lower bound:\s+(\S+)", log, flags=re.MULTILINE)
        return float(found[-1]) if found else None
    return float(program.solverModel.getInfo().mip_dual_bound)


def _cbc_program() -> str:
    if importlib.util.find_spec("cbcbox") is not None:
        return str(importlib.import_module("cbcbox").cbc_bin_path())
    if found := shutil.which("cbc"):
        return found
    raise DependencyError("CBC is not installed: pip install 'pulp[cbc]', or use the HiGHS back end")
