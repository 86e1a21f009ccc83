"""Exact orders with CP-SAT, buffer limit and second hop included; of one layer, or of a few read ahead of each other.

The model is in `cpsat_model`. Legend: I items.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.items import Items, ItemTimes
from placer.core.errors import InfeasibleError, SolverError, UsageError
from solvers.exact.isolate import run_isolated
from solvers.io_order.cpsat_model import CpsatOrders, search_orders
from solvers.io_order.layers import LayerLoad, read_ahead_bound_ns, run_layers
from solvers.io_order.result import OrderResult, found_order, infeasible_order, refuse_unfit

__all__ = ["LayersResult", "solve_by_cpsat", "solve_layers_by_cpsat"]

IntArray = npt.NDArray[np.int64]

NAME = "cpsat"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersResult:
    """Orders of several layers, when the last of them ends (`run_layers`), and the soonest that it could."""

    orders: tuple[IntArray, ...]
    objective: int
    bound: int

    @property
    def proven(self) -> bool:
        """Whether no orders are better."""
        return self.objective == self.bound


def solve_by_cpsat(
    items: Items,
    times: ItemTimes,
    *,
    buffer_bytes: int | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    isolated: bool = True,
) -> OrderResult:
    """The order of one layer that ends soonest, and the bound that CP-SAT proved.

    `isolated` runs it in a process that is killed at 1.5 times the limit plus 5 seconds; without, it runs here, which
    saves a second on small cases. Status "infeasible" where one expert does not fit the buffer, "error" where nothing
    was found in time. Complexity: I^2 booleans; NP-hard with a buffer limit or a copy. Proves 12 items in a second.
    """
    started = time.perf_counter()
    try:
        refuse_unfit(items, times, buffer_bytes)
    except InfeasibleError as error:
        return infeasible_order(NAME, error, started)
    loads = [LayerLoad(items=items, times=times)]
    try:
        answer = _search(loads, 0, buffer_bytes, time_limit_s, seed, isolated=isolated)
    except SolverError as error:
        return OrderResult(
            solver=NAME,
            status="error",
            stopped_by="time_limit",
            seconds=time.perf_counter() - started,
            message=str(error),
        )
    bound = max(answer.bound, read_ahead_bound_ns(loads, ahead=0))
    return found_order(
        NAME,
        items,
        times,
        answer.orders[0],
        buffer_bytes,
        started=started,
        bound=bound,
        bound_by=NAME,
        otherwise="time_limit",
    )


def solve_layers_by_cpsat(
    layers: Sequence[LayerLoad],
    *,
    ahead: int | None,
    buffer_bytes: int | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    isolated: bool = True,
) -> LayersResult:
    """The orders with which a few layers end soonest when the disk may read ahead; for two or three small layers.

    Raises InfeasibleError where one expert does not fit the buffer, SolverError where nothing was found in time,
    UsageError for an `ahead` below 0.
    """
    if ahead is not None and ahead < 0:
        raise UsageError(f"ahead is {ahead}; give layers to read ahead, 0 or more, or None for all")
    for load in layers:
        refuse_unfit(load.items, load.times, buffer_bytes)
    answer = _search(layers, ahead, buffer_bytes, time_limit_s, seed, isolated=isolated)
    objective = run_layers(layers, answer.orders, ahead=ahead, buffer_bytes=buffer_bytes)
    bound = min(objective, max(answer.bound, read_ahead_bound_ns(layers, ahead=ahead)))
    return LayersResult(orders=answer.orders, objective=objective, bound=bound)


def _search(
    layers: Sequence[LayerLoad],
    ahead: int | None,
    buffer_bytes: int | None,
    time_limit_s: float,
    seed: int,
    *,
    isolated: bool,
) -> CpsatOrders:
    arguments = (list(layers), ahead, buffer_bytes, time_limit_s, seed)
    answer = (
        run_isolated(search_orders, arguments, time_limit_s=time_limit_s) if isolated else search_orders(*arguments)
    )
    if not answer.orders:
        raise SolverError(f"CP-SAT found no order ({answer.state}); give it more time or fewer items")
    return answer
