"""From a routing trace to what a single device has to do: which tokens run together, and what they demand.

Legend: B iterations, T tokens, L routing sites, E experts, K levels of the ladder.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import BitLadder
from placer.core.device.work import DeviceWork
from placer.core.errors import MismatchError, UsageError
from traces.trace import RoutingTrace

__all__ = ["decode_batches", "device_work", "level_of_bits", "prefill_batches"]

IntArray = npt.NDArray[np.int64]


def prefill_batches(trace: RoutingTrace, tokens: int) -> list[IntArray]:
    """The trace's tokens in order, `tokens` at a time (the last batch may be shorter); indices over T."""
    if tokens < 1:
        raise UsageError(f"tokens is {tokens}; give the tokens of one batch, 1 or more")
    return [np.arange(at, min(at + tokens, trace.num_tokens)) for at in range(0, trace.num_tokens, tokens)]


def decode_batches(trace: RoutingTrace, requests: int) -> list[IntArray]:
    """Requests in the order of their first token, `requests` at a time, one token of each to a batch; indices over T.

    The i-th batch of a group holds the i-th token of its requests; a request that is over leaves the batch smaller.
    """
    if requests < 1:
        raise UsageError(f"requests is {requests}; give the requests of one batch, 1 or more")
    _, first_Q, inverse_T = np.unique(trace.request_id_T, return_index=True, return_inverse=True)
    rank_Q = np.empty(len(first_Q), dtype=np.int64)
    rank_Q[np.argsort(first_Q, kind="stable")] = np.arange(len(first_Q))
    request_T = rank_Q[inverse_T.reshape(-1)]
    by_request = np.argsort(request_T, kind="stable")
    start_Q = np.searchsorted(request_T[by_request], np.arange(len(first_Q)))
    step_T = np.empty(trace.num_tokens, dtype=np.int64)
    step_T[by_request] = np.arange(trace.num_tokens) - start_Q[request_T[by_request]]
    group_T = request_T // requests
    order = np.lexsort([request_T, step_T, group_T])
    cut = np.flatnonzero((np.diff(group_T[order]) != 0) | (np.diff(step_T[order]) != 0)) + 1
    return np.split(order, cut) if len(order) else []


def device_work(
    trace: RoutingTrace, batches: Sequence[IntArray], ladder: BitLadder, *, level: int | None = None
) -> DeviceWork:
    """What each batch sends to every expert at every level.

    A trace with bits demands the widths it has (a width off the ladder raises UsageError); without, or where `level` is
    given, every token demands that level (None: the highest). Raises MismatchError for a model whose sites differ.
    """
    if len({site.num_experts for site in trace.model.sites}) != 1:
        raise MismatchError(
            f"model {trace.model.name!r} has sites with different numbers of experts; a device plan has one"
        )
    experts, levels = trace.model.num_experts, ladder.levels
    if level is not None and not 1 <= level <= levels:
        raise UsageError(f"level is {level}; the ladder has levels 1 to {levels}")
    level_of = None if level is not None or trace.bits_LTK is None else level_of_bits(ladder)
    count_BLEK = np.zeros((len(batches), trace.model.num_sites, experts, levels), dtype=np.int64)
    for batch, index_T in enumerate(batches):
        for site in range(trace.model.num_sites):
            ids = trace.expert_LTK[site, index_T].astype(np.int64)
            real = ids < experts
            if level_of is None or trace.bits_LTK is None:
                level_X = np.full(int(real.sum()), (level or levels) - 1)
            else:
                level_X = level_of[trace.bits_LTK[site, index_T][real]]
                if level_X.size and level_X.min() < 0:
                    ladder.level_of(int(trace.bits_LTK[site, index_T][real][level_X < 0][0]))
            flat = np.bincount(ids[real] * levels + level_X, minlength=experts * levels)
            count_BLEK[batch, site] = flat.reshape(experts, levels)
    return DeviceWork(tokens_B=np.array([len(index) for index in batches], dtype=np.int64), count_BLEK=count_BLEK)


def level_of_bits(ladder: BitLadder) -> IntArray:
    """The level (from 0) of every bit-width up to 255, -1 for one that is not on the ladder, (256,)."""
    table = np.full(256, -1, dtype=np.int64)
    table[list(ladder.bits_K)] = np.arange(ladder.levels)
    return table
