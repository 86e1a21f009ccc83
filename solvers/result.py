"""What every solver returns: whether it solved, why it stopped, the placement, a lower bound and who proved it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.plan import relative_gap

__all__ = ["SolveResult", "Status", "StoppedBy"]

Status = Literal["solved", "infeasible", "error"]
"""solved: there is a placement. infeasible: proven that none exists. error: the back end failed; see `message`."""

StoppedBy = Literal["optimal", "gap", "time_limit", "effort", "interrupt", "infeasible", "error"]
"""optimal: proven. gap: the gap asked for was reached. effort: a heuristic finished its moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """One answer of one solver.

    `slot_expert_LP` int64 (layers, slots), contiguous blocks of slots per rank; None where `status` is not "solved".
    `objective` and `bound` are in the unit `objective_name` says (lower is better; bound <= every feasible objective).
    `replica_share_LP` as in placer.core.Plan. `certificate` proves `bound` to anybody (None: a closed form, or inside a
    back end; `bound_by` says which). `trail` says who improved what, in order. `seconds` is wall time, reported but
    never written to a plan.
    """

    solver: str
    status: Status
    stopped_by: StoppedBy
    slot_expert_LP: npt.NDArray[np.int64] | None = None
    replica_share_LP: npt.NDArray[np.float64] | None = None
    objective_name: str = ""
    objective: float | None = None
    bound: float | None = None
    bound_by: str = ""
    seconds: float = 0.0
    message: str = ""
    certificate: Certificate | None = None
    trail: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, or None where either is unknown."""
        return relative_gap(self.objective, self.bound)
