"""OrderResult: an order of one layer's items, how long it takes, a lower bound and who proved it."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.flowshop import run_in_order
from placer.core.device.items import Items, ItemTimes
from placer.core.errors import InfeasibleError
from placer.core.plan import relative_gap
from solvers.result import Status, StoppedBy

__all__ = ["OBJECTIVE", "OrderResult", "chains_of", "found_order", "infeasible_order", "refuse_unfit"]

IntArray = npt.NDArray[np.int64]

OBJECTIVE = "makespan_ns"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderResult:
    """One answer of one solver about one layer; fields as in SolveResult, in nanoseconds.

    `order_I` int64 (I,): indices of the items as they were given, in the order of execution; None where `status` is not
    "solved". `objective` is what `run_in_order` says of it, whatever the solver thought.
    """

    solver: str
    status: Status
    stopped_by: StoppedBy
    order_I: IntArray | None = None
    objective_name: str = OBJECTIVE
    objective: int | None = None
    bound: int | None = None
    bound_by: str = ""
    seconds: float = 0.0
    message: str = ""

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, or None where either is unknown."""
        return relative_gap(self.objective, self.bound)


def chains_of(items: Items) -> list[list[int]]:
    """The items of each expert (ascending ids), planes ascending: what every order keeps."""
    chains: dict[int, list[int]] = {}
    for item in np.lexsort([items.plane_I, items.expert_I]).tolist():
        chains.setdefault(int(items.expert_I[item]), []).append(item)
    return list(chains.values())


def refuse_unfit(items: Items, times: ItemTimes, buffer_bytes: int | None) -> None:
    """Raises InfeasibleError where one expert's missing planes do not fit; every other buffer has an order."""
    for chain in chains_of(items):
        need = int(times.bytes_I[chain].sum())
        if buffer_bytes is not None and need > buffer_bytes:
            raise InfeasibleError(
                f"expert {int(items.expert_I[chain[0]])} needs {need} bytes at once and the buffer has {buffer_bytes}; "
                "give a larger buffer, or keep fewer planes resident"
            )


def found_order(
    solver: str,
    items: Items,
    times: ItemTimes,
    order_I: IntArray,
    buffer_bytes: int | None,
    *,
    started: float,
    bound: int | None = None,
    bound_by: str = "",
    otherwise: StoppedBy = "effort",
) -> OrderResult:
    """The result of an order, run anew: "optimal" where it meets the bound, else stopped by `otherwise`.

    Without a bound the solver vouches for its order itself.
    """
    objective = run_in_order(items.taken(order_I), times.taken(order_I), buffer_bytes).makespan_ns
    if bound is None:
        bound, bound_by = objective, solver
    return OrderResult(
        solver=solver,
        status="solved",
        stopped_by="optimal" if bound >= objective else otherwise,
        order_I=order_I,
        objective=objective,
        bound=min(bound, objective),
        bound_by=bound_by,
        seconds=time.perf_counter() - started,
    )


def infeasible_order(solver: str, error: InfeasibleError, started: float) -> OrderResult:
    """The result where no order exists."""
    return OrderResult(
        solver=solver,
        status="infeasible",
        stopped_by="infeasible",
        seconds=time.perf_counter() - started,
        message=str(error),
    )
