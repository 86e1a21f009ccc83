"""Multiple-choice knapsack: one option for every class, the least sum of costs within a byte budget and a loss limit.

Without a loss limit the linear relaxation is solved exactly by the greedy walk along every class's lower convex hull
(Sinha and Zoltners, Operations Research 27, 1979; Kellerer, Pferschy, Pisinger, Knapsack Problems, section 11.2); a
loss limit enters by a price that is found by bisection, and the best of these values is the relaxation's with both.
Legend: C classes, O options (an option with bytes below 0 is not there), S steps along the hulls.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from placer.core.plan import relative_gap
from solvers.result import Status, StoppedBy

__all__ = ["Knapsack", "KnapsackResult", "relaxation", "solve_greedy"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BISECTIONS = 40
MOST_DOUBLINGS = 60
SWAP_WINDOW = 256
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Knapsack:
    """Exactly one option of every class: bytes within `most_bytes`, loss within `most_loss` (None: no limit).

    cost_CO is what is to be as small as possible; loss_CO is only read where there is a limit.
    """

    bytes_CO: IntArray
    cost_CO: FloatArray
    most_bytes: int
    loss_CO: FloatArray | None = None
    most_loss: float | None = None

    def __post_init__(self) -> None:
        if self.cost_CO.shape != self.bytes_CO.shape or self.bytes_CO.ndim != 2:
            raise UsageError(
                f"knapsack.cost_CO is {self.cost_CO.shape}, bytes_CO {self.bytes_CO.shape}; give one shape"
            )
        if not (self.bytes_CO >= 0).any(axis=1).all():
            raise UsageError("knapsack.bytes_CO has a class without options; give every class at least one")
        if self.most_loss is not None and (self.loss_CO is None or self.loss_CO.shape != self.bytes_CO.shape):
            raise UsageError(
                f"knapsack.most_loss is {self.most_loss} without a loss_CO of {self.bytes_CO.shape}; give it"
            )

    def total(self, table_CO: FloatArray | IntArray, choice_C: IntArray) -> float:
        """A table's sum over the options chosen."""
        return float(table_CO[np.arange(len(choice_C)), choice_C].sum())

    def fits(self, choice_C: IntArray) -> bool:
        """Whether options keep both limits."""
        if self.total(self.bytes_CO, choice_C) > self.most_bytes:
            return False
        if self.most_loss is None or self.loss_CO is None:
            return True
        return self.total(self.loss_CO, choice_C) <= self.most_loss + TOLERANCE * max(1.0, abs(self.most_loss))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KnapsackResult:
    """One answer: the option of every class (None without one), its cost and a lower bound on the least cost.

    Words as in `solvers.result`; bound <= least cost <= objective.
    """

    solver: str
    status: Status
    stopped_by: StoppedBy
    choice_C: IntArray | None = None
    objective: float | None = None
    bound: float | None = None
    bound_by: str = ""
    seconds: float = 0.0
    message: str = ""

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, or None where either is unknown."""
        return relative_gap(self.objective, self.bound)


def relaxation(problem: Knapsack) -> float:
    """The value of the linear relaxation, a lower bound on every choice within the limits; inf where none exists.

    Complexity: O(C O^2 + S log S), with a loss limit times about 50. Guarantee: exact to 1e-6 or so, never above the
    optimum.
    """
    return _priced(problem)[0]


def solve_greedy(problem: Knapsack) -> KnapsackResult:
    """The hull walk made whole, then single changes and exchanges of two classes; with the relaxation as its bound.

    Complexity: the relaxation's, and O(C O + 256^2) a pass of exchanges. Guarantee: without a loss limit, no worse than
    the optimum by more than the largest single step of a hull; with one there is none. Deterministic.
    """
    started = time.perf_counter()
    bound, walks = _priced(problem)
    if not np.isfinite(bound):
        return KnapsackResult(
            solver="greedy",
            status="infeasible",
            stopped_by="infeasible",
            seconds=time.perf_counter() - started,
            message="the smallest options do not fit the limits; raise the budget or the loss limit",
        )
    best_C: IntArray | None = None
    best = np.inf
    limited = problem.most_loss is not None
    loss_CO = problem.loss_CO if limited and problem.loss_CO is not None else np.zeros(problem.cost_CO.shape)
    most_loss = problem.most_loss if limited and problem.most_loss is not None else np.inf
    for choice_C in walks:
        if not problem.fits(choice_C):
            continue
        _improve(problem.bytes_CO, problem.cost_CO, loss_CO, choice_C, problem.most_bytes, most_loss)
        cost = problem.total(problem.cost_CO, choice_C)
        if cost < best and problem.fits(choice_C):
            best, best_C = cost, choice_C
    seconds = time.perf_counter() - started
    if best_C is None:
        message = "no options found within both limits, though none are proven not to exist; try cpsat"
        return KnapsackResult(
            solver="greedy", status="error", stopped_by="effort", bound=bound, bound_by="lp", seconds=seconds,
            message=message,
        )  # fmt: skip
    proven = best - bound <= TOLERANCE * max(1.0, abs(best))
    return KnapsackResult(
        solver="greedy",
        status="solved",
        stopped_by="optimal" if proven else "effort",
        choice_C=best_C,
        objective=best,
        bound=min(bound, best),
        bound_by="lp",
        seconds=seconds,
    )


def _priced(problem: Knapsack) -> tuple[float, list[IntArray]]:
    """The relaxation's value (inf: infeasible), and whole choices near its solutions, the likeliest last."""
    bytes_CO, cost_CO = problem.bytes_CO, problem.cost_CO
    if problem.most_loss is None or problem.loss_CO is None:
        value, choice_C, _ = _walk(bytes_CO, cost_CO, cost_CO, problem.most_bytes)
        return value, [] if choice_C is None else [choice_C]
    loss_CO, most_loss = problem.loss_CO, problem.most_loss
    least_loss, safest_C, _ = _walk(bytes_CO, loss_CO, loss_CO, problem.most_bytes)
    slack = TOLERANCE * max(1.0, abs(most_loss))
    if safest_C is None or least_loss > most_loss + slack:
        return np.inf, []
    walks = [safest_C]

    def at(price: float) -> tuple[float, float]:
        value, choice_C, loss = _walk(bytes_CO, cost_CO + price * loss_CO, loss_CO, problem.most_bytes)
        assert choice_C is not None
        if problem.fits(choice_C):
            walks.append(choice_C)
        return value - price * most_loss, loss

    best, loss = at(0.0)
    if loss <= most_loss:
        return best, walks[-2:]
    spread = float(np.ptp(cost_CO[bytes_CO >= 0])) / max(float(np.abs(loss_CO).max()), 1e-300)
    low, high = 0.0, max(spread, 1e-12)
    for _ in range(MOST_DOUBLINGS):
        value, loss = at(high)
        best = max(best, value)
        if loss <= most_loss:
            break
        low, high = high, 4 * high
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high) if low else high / 16
        value, loss = at(middle)
        best = max(best, value)
        low, high = (low, middle) if loss <= most_loss else (middle, high)
    return best, [safest_C, *walks[-4:]]


def _walk(
    bytes_CO: IntArray, cost_CO: FloatArray, loss_CO: FloatArray, most_bytes: int
) -> tuple[float, IntArray | None, float]:
    """Least relaxed cost (inf: nothing fits), a whole choice near it, and `loss_CO` of the relaxed solution."""
    start_C, class_S, option_S, bytes_S, gain_S = _hull_steps(bytes_CO, cost_CO)
    rows = np.arange(len(start_C))
    room = most_bytes - int(bytes_CO[rows, start_C].sum())
    if room < 0:
        return np.inf, None, np.inf
    order = np.argsort(-gain_S / bytes_S, kind="stable")
    class_S, option_S, bytes_S, gain_S = class_S[order], option_S[order], bytes_S[order], gain_S[order]
    total_S = np.cumsum(bytes_S)
    whole = int(np.searchsorted(total_S, room, side="right"))
    choice_C = start_C.copy()
    # later steps of a class have higher options' indices along the order, so the last assignment wins
    choice_C[class_S[:whole]] = option_S[:whole]
    value = float(cost_CO[rows, choice_C].sum())
    loss = float(loss_CO[rows, choice_C].sum())
    if whole < len(class_S):
        share = (room - (int(total_S[whole - 1]) if whole else 0)) / float(bytes_S[whole])
        at = int(class_S[whole])
        value -= share * float(gain_S[whole])
        loss += share * float(loss_CO[at, option_S[whole]] - loss_CO[at, choice_C[at]])
        left = room - (int(total_S[whole - 1]) if whole else 0)
        _fill(choice_C, class_S[whole:], option_S[whole:], bytes_S[whole:], left)
    return value, choice_C, loss


@njit(cache=True)
def _hull_steps(
    bytes_CO: IntArray, cost_CO: FloatArray
) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatArray]:  # pragma: no cover - compiled
    """The smallest option of each class, and the steps along its lower hull: class, option, more bytes, less cost."""
    classes, options = bytes_CO.shape
    start_C = np.zeros(classes, dtype=np.int64)
    class_S = np.empty(classes * options, dtype=np.int64)
    option_S, bytes_S = np.empty_like(class_S), np.empty_like(class_S)
    gain_S = np.empty(classes * options)
    steps = 0
    hull = np.empty(options, dtype=np.int64)
    for row in range(classes):
        size = 0
        order = np.argsort(bytes_CO[row], kind="mergesort")
        for option in order:
            weight, cost = bytes_CO[row, option], cost_CO[row, option]
            if weight < 0:
                continue
            if size and cost >= cost_CO[row, hull[size - 1]]:
                continue
            if size and weight == bytes_CO[row, hull[size - 1]]:
                size -= 1
            while size >= 2:
                a, b = hull[size - 2], hull[size - 1]
                left = (cost_CO[row, a] - cost_CO[row, b]) * (weight - bytes_CO[row, b])
                right = (cost_CO[row, b] - cost) * (bytes_CO[row, b] - bytes_CO[row, a])
                if left > right:
                    break
                size -= 1
            hull[size] = option
            size += 1
        start_C[row] = hull[0]
        for at in range(1, size):
            class_S[steps], option_S[steps] = row, hull[at]
            bytes_S[steps] = bytes_CO[row, hull[at]] - bytes_CO[row, hull[at - 1]]
            gain_S[steps] = cost_CO[row, hull[at - 1]] - cost_CO[row, hull[at]]
            steps += 1
    return start_C, class_S[:steps], option_S[:steps], bytes_S[:steps], gain_S[:steps]


@njit(cache=True)
def _fill(
    choice_C: IntArray, class_S: IntArray, option_S: IntArray, bytes_S: IntArray, room: int
) -> None:  # pragma: no cover - compiled
    """Goes on along the steps that still fit; a class whose step does not fit takes no later one."""
    closed_C = np.zeros(len(choice_C), dtype=np.bool_)
    for step in range(len(class_S)):
        row = class_S[step]
        if closed_C[row]:
            continue
        if bytes_S[step] <= room:
            room -= bytes_S[step]
            choice_C[row] = option_S[step]
        else:
            closed_C[row] = True


@njit(cache=True)
def _improve(
    bytes_CO: IntArray, cost_CO: FloatArray, loss_CO: FloatArray, choice_C: IntArray, most_bytes: int, most_loss: float
) -> None:  # pragma: no cover - compiled
    """Changes one class, or two at once, as long as that lowers the cost within both limits."""
    classes, options = bytes_CO.shape
    used, loss = 0, 0.0
    for row in range(classes):
        used += bytes_CO[row, choice_C[row]]
        loss += loss_CO[row, choice_C[row]]
    moves = np.empty((classes * options, 2), dtype=np.int64)
    rate = np.empty(classes * options)
    for _ in range(classes * options):
        changed = False
        for row in range(classes):
            for option in range(options):
                now = choice_C[row]
                more = bytes_CO[row, option] - bytes_CO[row, now]
                worse = loss_CO[row, option] - loss_CO[row, now]
                if bytes_CO[row, option] < 0 or cost_CO[row, option] >= cost_CO[row, now]:
                    continue
                if used + more <= most_bytes and loss + worse <= most_loss:
                    choice_C[row] = option
                    used, loss, changed = used + more, loss + worse, True
        # the dearest byte given back, the cheapest byte taken: exchanges among those near the margin
        gives, takes = 0, 0
        give = np.empty((classes * options, 2), dtype=np.int64)
        give_rate = np.empty(classes * options)
        for row in range(classes):
            now = choice_C[row]
            for option in range(options):
                if bytes_CO[row, option] < 0 or option == now:
                    continue
                more, gain = bytes_CO[row, option] - bytes_CO[row, now], cost_CO[row, now] - cost_CO[row, option]
                if gain > 0:
                    moves[takes, 0], moves[takes, 1] = row, option
                    rate[takes] = -gain / max(more, 1)
                    takes += 1
                else:
                    give[gives, 0], give[gives, 1] = row, option
                    give_rate[gives] = -gain / max(-more, 1) if more <= 0 else 1e300
                    gives += 1
        take_order = np.argsort(rate[:takes], kind="mergesort")[:SWAP_WINDOW]
        give_order = np.argsort(give_rate[:gives], kind="mergesort")[:SWAP_WINDOW]
        for taken in take_order:
            row, option = moves[taken]
            for given in give_order:
                other, back = give[given]
                if row == other:
                    continue
                gain = cost_CO[row, choice_C[row]] - cost_CO[row, option]
                gain += cost_CO[other, choice_C[other]] - cost_CO[other, back]
                more = bytes_CO[row, option] - bytes_CO[row, choice_C[row]]
                more += bytes_CO[other, back] - bytes_CO[other, choice_C[other]]
                worse = loss_CO[row, option] - loss_CO[row, choice_C[row]]
                worse += loss_CO[other, back] - loss_CO[other, choice_C[other]]
                if gain > 1e-12 * (1 + abs(gain)) and used + more <= most_bytes and loss + worse <= most_loss:
                    choice_C[row], choice_C[other] = option, back
                    used, loss, changed = used + more, loss + worse, True
        if not changed:
            break
