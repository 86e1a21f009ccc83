"""The best order by trying every order that keeps each expert's planes ascending: the oracle for a dozen items."""

import math
import time

import numpy as np

from placer.core.device.items import Items, ItemTimes
from placer.core.errors import InfeasibleError, UsageError
from solvers.io_order.result import OrderResult, chains_of, found_order, infeasible_order, refuse_unfit

__all__ = ["MOST_ORDERS", "number_of_orders", "solve_exhaustively"]

NAME = "exhaustive"
MOST_ORDERS = 2_000_000

Releases = tuple[tuple[int, int], ...]
"""When experts were done and the bytes they gave back, those not taken up yet."""


def number_of_orders(items: Items) -> int:
    """Orders of the items that keep each expert's planes ascending: I! / (K_1! K_2! ...)."""
    count = math.factorial(len(items))
    for chain in chains_of(items):
        count //= math.factorial(len(chain))
    return count


def solve_exhaustively(items: Items, times: ItemTimes, *, buffer_bytes: int | None = None) -> OrderResult:
    """The best of all orders, with a copy and with a buffer limit too; the first found of equals.

    An order is left as soon as it takes as long as the best so far. Status "infeasible" where one expert does not fit.
    Complexity: O(I! / (K_1! K_2! ...)). Raises UsageError for more than MOST_ORDERS orders.
    """
    started = time.perf_counter()
    if (orders := number_of_orders(items)) > MOST_ORDERS:
        raise UsageError(f"{len(items)} items have {orders} orders, above the {MOST_ORDERS} that are tried; use cpsat")
    try:
        refuse_unfit(items, times, buffer_bytes)
    except InfeasibleError as error:
        return infeasible_order(NAME, error, started)
    search = _Search(items, times, buffer_bytes)
    search.go(0, 0, 0, 0, ())
    return found_order(NAME, items, times, np.array(search.best, dtype=np.int64), buffer_bytes, started=started)


class _Search:
    """Depth first over the experts' next planes."""

    def __init__(self, items: Items, times: ItemTimes, buffer_bytes: int | None) -> None:
        self.chains = chains_of(items)
        self.room = int(times.bytes_I.sum()) if buffer_bytes is None else buffer_bytes
        columns = (times.read_ns_I, times.copy_ns_I, times.compute_ns_I, times.bytes_I)
        self.item = list(zip(*(column.tolist() for column in columns), strict=True))
        self.whole = [int(times.bytes_I[chain].sum()) for chain in self.chains]
        self.at = [0] * len(self.chains)
        self.path: list[int] = []
        self.best: list[int] = []
        self.least = math.inf

    def go(self, disk: int, copier: int, processor: int, held: int, released: Releases) -> None:
        """Every way on from here; `held` bytes are in the buffer or about to be given back by `released`."""
        if processor >= self.least:
            return
        if len(self.path) == len(self.item):
            self.least, self.best = processor, list(self.path)
            return
        for expert, chain in enumerate(self.chains):
            if self.at[expert] == len(chain):
                continue
            item = chain[self.at[expert]]
            read, copy, compute, size = self.item[item]
            now, begin, end, left, ready = held, disk, copier, released, 0
            if size:
                while now + size > self.room and left:
                    begin, now, left = max(begin, left[0][0]), now - left[0][1], left[1:]
                if now + size > self.room:
                    continue
                now, begin = now + size, begin + read
                ready = end = max(end, begin) + copy
            done = max(processor, ready) + compute
            self.at[expert] += 1
            if self.at[expert] == len(chain):
                left = (*left, (done, self.whole[expert]))
            self.path.append(item)
            self.go(begin, end, done, now, left)
            self.path.pop()
            self.at[expert] -= 1
