"""Dispatch and combine of one MoE layer by uneven all-to-all: the distributed arithmetic, readable in one sitting.

Legend: T own tokens, K top-k, H hidden size, R ranks, P slots of one rank, C copies (rows sent or received),
X expert rows (slot by slot, each slot's run padded), J contributions to one sum, B bytes.

A copy is one token's hidden state on its way to one expert (`per_expert`) or to one rank (`per_rank`). Copies that a
rank sends to itself travel through the same buffers and cost a memory copy; only the others are traffic.
The order of every sum is fixed, so results do not depend on who computed them:
    per_expert   y = sum over k ascending of weight_k * expert_k(x)
    per_rank     y = sum over ranks ascending of [ sum over that rank's k ascending of weight_k * expert_k(x) ]
Sums are in float32; what travels is in the hidden states' own type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from placer.execute.job import ExecutionMode

__all__ = ["ROW_MULTIPLE", "DispatchMetadata", "combine", "dispatch", "exchange", "metadata_bytes", "weighted_sum"]

ROW_MULTIPLE = 8
"""Every expert's run of rows is padded to this: BLAS kernels for fewer rows round differently, and outputs must not
depend on how many tokens happened to share an expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchMetadata:
    """What `combine` needs to undo `dispatch`, and what the layer moved.

    send_R, receive_R     copies to and from each rank, own ones included
    pairs                 (token, expert) pairs this rank computes
    expert_row_CJ         expert rows that make up the answer to each received copy
    expert_weight_CJ      their router weights, or None where the source weighs (per_expert)
    home_row_TJ           returned rows that make up each own token's sum; the row after the last one is all zero
    home_weight_TJ        their router weights, or None where the sender weighed (per_rank)
    """

    send_R: list[int]
    receive_R: list[int]
    pairs: int
    expert_row_CJ: Tensor
    expert_weight_CJ: Tensor | None
    home_row_TJ: Tensor
    home_weight_TJ: Tensor | None


def dispatch(
    x_TH: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, mode: ExecutionMode, slots_per_rank: int
) -> tuple[Tensor, list[int], DispatchMetadata]:
    """Expert rows (X, H) of this rank, the rows of each of its slots (P), and the metadata for `combine`.

    `slot_TK` int64 holds the global slot that serves each choice of the rank's own tokens, -1 where there is none;
    `weight_TK` float32 the router weights. A last, all-zero row belongs to no slot. Collective over all ranks.
    """
    assert mode in get_args(ExecutionMode)
    if mode == "per_expert":
        return _dispatch_per_expert(x_TH, slot_TK, weight_TK, slots_per_rank)
    return _dispatch_per_rank(x_TH, slot_TK, weight_TK, slots_per_rank)


def combine(out_XH: Tensor, metadata: DispatchMetadata) -> Tensor:
    """Sum (T, H) of the experts' outputs for the rank's own tokens, in the order of the module's docstring.

    `out_XH` are the outputs of the rows that `dispatch` gave, its last row still zero. Collective over all ranks.
    """
    if metadata.expert_weight_CJ is None:
        answer_CH = out_XH[metadata.expert_row_CJ[:, 0]]
    else:
        answer_CH = weighted_sum(out_XH, metadata.expert_row_CJ, metadata.expert_weight_CJ)
    returned_CH = exchange(answer_CH, metadata.receive_R, metadata.send_R)
    return weighted_sum(returned_CH, metadata.home_row_TJ, metadata.home_weight_TJ)


def weighted_sum(rows_CH: Tensor, row_TJ: Tensor, weight_TJ: Tensor | None) -> Tensor:
    """sum over j ascending of weight_TJ * rows_CH[row_TJ], (T, H): float32 inside, the rows' type outside."""
    total_TH = torch.zeros(len(row_TJ), rows_CH.shape[1], dtype=torch.float32, device=rows_CH.device)
    for j in range(row_TJ.shape[1]):
        term_TH = rows_CH[row_TJ[:, j]].float()
        # multiply, then add: a fused multiply-add would round differently in a kernel's vector body and in its tail
        total_TH += term_TH if weight_TJ is None else term_TH * weight_TJ[:, j, None]
    return total_TH.to(rows_CH.dtype)


def exchange(rows_CH: Tensor, send_R: Sequence[int], receive_R: Sequence[int]) -> Tensor:
    """The rows that arrive when each rank sends `send_R[r]` of its rows to rank r, plus one all-zero row at the end."""
    arrived_CH = rows_CH.new_empty(sum(receive_R) + 1, rows_CH.shape[1])
    arrived_CH[-1] = 0
    # as bytes: every back end moves uint8, not every one moves bfloat16
    dist.all_to_all_single(
        arrived_CH[:-1].view(torch.uint8), rows_CH.contiguous().view(torch.uint8), list(receive_R), list(send_R)
    )
    return arrived_CH


def metadata_bytes(mode: ExecutionMode, top_k: int) -> int:
    """Bytes that travel with each copy beside its hidden state: a float32 weight and an int32 slot per choice."""
    return 8 * top_k if mode == "per_rank" else 0


def _dispatch_per_expert(
    x_TH: Tensor, slot_TK: Tensor, weight_TK: Tensor, slots_per_rank: int
) -> tuple[Tensor, list[int], DispatchMetadata]:
    """One copy per choice, sorted by slot, so that the counts per slot tell the receiver all it needs."""
    num_ranks = dist.get_world_size()
    token_C, column_C = torch.nonzero(slot_TK >= 0, as_tuple=True)
    slot_C, order_C = torch.sort(slot_TK[token_C, column_C], stable=True)
    token_C, column_C = token_C[order_C], column_C[order_C]
    count_RP = torch.bincount(slot_C, minlength=num_ranks * slots_per_rank).view(num_ranks, slots_per_rank)
    arriving_RP = torch.empty_like(count_RP)
    dist.all_to_all_single(arriving_RP, count_RP)
    send_R, receive_R = count_RP.sum(dim=1).tolist(), arriving_RP.sum(dim=1).tolist()

    arrived_CH = exchange(x_TH[token_C], send_R, receive_R)[:-1]
    local_slot_P = torch.arange(slots_per_rank, device=x_TH.device)
    row_C, rows_P = _expert_rows(local_slot_P.repeat(num_ranks).repeat_interleave(arriving_RP.view(-1)), slots_per_rank)
    rows_XH = x_TH.new_zeros(sum(rows_P) + 1, x_TH.shape[1])
    rows_XH[row_C] = arrived_CH

    home_row_TK = torch.full_like(slot_TK, len(token_C))
    home_row_TK[token_C, column_C] = torch.arange(len(token_C), device=x_TH.device)
    metadata = DispatchMetadata(
        send_R=send_R,
        receive_R=receive_R,
        pairs=sum(receive_R),
        expert_row_CJ=row_C[:, None],
        expert_weight_CJ=None,
        home_row_TJ=home_row_TK,
        home_weight_TJ=weight_TK,
    )
    return rows_XH, rows_P, metadata


def _dispatch_per_rank(
    x_TH: Tensor, slot_TK: Tensor, weight_TK: Tensor, slots_per_rank: int
) -> tuple[Tensor, list[int], DispatchMetadata]:
    """One copy per rank touched; which of that rank's slots and with which weights travels in front of the copy."""
    num_ranks, top_k = dist.get_world_size(), slot_TK.shape[1]
    rank_TK = torch.where(slot_TK >= 0, slot_TK // slots_per_rank, num_ranks)
    touched_TR = torch.zeros(len(x_TH), num_ranks + 1, dtype=torch.bool, device=x_TH.device)
    touched_TR = touched_TR.scatter_(1, rank_TK, value=True)[:, :num_ranks]
    rank_C, token_C = torch.nonzero(touched_TR.T, as_tuple=True)
    slot_CK = torch.where(rank_TK[token_C] == rank_C[:, None], slot_TK[token_C] % slots_per_rank, -1)
    send = torch.bincount(rank_C, minlength=num_ranks)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    send_R, receive_R = send.tolist(), receive.tolist()

    arrived_CB = exchange(_pack(x_TH[token_C], slot_CK, weight_TK[token_C]), send_R, receive_R)[:-1]
    arrived_CH, slot_CK, weight_CK = _unpack(arrived_CB, top_k, x_TH.dtype)
    copy_N, column_N = torch.nonzero(slot_CK >= 0, as_tuple=True)
    row_N, rows_P = _expert_rows(slot_CK[copy_N, column_N], slots_per_rank)
    rows_XH = x_TH.new_zeros(sum(rows_P) + 1, x_TH.shape[1])
    rows_XH[row_N] = arrived_CH[copy_N]
    expert_row_CK = torch.full_like(slot_CK, len(rows_XH) - 1)
    expert_row_CK[copy_N, column_N] = row_N

    home_row_TR = torch.full((len(x_TH), num_ranks), len(token_C), device=x_TH.device)
    home_row_TR[token_C, rank_C] = torch.arange(len(token_C), device=x_TH.device)
    metadata = DispatchMetadata(
        send_R=send_R,
        receive_R=receive_R,
        pairs=len(copy_N),
        expert_row_CJ=expert_row_CK,
        expert_weight_CJ=weight_CK,
        # copies are ordered by rank: ascending rows are ascending ranks, and the absent ones go last
        home_row_TJ=home_row_TR.sort(dim=1).values[:, : min(top_k, num_ranks)],
        home_weight_TJ=None,
    )
    return rows_XH, rows_P, metadata


def _expert_rows(slot_N: Tensor, slots_per_rank: int) -> tuple[Tensor, list[int]]:
    """Where each (copy, slot) pair goes among the expert rows (N,), and the padded rows of each slot (P).

    Slots follow one another; within a slot pairs keep their order; each run is padded to ROW_MULTIPLE.
    """
    sorted_N, order_N = torch.sort(slot_N, stable=True)
    count_P = torch.bincount(slot_N, minlength=slots_per_rank)
    padded_P = (count_P + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    shift_P = (padded_P.cumsum(0) - padded_P) - (count_P.cumsum(0) - count_P)
    row_N = torch.empty_like(slot_N)
    row_N[order_N] = torch.arange(len(slot_N), device=slot_N.device) + shift_P[sorted_N]
    return row_N, padded_P.tolist()


def _pack(x_CH: Tensor, slot_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """Rows of bytes (C, B): weights, slots, hidden state."""
    copies, top_k = slot_CK.shape
    row_bytes = metadata_bytes("per_rank", top_k) + x_CH.shape[1] * x_CH.element_size()
    packed_CB = torch.empty(copies, row_bytes, dtype=torch.uint8, device=x_CH.device)
    for field, values in zip(_fields(packed_CB, top_k, x_CH.dtype), (x_CH, slot_CK, weight_CK), strict=True):
        field.copy_(values)
    return packed_CB


def _unpack(packed_CB: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inverts `_pack`: hidden states (C, H), slots (C, K) int64, weights (C, K) float32."""
    x_CH, slot_CK, weight_CK = _fields(packed_CB, top_k, dtype)
    return x_CH, slot_CK.long(), weight_CK


def _fields(packed_CB: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Typed windows onto packed rows: hidden states, slots as int32, weights as float32."""
    weight_CK = packed_CB[:, : 4 * top_k].view(torch.float32)
    slot_CK = packed_CB[:, 4 * top_k : 8 * top_k].view(torch.int32)
    return packed_CB[:, 8 * top_k :].view(dtype), slot_CK, weight_CK
