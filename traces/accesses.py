"""Accesses: which experts every step of a run needs, site by site; a step is one token, or tokens that run together.

Legend: L routing sites, T tokens, K top-k, S steps, A accesses (an expert that a step needs), B batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from traces.trace import RoutingTrace

__all__ = ["Accesses", "step_accesses", "trace_accesses"]

IntArray = npt.NDArray[np.int64]
Batches = Sequence[npt.NDArray[np.integer]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accesses:
    """The distinct experts of every step. Step s of site l needs expert_A[start_LS[l, s] : start_LS[l, s + 1]].

    start_LS (L, S + 1) int64, expert_A (A,) int32, site after site; a step may need nothing.
    """

    num_experts: int
    start_LS: IntArray
    expert_A: npt.NDArray[np.int32]

    @property
    def num_sites(self) -> int:
        """L."""
        return len(self.start_LS)

    @property
    def num_steps(self) -> int:
        """S."""
        return self.start_LS.shape[1] - 1

    @property
    def accesses_L(self) -> IntArray:
        """How many experts the steps of each site need together, (L,)."""
        return self.start_LS[:, -1] - self.start_LS[:, 0]


def trace_accesses(trace: RoutingTrace, batches: Batches | None = None) -> Accesses:
    """What the trace's steps need: batches of tokens that run together (None: every token alone, in their order)."""
    return step_accesses(trace.expert_LTK, [site.num_experts for site in trace.model.sites], batches)


def step_accesses(
    expert_LTK: npt.NDArray[np.uint8 | np.uint16],
    num_experts_L: Sequence[int],
    batches: Batches | None = None,
    *,
    hottest_first: bool = False,
) -> Accesses:
    """The distinct experts of every step of any table of ids; ids from a site's num_experts_L on are left out.

    Within a step by ascending id, or with `hottest_first` by falling number of tokens, then by id.
    Complexity: O(L (T K + S d^2)) for d distinct experts a step. Raises UsageError for a table that is not (L, T, K).
    """
    if expert_LTK.ndim != 3 or len(expert_LTK) != len(num_experts_L):
        raise UsageError(f"expert_LTK is {expert_LTK.shape}; give ({len(num_experts_L)} sites, tokens, k)")
    sites, tokens, top_k = expert_LTK.shape
    if batches is None:
        index_N, start_B = np.arange(tokens), np.arange(tokens + 1)
    else:
        index_N = np.concatenate(batches).astype(np.int64) if len(batches) else np.zeros(0, dtype=np.int64)
        start_B = np.cumsum([0, *(len(batch) for batch in batches)])
        if index_N.size and not 0 <= int(index_N.min()) <= int(index_N.max()) < tokens:
            raise UsageError(f"batches name token {int(index_N.max())}; the table has {tokens} tokens")
    experts = max(num_experts_L, default=0)
    most = int(np.minimum(np.diff(start_B) * top_k, experts).sum())
    expert_A = np.empty(most * sites, dtype=np.int32)
    start_LS = np.zeros((sites, len(start_B)), dtype=np.int64)
    at = 0
    for site, limit in enumerate(num_experts_L):
        at = _collect_steps(
            np.ascontiguousarray(expert_LTK[site]), limit, index_N, start_B, hottest_first, start_LS[site], expert_A, at
        )
    return Accesses(num_experts=experts, start_LS=start_LS, expert_A=expert_A[:at].copy())


@njit(cache=True, nogil=True)
def _collect_steps(
    expert_TK: npt.NDArray[np.uint8],
    limit: int,
    index_N: IntArray,
    start_B: IntArray,
    hottest_first: bool,
    start_S: IntArray,
    expert_A: npt.NDArray[np.int32],
    at: int,
) -> int:
    count_E = np.zeros(limit, dtype=np.int64)
    start_S[0] = at
    for batch in range(len(start_B) - 1):
        first = at
        for position in range(start_B[batch], start_B[batch + 1]):
            token = index_N[position]
            for k in range(expert_TK.shape[1]):
                expert = np.int64(expert_TK[token, k])
                if expert < limit:
                    if count_E[expert] == 0:
                        expert_A[at] = expert
                        at += 1
                    count_E[expert] += 1
        for here in range(first + 1, at):
            expert = expert_A[here]
            place = here
            while place > first:
                before = expert_A[place - 1]
                if hottest_first and count_E[before] != count_E[expert]:
                    if count_E[before] > count_E[expert]:
                        break
                elif before < expert:
                    break
                expert_A[place] = before
                place -= 1
            expert_A[place] = expert
        for here in range(first, at):
            count_E[expert_A[here]] = 0
        start_S[batch + 1] = at
    return at
