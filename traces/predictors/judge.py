"""How good a prediction is, token by token and batch by batch, and the same prediction made worse or better.

Legend: L routing sites, T tokens, K top-k, E experts, B batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import MismatchError, UsageError
from traces.trace import RoutingTrace

__all__ = ["Accuracy", "corrupt", "judge_prediction"]

IntArray = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accuracy:
    """Shares between 0 and 1, one for each site.

    pair_L       (token, expert) pairs of the trace that were predicted
    recall_L     experts that a batch touched and that were predicted for it, over all batches
    precision_L  experts that were predicted for a batch and that it touched

    A site where there is nothing to find (or nothing predicted) counts 1.
    """

    pair_L: npt.NDArray[np.float64]
    recall_L: npt.NDArray[np.float64]
    precision_L: npt.NDArray[np.float64]


def judge_prediction(predicted_LTK: Ids, trace: RoutingTrace, batches: Sequence[IntArray] = ()) -> Accuracy:
    """Compares a prediction with the trace, batch by batch (indices over T) for recall and precision.

    Raises MismatchError where the two differ in shape.
    """
    _assert_alike(predicted_LTK, trace)
    sites, tokens = predicted_LTK.shape[:2]
    batch_T = np.full(tokens, -1, dtype=np.int64)
    for batch, index_T in enumerate(batches):
        batch_T[index_T] = batch
    share_3L = np.ones((3, sites))
    for site in range(sites):
        experts = trace.model.sites[site].num_experts
        found, pairs = _count_pairs(predicted_LTK[site], trace.expert_LTK[site], experts)
        share_3L[0, site] = found / pairs if pairs else 1.0
        touched_BE = _touched(trace.expert_LTK[site], batch_T, len(batches), experts)
        expected_BE = _touched(predicted_LTK[site], batch_T, len(batches), experts)
        both = int((touched_BE & expected_BE).sum())
        for row, table_BE in ((1, touched_BE), (2, expected_BE)):
            total = int(table_BE.sum())
            share_3L[row, site] = both / total if total else 1.0
    return Accuracy(pair_L=share_3L[0], recall_L=share_3L[1], precision_L=share_3L[2])


def corrupt(predicted_LTK: Ids, trace: RoutingTrace, accuracy: float, rng: np.random.Generator) -> Ids:
    """The prediction with exactly the share `accuracy` of each site's true pairs in it (rounded to whole pairs).

    For predictions that name no expert twice for a token, as all of ours.

    Too good: pairs drawn at random become experts that the token did not take and that were not predicted for it
    (unset where there is none). Not good enough: missed pairs drawn at random replace the token's wrong experts, the
    likeliest first, or are put into unset entries. Give the trace's own expert_LTK for an oracle that errs at random.

    Raises UsageError for an accuracy outside 0 to 1, MismatchError where the shapes differ.
    """
    if not 0 <= accuracy <= 1:
        raise UsageError(f"accuracy is {accuracy!r}; give a share, 0 to 1")
    _assert_alike(predicted_LTK, trace)
    result_LTK = predicted_LTK.copy()
    for site in range(len(result_LTK)):
        experts = trace.model.sites[site].num_experts
        hit_TK = _hits(result_LTK[site], trace.expert_LTK[site], experts)
        pairs, hits = int((hit_TK >= 0).sum()), int((hit_TK == 1).sum())
        wanted = round(accuracy * pairs)
        # of a token's true pairs, those that change from found to missed or back
        state, count = (1, hits - wanted) if wanted < hits else (0, wanted - hits)
        chosen = rng.permutation(np.flatnonzero(hit_TK.reshape(-1) == state))[:count]
        draw_X = rng.integers(0, experts, size=len(chosen))
        _change(
            result_LTK[site], trace.expert_LTK[site], np.sort(chosen), draw_X, experts, result_LTK.shape[2],
            trace.sentinel, state == 1,
        )  # fmt: skip
    return result_LTK


def _assert_alike(predicted_LTK: Ids, trace: RoutingTrace) -> None:
    if predicted_LTK.shape != trace.expert_LTK.shape:
        raise MismatchError(
            f"the prediction is {predicted_LTK.shape}, the trace {trace.expert_LTK.shape}; predict this trace"
        )


def _count_pairs(predicted_TK: Ids, expert_TK: Ids, experts: int) -> tuple[int, int]:
    hit_TK = _hits(predicted_TK, expert_TK, experts)
    return int((hit_TK == 1).sum()), int((hit_TK >= 0).sum())


def _touched(expert_TK: Ids, batch_T: IntArray, batches: int, experts: int) -> npt.NDArray[np.bool_]:
    """Which experts each batch touches, (B, E)."""
    table_BE = np.zeros((batches, experts), dtype=np.bool_)
    keep_TK = (expert_TK < experts) & (batch_T >= 0)[:, None]
    batch_TK = np.broadcast_to(batch_T[:, None], expert_TK.shape)
    table_BE[batch_TK[keep_TK], expert_TK[keep_TK]] = True
    return table_BE


@njit(cache=True, nogil=True)
def _hits(predicted_TK: Ids, expert_TK: Ids, experts: int) -> npt.NDArray[np.int8]:
    """Of each true pair: 1 predicted, 0 not; -1 for entries that are no pair (unset, null, named before in the row)."""
    hit_TK = np.full(expert_TK.shape, -1, dtype=np.int8)
    for token in range(expert_TK.shape[0]):
        for k in range(expert_TK.shape[1]):
            expert = expert_TK[token, k]
            if expert >= experts:
                continue
            repeated = False
            for earlier in range(k):
                repeated |= expert_TK[token, earlier] == expert
            if repeated:
                continue
            hit_TK[token, k] = 0
            for other in range(predicted_TK.shape[1]):
                if predicted_TK[token, other] == expert:
                    hit_TK[token, k] = 1
                    break
    return hit_TK


@njit(cache=True, nogil=True)
def _change(
    predicted_TK: Ids,
    expert_TK: Ids,
    chosen_X: IntArray,
    draw_X: IntArray,
    experts: int,
    width: int,
    sentinel: int,
    worse: bool,
) -> None:
    for at in range(len(chosen_X)):
        token = chosen_X[at] // expert_TK.shape[1]
        expert = expert_TK[token, chosen_X[at] % expert_TK.shape[1]]
        place = -1
        for k in range(width):
            guess = predicted_TK[token, k]
            wrong = True
            for other in range(expert_TK.shape[1]):
                wrong &= expert_TK[token, other] != guess
            if worse and guess == expert:
                place = k
            # where nothing is wrong some entry is unset or named twice, as there are no more true experts than entries
            if not worse and place < 0 and (guess >= experts or wrong):
                place = k
        if place < 0:
            continue
        if not worse:
            predicted_TK[token, place] = expert
            continue
        replacement = sentinel
        for step in range(experts):
            candidate = (draw_X[at] + step) % experts
            free = True
            for k in range(width):
                free &= predicted_TK[token, k] != candidate
            for other in range(expert_TK.shape[1]):
                free &= expert_TK[token, other] != candidate
            if free:
                replacement = candidate
                break
        predicted_TK[token, place] = replacement
