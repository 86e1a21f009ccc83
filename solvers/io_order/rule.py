"""Any rule's order of a layer with a bound on all orders; chain-Johnson's is often the optimum."""

import time

import numpy as np

from placer.core.device.buffer import fitting_order
from placer.core.device.flowshop import makespan_bound_ns
from placer.core.device.items import Items, ItemTimes, OrderRule, order_items
from placer.core.errors import InfeasibleError
from solvers.io_order.result import OrderResult, found_order, infeasible_order

__all__ = ["lag_bound_ns", "solve_by_rule"]


def solve_by_rule(
    items: Items, times: ItemTimes, rule: OrderRule = "johnson", *, buffer_bytes: int | None = None
) -> OrderResult:
    """The order that a device with this rule runs (`fitting_order` included), and a bound on every order.

    Returns stopped_by "optimal" where the order meets the bound, which chain-Johnson always does without a copy and
    without a buffer limit; else "effort". Status "infeasible" where one expert does not fit the buffer.
    Complexity: O(I log I), and `fitting_order`.
    """
    started = time.perf_counter()
    order_I = order_items(items, rule, times)
    if buffer_bytes is not None:
        try:
            order_I = fitting_order(items, times, order_I, buffer_bytes)
        except InfeasibleError as error:
            return infeasible_order(rule, error, started)
    bound, bound_by = max((makespan_bound_ns(times), "machines"), (lag_bound_ns(items, times), "johnson"))
    return found_order(rule, items, times, order_I, buffer_bytes, started=started, bound=bound, bound_by=bound_by)


def lag_bound_ns(items: Items, times: ItemTimes) -> int:
    """What the best order takes when any number of copies may run at once and the buffer has no end.

    No order of the real device ends sooner; without a copy and a buffer limit it is the optimum. An item's copy is then
    a delay between its read and its computing, and Johnson's rule on read + copy and copy + compute is exact (L. G.
    Mitten 1959). Complexity: O(I log I).
    """
    if not len(items):
        return 0
    order_I = order_items(items, "johnson", times)
    read_I, copy_I, compute_I = times.read_ns_I[order_I], times.copy_ns_I[order_I], times.compute_ns_I[order_I]
    from_here_I = np.cumsum(compute_I[::-1])[::-1]
    return int((np.cumsum(read_I) + copy_I + from_here_I).max())
