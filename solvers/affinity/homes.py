"""Source ranks of requests: every request's attention where its experts are, with balanced tokens per rank.

    maximise sum_q touch[q, home_q]   s.t.   tokens of the requests at home on a rank <= (1 + slack) * mean

touch[q, r] counts, over layers, the tokens of request q that touch rank r: the copies saved when q lives on r. It is a
generalised assignment problem: its relaxation, in which a request may be divided, is a min-cost flow that divides at
most R - 1 requests, so rounding it leaves little for a descent by moves and swaps to mend.

Legend: Q requests, R ranks.
"""

import numpy as np
import numpy.typing as npt
from numba import njit
from ortools.graph.python import min_cost_flow

from placer.core.errors import UsageError

__all__ = ["assign_homes", "touches_at_home"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

COST_STEPS = 1e6
MOST_PASSES = 50


def assign_homes(
    touch_QR: npt.NDArray[np.number], tokens_Q: npt.NDArray[np.integer], num_ranks: int, slack: float
) -> IntArray:
    """Home rank of every request, (Q,).

    No rank is home to more than (1 + slack) * mean tokens, or, where whole requests do not fit so, to more than
    longest-first packing of the requests puts on its fullest rank.

    Guarantee: optimal where all requests have equally many tokens; elsewhere no move and no swap helps. Deterministic.
    Complexity: min-cost flow of Q R arcs, then O(Q (Q + R)) a pass. Raises UsageError for arrays that do not match,
    negative entries or a slack that is none.
    Reference: Sem-MoE's request scheduling (arXiv 2503.04398, Algorithm 1) asks the same of a greedy.
    """
    touch, tokens = np.asarray(touch_QR, dtype=np.float64), np.asarray(tokens_Q, dtype=np.int64)
    if tokens.ndim != 1 or touch.shape != (len(tokens), num_ranks):
        raise UsageError(f"touch_QR is {touch.shape}; {len(tokens)} requests on {num_ranks} ranks need that shape")
    if not (np.isfinite(touch).all() and (touch >= 0).all() and (tokens >= 0).all()):
        raise UsageError("touch_QR or tokens_Q has an entry below 0 or not finite; give counts")
    if not (np.isfinite(slack) and slack >= 0):
        raise UsageError(f"slack is {slack!r}; give a share of the mean tokens per rank, 0 or more")
    if not tokens.any():
        return np.arange(len(tokens), dtype=np.int64) % num_ranks
    packed_Q = _longest_first(tokens, num_ranks)
    fullest = int(np.bincount(packed_Q, weights=tokens, minlength=num_ranks).max())
    cap = max(int((1 + slack) * tokens.sum() / num_ranks + 1e-9), fullest)
    found = [_descend(start_Q, touch, tokens, cap) for start_Q in (packed_Q, _rounded_flow(touch, tokens, cap))]
    fits = [np.bincount(rank_Q, weights=tokens, minlength=num_ranks).max() <= cap for rank_Q in found]
    worth = [touches_at_home(touch, rank_Q) if fit else -1.0 for rank_Q, fit in zip(found, fits, strict=True)]
    return found[1] if worth[1] >= worth[0] else found[0]


def touches_at_home(touch_QR: npt.NDArray[np.number], rank_Q: IntArray) -> float:
    """What assign_homes maximises: sum over requests of the touches of their home."""
    return float(touch_QR[np.arange(len(rank_Q)), rank_Q].sum())


def _longest_first(tokens_Q: IntArray, num_ranks: int) -> IntArray:
    rank_Q = np.empty(len(tokens_Q), dtype=np.int64)
    load_R = np.zeros(num_ranks, dtype=np.int64)
    for request in np.argsort(-tokens_Q, kind="stable"):
        rank_Q[request] = load_R.argmin()
        load_R[rank_Q[request]] += tokens_Q[request]
    return rank_Q


def _rounded_flow(touch_QR: FloatArray, tokens_Q: IntArray, cap: int) -> IntArray:
    """The relaxation's homes, a divided request where most of it went, then out of ranks that are too full."""
    requests, ranks = touch_QR.shape
    unit = int(np.gcd.reduce(tokens_Q))  # equal requests become units, and the flow whole
    supply_Q = tokens_Q // unit
    worth_QR = touch_QR / np.maximum(1, supply_Q)[:, None]
    scale = max(1, int(COST_STEPS / max(1.0, worth_QR.max())))
    cost_QR = np.rint((worth_QR.max() - worth_QR) * scale).astype(np.int64)
    solver = min_cost_flow.SimpleMinCostFlow()
    request, rank = (index.ravel() for index in np.indices((requests, ranks)))
    arcs = solver.add_arcs_with_capacity_and_unit_cost(request, requests + rank, supply_Q[request], cost_QR.ravel())
    sink = requests + ranks
    into = np.full(ranks, cap // unit)
    solver.add_arcs_with_capacity_and_unit_cost(requests + np.arange(ranks), np.full(ranks, sink), into, into * 0)
    solver.set_nodes_supplies(np.arange(requests), supply_Q)
    solver.set_node_supply(sink, -int(supply_Q.sum()))
    assert solver.solve() == solver.OPTIMAL
    flow_QR = np.array(solver.flows(arcs), dtype=np.int64).reshape(requests, ranks)
    rank_Q = flow_QR.argmax(axis=1).astype(np.int64)
    load_R = np.bincount(rank_Q, weights=tokens_Q, minlength=ranks).astype(np.int64)
    for full in np.flatnonzero(load_R > cap):
        leaving = np.flatnonzero(rank_Q == full)
        loss_QR = touch_QR[leaving, full][:, None] - touch_QR[leaving]
        for place in np.argsort((loss_QR / np.maximum(1, tokens_Q[leaving])[:, None]).ravel(), kind="stable"):
            mover, target = leaving[place // ranks], int(place % ranks)
            room = target != full and load_R[target] + tokens_Q[mover] <= cap
            if load_R[full] > cap and rank_Q[mover] == full and room:
                load_R[full] -= tokens_Q[mover]
                load_R[target] += tokens_Q[mover]
                rank_Q[mover] = target
    return rank_Q


@njit(cache=True)
def _descend(
    start_Q: IntArray, touch_QR: FloatArray, tokens_Q: IntArray, cap: int
) -> IntArray:  # pragma: no cover - compiled
    """Moves each request to its best rank with room, then swaps pairs, until a pass changes nothing."""
    rank_Q = start_Q.copy()
    requests, ranks = touch_QR.shape
    load_R = np.zeros(ranks, dtype=np.int64)
    for request in range(requests):
        load_R[rank_Q[request]] += tokens_Q[request]
    for _ in range(MOST_PASSES):
        changed = False
        for request in range(requests):
            home, best = rank_Q[request], rank_Q[request]
            for rank in range(ranks):
                room = load_R[rank] + tokens_Q[request] <= cap
                if rank != home and room and touch_QR[request, rank] > touch_QR[request, best]:
                    best = rank
            if best != home:
                load_R[home] -= tokens_Q[request]
                load_R[best] += tokens_Q[request]
                rank_Q[request] = best
                changed = True
        for one in range(requests):
            for two in range(one + 1, requests):
                here, there = rank_Q[one], rank_Q[two]
                if here == there:
                    continue
                gain = touch_QR[one, there] + touch_QR[two, here] - touch_QR[one, here] - touch_QR[two, there]
                shift = tokens_Q[two] - tokens_Q[one]
                if gain > 1e-9 and load_R[here] + shift <= cap and load_R[there] - shift <= cap:
                    rank_Q[one], rank_Q[two] = there, here
                    load_R[here] += shift
                    load_R[there] -= shift
                    changed = True
        if not changed:
            break
    return rank_Q
