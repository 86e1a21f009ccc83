"""Which row of the routing trace every token of a request takes.

Legend: T rows (tokens) of the trace, Q its requests, B rows in order of phase and request, J pieces of an iteration,
I tokens of an iteration.

A served request follows one request of the trace: its prompt takes that request's prefill rows in order, what it
generates the decode rows, each from the start again when they are used up. Where the trace has no phases, or the
request no rows of one, all of its rows serve. So tokens of a request keep what they have in common.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError

__all__ = ["Streams"]

IntArray = npt.NDArray[np.int64]
PHASES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """row_B, and where in it each request's rows begin and how many there are, by phase: start_2Q, count_2Q."""

    row_B: IntArray
    start_2Q: IntArray
    count_2Q: IntArray

    @classmethod
    def of(cls, request_id_T: npt.NDArray[np.integer], phase_T: npt.NDArray[np.integer] | None = None) -> "Streams":
        """The streams of a trace's requests, in order of their ids. Raises UsageError for a trace without tokens."""
        if not len(request_id_T):
            raise UsageError("the routing trace has no tokens; give at least one request")
        index_T = np.unique(request_id_T, return_inverse=True)[1].reshape(-1)
        requests = int(index_T.max()) + 1
        phase = np.zeros(len(index_T), dtype=np.int64) if phase_T is None else phase_T.astype(np.int64)
        count_2Q = np.stack([np.bincount(index_T[phase == at], minlength=requests) for at in range(PHASES)])
        order = [np.flatnonzero(phase == at) for at in range(PHASES)]
        by_phase = [rows[np.argsort(index_T[rows], kind="stable")] for rows in order]
        everything = np.argsort(index_T, kind="stable")
        start_2Q = np.cumsum(count_2Q.reshape(-1)).reshape(PHASES, requests) - count_2Q
        whole_Q = np.bincount(index_T, minlength=requests)
        lacks_2Q = count_2Q == 0
        start_2Q = np.where(lacks_2Q, len(index_T) + np.cumsum(whole_Q) - whole_Q, start_2Q)
        return cls(
            row_B=np.concatenate([*by_phase, everything]).astype(np.int64),
            start_2Q=start_2Q.astype(np.int64),
            count_2Q=np.where(lacks_2Q, whole_Q, count_2Q).astype(np.int64),
        )

    @property
    def num_requests(self) -> int:
        """Q."""
        return int(self.start_2Q.shape[1])

    def rows(self, piece_J5: IntArray, tokens: int) -> tuple[IntArray, IntArray]:
        """Rows and source ranks, (I,) each, of pieces (stream, source rank, first position, prompt length, count).

        `tokens` is the sum of the counts.
        """
        row_I, source_I = np.empty(tokens, dtype=np.int64), np.empty(tokens, dtype=np.int64)
        _rows(self.row_B, self.start_2Q, self.count_2Q, piece_J5, row_I, source_I)
        return row_I, source_I


@njit(cache=True)
def _rows(
    row_B: IntArray, start_2Q: IntArray, count_2Q: IntArray, piece_J5: IntArray, row_I: IntArray, source_I: IntArray
) -> None:
    at = 0
    for piece in range(len(piece_J5)):
        stream, source, first, prompt, count = piece_J5[piece]
        for position in range(first, first + count):
            phase = 0 if position < prompt else 1
            place = (position - phase * prompt) % count_2Q[phase, stream]
            row_I[at] = row_B[start_2Q[phase, stream] + place]
            source_I[at] = source
            at += 1
