"""The best path through layers under a cap on a second cost: a price on it, then the labels that no price rules out.

Layer l is in one of B states. A path earns gain[l, a, b] from a to b and pays cost[l, b]; the sum of costs is capped.

Price.  For p >= 0, max over paths of gain - p (cost - cap) is at least every gain under the cap. The least of these
        over p is found by going to where the best paths left and right of the cap are worth the same, until no path is
        worth more there (a piecewise linear convex function of one variable: finitely many steps).
Labels. Partial paths (gain, cost) per state, without those that another of the same state beats in both, and without
        those that no priced best completion lifts above the best path known. Where they grow too many, those with the
        best prospects are kept and the others' prospects remain in the bound.

Legend: L layers, B states (a and b of neighbouring layers), N labels, I prices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["CappedPath", "best_path", "capped_path", "least_cost"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SLACK = 1e-9
"""Rounding that sums of prices may carry, relative to the gain."""

PRICE_FACTORS = (1.0, 0.0, 0.25, 0.5, 0.75, 0.9, 1.1, 1.3, 1.7, 2.5, 4.0)
"""A partial path that has spent more or less than its share is best judged at another price; any price is valid."""

LABEL_LIMITS = (300, 5_000)
"""Labels kept a layer: a quick pass that finds good paths, and one that proves."""


@dataclass(frozen=True, slots=True)
class CappedPath:
    """A path under the cap, its gain, and `bound`: no path under the cap gains more."""

    state_L: IntArray
    gain: int
    bound: int


def best_path(gain_LBB: IntArray, reward_LB: FloatArray | IntArray) -> tuple[IntArray, FloatArray | IntArray]:
    """The states (L,) with the largest sum of gains and rewards, and per state the best of what follows it (L, B).

    `reward_LB` is earned in each state and not part of its own row of what follows. O(L B^2).
    """
    layers = len(reward_LB)
    follows_LB = np.zeros_like(reward_LB)
    for layer in range(layers - 2, -1, -1):
        follows_LB[layer] = (gain_LBB[layer] + (reward_LB[layer + 1] + follows_LB[layer + 1])).max(axis=1)
    state_L = np.zeros(layers, dtype=np.int64)
    state_L[0] = (reward_LB[0] + follows_LB[0]).argmax()
    for layer in range(layers - 1):
        worth_B = gain_LBB[layer, state_L[layer]] + (reward_LB[layer + 1] + follows_LB[layer + 1])
        state_L[layer + 1] = worth_B.argmax()
    return state_L, follows_LB


def least_cost(cost_LB: FloatArray) -> float:
    """What every path pays at least."""
    return float(cost_LB.min(axis=1).sum())


def capped_path(
    gain_LBB: IntArray, cost_LB: FloatArray, cap: float, progress: Callable[[int, int], None] | None = None
) -> CappedPath:
    """The path with the largest gain whose costs add up to at most `cap`, which must be at least `least_cost`.

    `gain_LBB` int64 (L - 1, B, B) from the state of a layer to that of the next, `cost_LB` float64 (L, B).
    Guarantee: gain <= optimum <= bound; equal unless labels had to be dropped. Complexity: O(L B^2) a price, then at
    most the last of LABEL_LIMITS times B labels a layer.
    """
    free_L, _ = best_path(gain_LBB, np.zeros(cost_LB.shape, dtype=np.int64))
    gain, cost = _worth(gain_LBB, cost_LB, free_L)
    if cost <= cap:
        return CappedPath(free_L, gain, gain)
    light_L = _cheapest(gain_LBB, cost_LB)
    price, within_L, bound = _best_price(gain_LBB, cost_LB, cap, (gain, cost), light_L)
    found = CappedPath(within_L, _worth(gain_LBB, cost_LB, within_L)[0], bound)
    price_I = price * np.array(PRICE_FACTORS)
    follows_ILB = np.array([best_path(gain_LBB, -p * cost_LB)[1] for p in price_I])
    for most in LABEL_LIMITS:
        if found.gain < found.bound:
            found = _labels(gain_LBB, cost_LB, cap, price_I, follows_ILB, found, most, progress)
    return found


def _worth(gain_LBB: IntArray, cost_LB: FloatArray, state_L: IntArray) -> tuple[int, float]:
    row = np.arange(len(state_L))
    return int(gain_LBB[row[:-1], state_L[:-1], state_L[1:]].sum()), float(cost_LB[row, state_L].sum())


def _cheapest(gain_LBB: IntArray, cost_LB: FloatArray) -> IntArray:
    """Of the paths of least cost in every layer the one with the largest gain."""
    dear_LB = cost_LB > cost_LB.min(axis=1, keepdims=True)
    state_L, _ = best_path(gain_LBB, np.where(dear_LB, -(int(gain_LBB.max(initial=0)) + 1) * len(cost_LB), 0))
    return state_L


def _best_price(
    gain_LBB: IntArray, cost_LB: FloatArray, cap: float, above: tuple[int, float], within_L: IntArray
) -> tuple[float, IntArray, int]:
    """The price of least bound, the best path under the cap met on the way, and the bound; `above` breaks the cap."""
    within = best = _worth(gain_LBB, cost_LB, within_L)
    best_L = within_L
    while True:
        price = max(0.0, (above[0] - within[0]) / (above[1] - within[1]))
        state_L, _ = best_path(gain_LBB, -price * cost_LB)
        gain, cost = _worth(gain_LBB, cost_LB, state_L)
        if cost <= cap and gain > best[0]:
            best, best_L = (gain, cost), state_L
        worth, line = gain - price * cost, above[0] - price * above[1]
        if worth <= line + SLACK * max(1.0, abs(line)) or cost in (above[1], within[1]):
            return price, best_L, max(best[0], _whole(worth + price * cap))
        if cost <= cap:
            within = (gain, cost)
        else:
            above = (gain, cost)


def _whole(bound: float) -> int:
    return int(np.floor(bound + SLACK * max(1.0, abs(bound))))


def _labels(
    gain_LBB: IntArray,
    cost_LB: FloatArray,
    cap: float,
    price_I: FloatArray,
    follows_ILB: FloatArray,
    known: CappedPath,
    most: int,
    progress: Callable[[int, int], None] | None,
) -> CappedPath:
    """One pass with at most `most` labels a layer, which looks for paths that gain more than the one known."""
    layers, states = cost_LB.shape
    cheapest_L = np.append(np.cumsum(cost_LB.min(axis=1)[::-1])[::-1], 0.0)
    # before the first layer there is one label, in a state from which nothing is gained
    gain_N, cost_N, state_N = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64)
    nothing_BB = np.zeros((states, states), dtype=np.int64)
    dropped = known.gain
    backs: list[tuple[IntArray, IntArray]] = []
    for layer in range(layers):
        parent_N, state_N, gain_N, cost_N, hope_N = _extend(
            gain_N,
            cost_N,
            state_N,
            gain_LBB[layer - 1] if layer else nothing_BB,
            cost_LB[layer],
            price_I,
            np.ascontiguousarray(follows_ILB[:, layer]),
            cap,
            cap - cheapest_L[layer + 1],
            known.gain + 1.0,
        )
        alive = _undominated(np.argsort(cost_N, kind="stable"), state_N, gain_N, states)
        if len(alive) > most:
            alive = alive[np.argsort(-hope_N[alive], kind="stable")]
            dropped = max(dropped, int(hope_N[alive[most]]))
            alive = alive[:most]
        gain_N, cost_N, state_N = gain_N[alive], cost_N[alive], state_N[alive]
        backs.append((parent_N[alive], state_N))
        if progress is not None:
            progress(layer + 1, layers)
    if not len(gain_N):
        return CappedPath(known.state_L, known.gain, min(known.bound, dropped))
    last = int(gain_N.argmax())
    gain = int(gain_N[last])
    state_L = np.zeros(layers, dtype=np.int64)
    for layer in range(layers - 1, -1, -1):
        parent_N, state_N = backs[layer]
        state_L[layer], last = state_N[last], parent_N[last]
    return CappedPath(state_L, gain, min(known.bound, max(gain, dropped)))


@njit(cache=True)
def _extend(
    gain_N: IntArray,
    cost_N: FloatArray,
    state_N: IntArray,
    gain_BB: IntArray,
    cost_B: FloatArray,
    price_I: FloatArray,
    follows_IB: FloatArray,
    cap: float,
    most_cost: float,
    least_gain: float,
) -> tuple[IntArray, IntArray, IntArray, FloatArray, FloatArray]:  # pragma: no cover - compiled
    """Parent, state, gain, cost and prospects of the labels one layer on that may still gain `least_gain`."""
    states = len(cost_B)
    size = len(gain_N) * states
    parent = np.empty(size, dtype=np.int64)
    state = np.empty(size, dtype=np.int64)
    gain = np.empty(size, dtype=np.int64)
    cost = np.empty(size)
    hope = np.empty(size)
    count = 0
    for n in range(len(gain_N)):
        for b in range(states):
            paid = cost_N[n] + cost_B[b]
            if paid > most_cost:
                continue
            earned = gain_N[n] + gain_BB[state_N[n], b]
            best = np.inf
            for i in range(len(price_I)):
                after = earned + price_I[i] * (cap - paid) + follows_IB[i, b]
                best = min(best, np.floor(after + SLACK * max(1.0, abs(after))))
                if best < least_gain:
                    break
            if best >= least_gain:
                parent[count], state[count], gain[count], cost[count], hope[count] = n, b, earned, paid, best
                count += 1
    return parent[:count], state[:count], gain[:count], cost[:count], hope[:count]


@njit(cache=True)
def _undominated(order_N: IntArray, state_N: IntArray, gain_N: IntArray, states: int) -> IntArray:  # pragma: no cover
    """The labels, taken in `order_N` of rising cost, that gain more than every cheaper one of their state."""
    best_B = np.full(states, -1, dtype=np.int64)
    kept = np.empty(len(order_N), dtype=np.int64)
    count = 0
    for n in order_N:
        if gain_N[n] > best_B[state_N[n]]:
            best_B[state_N[n]] = gain_N[n]
            kept[count] = n
            count += 1
    return kept[:count]
