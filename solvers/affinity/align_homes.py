"""Rank labels aligned over layers for requests: the ranks that a request touches should be one rank in all layers.

Permuting the ranks of a layer changes neither load nor ranks touched, only which requests find their experts at home.
For fixed homes the best labels of a layer are a linear assignment; for fixed labels the homes are `assign_homes`. The
two are alternated until neither gains, from several starts.

Legend: L layers, Q requests, R ranks, P slots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from solvers.affinity.homes import assign_homes, touches_at_home
from solvers.affinity.matching import heaviest_matching

__all__ = ["HomeLabels", "align_for_homes", "best_labels"]

IntArray = npt.NDArray[np.int64]

MOST_ROUNDS = 30


@dataclass(frozen=True, slots=True)
class HomeLabels:
    """Labels and homes that fit together.

    order_LR int64: the old rank whose experts are on each rank of each layer, for `solvers.ranks.relabel_ranks`.
    rank_Q int64: home of each request. `touches`: tokens, summed over layers, that touch their request's home.
    """

    order_LR: IntArray
    rank_Q: IntArray
    touches: float


def align_for_homes(
    touch_LQR: npt.NDArray[np.integer],
    tokens_Q: npt.NDArray[np.integer],
    *,
    ranks_per_node: int,
    slack: float,
    restarts: int = 3,
    seed: int = 0,
) -> HomeLabels:
    """New labels of the ranks of every layer, and the homes of the requests they were found with.

    Starts: the labels as they are; layers matched one after the other to the touches of those before; `restarts` random
    balanced homes. With several nodes a node's ranks stay together: nodes are permuted, and ranks inside them, so nodes
    touched stay as few as they were.

    Guarantee: never fewer touches at home than assign_homes finds under the labels as they are; deterministic for a
    seed. Complexity: per round O(L (Q R^2 + R^3)) and one assign_homes; at most MOST_ROUNDS rounds a start.
    """
    layers, requests, ranks = touch_LQR.shape
    if ranks % ranks_per_node:
        raise UsageError(f"ranks_per_node is {ranks_per_node}; {ranks} ranks are no multiple of it")
    counts, tokens = touch_LQR.astype(np.float64), np.asarray(tokens_Q, dtype=np.int64)
    same_LR = np.tile(np.arange(ranks), (layers, 1))
    found = [_alternate(counts, tokens, same_LR, ranks_per_node, slack)]
    found.append(_alternate(counts, tokens, _chain(counts, tokens, ranks_per_node), ranks_per_node, slack))
    rng = np.random.default_rng(seed)
    for _ in range(restarts):
        rank_Q = rng.permutation(np.arange(requests) % ranks)
        order_LR = np.stack([best_labels(_gain(count_QR, rank_Q), ranks_per_node) for count_QR in counts])
        found.append(_alternate(counts, tokens, order_LR, ranks_per_node, slack))
    return max(found, key=lambda labels: labels.touches)


def best_labels(gain_RR: npt.NDArray[np.number], ranks_per_node: int) -> IntArray:
    """Old rank for each new one, (R,), with the largest sum of gain[new, old]; nodes stay whole."""
    ranks = len(gain_RR)
    nodes = ranks // ranks_per_node
    if nodes == 1:
        return heaviest_matching(gain_RR)
    block = gain_RR.reshape(nodes, ranks_per_node, nodes, ranks_per_node).transpose(0, 2, 1, 3)
    inside = np.array([[heaviest_matching(pair) for pair in row] for row in block])
    worth = np.take_along_axis(block, inside[:, :, :, None], axis=3).sum(axis=(2, 3))
    order = [node * ranks_per_node + inside[new, node] for new, node in enumerate(heaviest_matching(worth))]
    return np.concatenate(order)


def _gain(count_QR: npt.NDArray[np.float64], rank_Q: IntArray) -> npt.NDArray[np.float64]:
    """Touches of old rank b by the requests at home on rank a, [a, b]."""
    gain_RR = np.zeros((count_QR.shape[1], count_QR.shape[1]))
    np.add.at(gain_RR, rank_Q, count_QR)
    return gain_RR


def _chain(counts: npt.NDArray[np.float64], tokens_Q: IntArray, ranks_per_node: int) -> IntArray:
    """Each layer labelled so that requests touch the ranks they touched in the layers before more than others do."""
    rate = counts / np.maximum(1, tokens_Q)[None, :, None]
    above = (rate - rate.mean(axis=1, keepdims=True)) * np.sqrt(tokens_Q)[None, :, None]
    order_LR = np.tile(np.arange(counts.shape[2]), (len(counts), 1))
    before_QR = above[0].copy()
    for layer in range(1, len(counts)):
        order_LR[layer] = best_labels(before_QR.T @ above[layer], ranks_per_node)
        before_QR += above[layer][:, order_LR[layer]]
    return order_LR


def _alternate(
    counts: npt.NDArray[np.float64], tokens_Q: IntArray, order_LR: IntArray, ranks_per_node: int, slack: float
) -> HomeLabels:
    ranks = counts.shape[2]
    best: HomeLabels | None = None
    for _ in range(MOST_ROUNDS):
        touch_QR = np.take_along_axis(counts, order_LR[:, None, :], axis=2).sum(axis=0)
        rank_Q = assign_homes(touch_QR, tokens_Q, ranks, slack)
        if best is not None and touches_at_home(touch_QR, best.rank_Q) > touches_at_home(touch_QR, rank_Q):
            rank_Q = best.rank_Q
        touches = touches_at_home(touch_QR, rank_Q)
        if best is not None and touches <= best.touches:
            break
        best = HomeLabels(order_LR, rank_Q, touches)
        order_LR = np.stack([best_labels(_gain(count_QR, rank_Q), ranks_per_node) for count_QR in counts])
    assert best is not None
    return best
