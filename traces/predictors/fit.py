"""Predictors that are tables of counts: popularity, token-id table, previous-layer transition.

    popularity    every token gets its layer's most popular experts: the baseline
    token_id      experts by how often they were chosen for the token's id (OpenMoE, Sem-MoE's T[t, N]); an id that was
                  never seen gets the layer's popular experts
    transition    experts by the summed transition counts from the experts that the token had in the layer before; the
                  first layer has none before it and gets its popular experts

Ties go to the more popular expert, then to the lower id. Legend: L routing sites, T tokens, K top-k, E experts,
U different token ids.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import MismatchError, UsageError
from traces.kernels import add_transitions
from traces.trace import RoutingTrace

__all__ = ["PREDICTORS", "Predictor", "PredictorKind", "fit_predictor", "predict"]

IntArray = npt.NDArray[np.int64]

PredictorKind = Literal["popularity", "token_id", "transition"]

PREDICTORS: tuple[PredictorKind, ...] = get_args(PredictorKind)

CHUNK_IDS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """Counts of one trace.

    model_sha256      of the model whose trace was counted
    load_LE           how often each expert was chosen
    token_id_U        token ids seen, ascending, and guess_LUK, the experts for each (token_id)
    transition_LEE    how often expert e of site l - 1 was followed by each of site l; row 0 is zeros (transition)
    """

    kind: PredictorKind
    model_sha256: str
    load_LE: IntArray
    num_experts_L: IntArray
    token_id_U: IntArray | None = None
    guess_LUK: npt.NDArray[np.int32] | None = None
    transition_LEE: npt.NDArray[np.uint32] | None = None


def fit_predictor(trace: RoutingTrace, kind: PredictorKind) -> Predictor:
    """The predictor's tables from `trace`. Raises UsageError: unknown kind, or token_id for a trace without token ids.

    Complexity: O(L T K^2) for transition, O(L (T K + U E)) for token_id, whose table keeps K experts an id, not E
    counts.
    """
    if kind not in PREDICTORS:
        raise UsageError(f"predictor is {kind!r}; use one of {', '.join(PREDICTORS)}")
    experts_L = np.array([site.num_experts for site in trace.model.sites], dtype=np.int64)
    load_LE = np.zeros((len(experts_L), trace.model.num_experts), dtype=np.int64)
    for site, experts in enumerate(experts_L.tolist()):
        load_LE[site] = np.bincount(_real(trace.expert_LTK[site], experts), minlength=load_LE.shape[1])
    fields: dict[str, Any] = {}
    if kind == "token_id":
        if trace.token_id_T is None:
            raise UsageError("the trace has no token ids (column token_id_T); record them, or predict by transition")
        token_id_U, row_T = np.unique(trace.token_id_T, return_inverse=True)
        fields["token_id_U"] = token_id_U.astype(np.int64)
        fields["guess_LUK"] = _token_table(trace, row_T.reshape(-1), len(token_id_U), load_LE, experts_L)
    elif kind == "transition":
        transition_LEE = np.zeros((*load_LE.shape, load_LE.shape[1]), dtype=np.uint32)
        for site in range(1, len(experts_L)):
            before, here = trace.expert_LTK[site - 1], trace.expert_LTK[site]
            add_transitions(before, int(experts_L[site - 1]), here, int(experts_L[site]), transition_LEE[site])
        fields["transition_LEE"] = transition_LEE
    return Predictor(kind=kind, model_sha256=trace.model.sha256, load_LE=load_LE, num_experts_L=experts_L, **fields)


def predict(predictor: Predictor, trace: RoutingTrace) -> npt.NDArray[np.uint8 | np.uint16]:
    """predicted_LTK: as many experts for every token as the trace has columns, likeliest first, of expert_LTK's type.

    A transition predictor takes the token's true experts of the layer before, which are known when the layer is about
    to run. Raises MismatchError for a trace of another model, UsageError where token ids are needed and absent.
    """
    if predictor.model_sha256 != trace.model.sha256:
        raise MismatchError(f"the predictor was fitted to another model than the trace's, {trace.model.name!r}")
    predicted_LTK = np.full_like(trace.expert_LTK, trace.sentinel)
    row_T = _rows(predictor, trace) if predictor.kind == "token_id" else None
    for site, experts in enumerate(predictor.num_experts_L.tolist()):
        rank_E = _rank(predictor.load_LE[site, :experts])
        width = min(experts, predicted_LTK.shape[2])
        predicted_LTK[site, :, :width] = np.argsort(-rank_E)[:width]
        if row_T is not None and predictor.guess_LUK is not None:
            known_T = row_T >= 0
            guess_UK = predictor.guess_LUK[site][:, :width]
            fitted = guess_UK.shape[1]
            predicted_LTK[site, known_T, :fitted] = guess_UK[row_T[known_T]]
            # a trace with more columns than the one fitted: nothing more was kept for the id
            predicted_LTK[site, known_T, fitted:] = trace.sentinel
        elif predictor.transition_LEE is not None and site:
            before = int(predictor.num_experts_L[site - 1])
            table_EE = predictor.transition_LEE[site, :before, :experts]
            _follow(trace.expert_LTK[site - 1], table_EE, rank_E, predicted_LTK[site])
    return predicted_LTK


def _real(expert_TK: npt.NDArray[Any], experts: int) -> npt.NDArray[Any]:
    return expert_TK[expert_TK < experts]


def _rank(load_E: IntArray) -> IntArray:
    """Each expert's place by popularity: the highest is the most popular (of equals, the lowest id)."""
    rank_E = np.empty(len(load_E), dtype=np.int64)
    rank_E[np.argsort(-load_E, kind="stable")] = np.arange(len(load_E))[::-1]
    return rank_E


def _token_table(
    trace: RoutingTrace, row_T: IntArray, ids: int, load_LE: IntArray, experts_L: IntArray
) -> npt.NDArray[np.int32]:
    """The most frequent experts of each token id, (L, U, K)."""
    top_k = trace.expert_LTK.shape[2]
    guess_LUK = np.zeros((len(experts_L), ids, min(top_k, load_LE.shape[1])), dtype=np.int32)
    for site, experts in enumerate(experts_L.tolist()):
        rank_E = _rank(load_LE[site, :experts])
        width = min(top_k, experts)
        order_T = np.argsort(row_T, kind="stable")
        step = max(1, CHUNK_IDS // experts)
        sorted_T = row_T[order_T]
        for first in range(0, ids, step):
            last = min(ids, first + step)
            part_T = order_T[np.searchsorted(sorted_T, first) : np.searchsorted(sorted_T, last)]
            ids_TK = trace.expert_LTK[site, part_T].astype(np.int64)
            flat_TK = (row_T[part_T] - first)[:, None] * experts + ids_TK
            count = np.bincount(flat_TK[ids_TK < experts], minlength=(last - first) * experts)
            score_UE = count.reshape(last - first, experts) * experts + rank_E
            guess_LUK[site, first:last, :width] = np.argsort(-score_UE, axis=1)[:, :width]
    return guess_LUK


def _rows(predictor: Predictor, trace: RoutingTrace) -> IntArray:
    """The table's row of each token, -1 for an id that was not seen."""
    if trace.token_id_T is None:
        raise UsageError("the trace has no token ids (column token_id_T); record them, or predict by transition")
    known_U = predictor.token_id_U
    assert known_U is not None
    at_T = np.minimum(np.searchsorted(known_U, trace.token_id_T), len(known_U) - 1)
    return np.where(known_U[at_T] == trace.token_id_T, at_T, -1)


@njit(cache=True, nogil=True)
def _follow(
    before_TK: npt.NDArray[np.uint8],
    table_EE: npt.NDArray[np.uint32],
    rank_E: npt.NDArray[np.int64],
    predicted_TK: npt.NDArray[np.uint8],
) -> None:
    """Fills each row with the experts of the highest summed counts; leaves rows as they are where nothing is known."""
    experts = len(rank_E)
    width = min(experts, predicted_TK.shape[1])
    score_E = np.empty(experts, dtype=np.int64)
    for token in range(before_TK.shape[0]):
        score_E[:] = 0
        known = False
        for k in range(before_TK.shape[1]):
            expert = before_TK[token, k]
            if expert < table_EE.shape[0]:
                known = True
                for other in range(experts):
                    score_E[other] += table_EE[expert, other]
        if not known:
            continue
        for other in range(experts):
            score_E[other] = score_E[other] * experts + rank_E[other]
        for k in range(width):
            best = 0
            for other in range(1, experts):
                if score_E[other] > score_E[best]:
                    best = other
            predicted_TK[token, k] = best
            score_E[best] = -1
