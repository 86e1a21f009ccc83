"""How often each request touches each rank: what a rank must know to be a good home for a request's attention.

Legend: L sites, T tokens, K top-k, Q requests, R ranks, P slots.
"""

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError, UsageError
from placer.core.modes import ReplicaChoice
from placer.core.plan import Plan
from placer.core.replicas import choose_slots, layer_slots

__all__ = ["first_tokens", "request_tokens", "request_touch"]

IntArray = npt.NDArray[np.int64]
HOMELESS_RULES = ("visit_first", "token_hash")


def request_touch(
    plan: Plan, expert_LTK: npt.NDArray[np.integer], request_index_T: npt.NDArray[np.integer], num_requests: int
) -> npt.NDArray[np.int32]:
    """Tokens of each request that touch each rank in each layer, (L, Q, R).

    `request_index_T` counts requests from 0. A token at home on rank r sends one copy fewer in every layer in which it
    touches r: summed over layers, entry [q, r] is what de-duplicated dispatch saves when request q lives on rank r.
    Where experts have replicas the home may decide which one serves; these counts are for tokens without a home yet,
    served as `serve_sets` serves them.

    Complexity: O(L T (K + R)). Raises MismatchError where plan and tokens do not fit, UsageError for a wrong index.
    """
    layers, tokens, _ = expert_LTK.shape
    if layers != len(plan.slot_expert_LP):
        raise MismatchError(
            f"the trace has {layers} MoE layers, the plan {len(plan.slot_expert_LP)}; use the plan's own trace"
        )
    index = _checked(request_index_T, num_requests, tokens)
    ranks = plan.num_ranks
    nowhere, token_T = np.full(tokens, -1, dtype=np.int64), np.arange(tokens)
    # without a source rank the rules that look at it are uniform draws
    rule: ReplicaChoice = plan.replica_choice if plan.replica_choice in HOMELESS_RULES else "local_or_uniform"
    touch_LQR = np.zeros((layers, num_requests, ranks), dtype=np.int32)
    for layer in range(layers):
        share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
        slots = layer_slots(plan.slot_expert_LP[layer], plan.num_experts, ranks, plan.ranks_per_node, share)
        slot_TK = choose_slots(slots, rule, expert_LTK[layer], nowhere, token_T)
        touched_TR = np.zeros((tokens, ranks), dtype=bool)
        token, column = np.nonzero(slot_TK >= 0)
        touched_TR[token, slots.rank_P[slot_TK[token, column]]] = True
        token, rank = np.nonzero(touched_TR)
        count = np.bincount(index[token] * ranks + rank, minlength=num_requests * ranks)
        touch_LQR[layer] = count.reshape(num_requests, ranks)
    return touch_LQR


def request_tokens(request_index_T: npt.NDArray[np.integer], num_requests: int) -> IntArray:
    """Tokens of each request, (Q,)."""
    index = _checked(request_index_T, num_requests, len(request_index_T))
    return np.bincount(index, minlength=num_requests).astype(np.int64)


def first_tokens(request_index_T: npt.NDArray[np.integer], count: int) -> npt.NDArray[np.bool_]:
    """Which tokens are among the first `count` of their request, (T,)."""
    if count < 0:
        raise UsageError(f"count is {count}; give 0 or more tokens")
    order = np.argsort(request_index_T, kind="stable")
    ordered = request_index_T[order]
    fresh = np.concatenate(([True], ordered[1:] != ordered[:-1])) if len(ordered) else np.zeros(0, dtype=bool)
    start = np.maximum.accumulate(np.where(fresh, np.arange(len(ordered)), 0))
    first = np.empty(len(ordered), dtype=bool)
    first[order] = np.arange(len(ordered)) - start < count
    return first


def _checked(request_index_T: npt.NDArray[np.integer], num_requests: int, tokens: int) -> IntArray:
    index = np.asarray(request_index_T, dtype=np.int64)
    if index.shape != (tokens,):
        raise UsageError(f"request_index_T is {index.shape}; give one index for each of {tokens} tokens")
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < num_requests):
        raise UsageError(f"request_index_T goes from {index.min()} to {index.max()}; give 0 to {num_requests - 1}")
    return index
