"""Which request a token belongs to, where a recorder kept batches but no request ids.

Legend: T tokens, B sequences of a batch, R requests.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["infer_requests"]

KEEP_PASSES = 512
"""A request that no batch continued for so many passes of its rank is taken as finished."""


def infer_requests(
    rank_T: npt.NDArray[np.int32],
    pass_T: npt.NDArray[np.int32],
    segment_T: npt.NDArray[np.int32],
    position_T: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """Request ids (T,) from 0. Tokens come batch by batch; a batch is a (pass, rank), a sequence in it a segment.

    A sequence that starts at position p > 0 continues a request of the same rank that last stood at p - 1: the one
    whose turn it is, in the order of the batches before. Every other sequence is a new request.
    """
    tokens = len(rank_T)
    key = np.stack([rank_T, pass_T, segment_T])
    starts = np.flatnonzero(np.concatenate([[True], (key[:, 1:] != key[:, :-1]).any(axis=0)]))
    last = np.concatenate([starts[1:], [tokens]]) - 1
    batch = np.flatnonzero(np.concatenate([[True], (key[:2, starts[1:]] != key[:2, starts[:-1]]).any(axis=0)]))
    request_of_sequence = np.empty(len(starts), dtype=np.int32)
    live: dict[int, npt.NDArray[np.int64]] = {}
    count = 0
    for first, stop in zip(batch.tolist(), [*batch[1:].tolist(), len(starts)], strict=True):
        rank, forward_pass = int(rank_T[starts[first]]), int(pass_T[starts[first]])
        # columns: request, last position, last pass, order in its batch
        known_R4 = live.get(rank, np.empty((0, 4), dtype=np.int64))
        known_R4 = known_R4[known_R4[:, 2] > forward_pass - KEEP_PASSES]
        begin_B = position_T[starts[first:stop]].astype(np.int64)
        found_B = _match(begin_B - 1, known_R4)
        request_B = np.where(found_B >= 0, known_R4[found_B, 0] if len(known_R4) else -1, -1)
        new_B = request_B < 0
        request_B[new_B] = count + np.arange(int(new_B.sum()))
        count += int(new_B.sum())
        rest_R4 = np.delete(known_R4, found_B[found_B >= 0], axis=0)
        fresh_R4 = np.stack(
            [
                request_B,
                position_T[last[first:stop]].astype(np.int64),
                np.full(stop - first, forward_pass),
                np.arange(stop - first),
            ],
            axis=1,
        )
        live[rank] = np.concatenate([rest_R4, fresh_R4])
        request_of_sequence[first:stop] = request_B
    return np.repeat(request_of_sequence, np.diff(starts, append=tokens))


def _match(wanted_B: npt.NDArray[np.int64], known_R4: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row of known_R4 whose last position is wanted_B, (B,), each row once, most recent first; -1 for none."""
    found_B = np.full(len(wanted_B), -1, dtype=np.int64)
    if not len(known_R4):
        return found_B
    order_R = np.lexsort((known_R4[:, 3], -known_R4[:, 2], known_R4[:, 1]))
    position_R = known_R4[order_R, 1]
    order_B = np.argsort(wanted_B, kind="stable")
    sorted_B = wanted_B[order_B]
    turn_B = np.arange(len(sorted_B)) - np.searchsorted(sorted_B, sorted_B)
    place_B = np.searchsorted(position_R, sorted_B) + turn_B
    fits_B = (sorted_B >= 0) & (place_B < len(position_R))
    fits_B[fits_B] = position_R[place_B[fits_B]] == sorted_B[fits_B]
    found_B[order_B[fits_B]] = order_R[place_B[fits_B]]
    return found_B
