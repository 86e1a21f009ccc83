"""What happens to rows on one rank: sorting copies by destination, packing them, giving them to experts, summing.

Legend: T tokens, K top-k, C copies, D destinations, J contributions to one sum, X expert rows, P slots of one rank,
H hidden size, B bytes.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.execute.job import packed_bytes

__all__ = ["ROW_MULTIPLE", "expert_rows", "fan_out", "pack", "positions", "unpack", "weighted_sum"]

IntArray = npt.NDArray[np.int64]

ROW_MULTIPLE = 8
"""Every expert's run of rows is padded to this: BLAS kernels for fewer rows round differently, and outputs must not
depend on how many tokens happened to share an expert."""


def weighted_sum(rows_CH: Tensor, row_TJ: Tensor, weight_TJ: Tensor | None) -> Tensor:
    """sum over j ascending of weight_TJ * rows_CH[row_TJ], (T, H): float32 inside, the rows' type outside."""
    total_TH = torch.zeros(len(row_TJ), rows_CH.shape[1], dtype=torch.float32, device=rows_CH.device)
    for j in range(row_TJ.shape[1]):
        term_TH = rows_CH[row_TJ[:, j]].float()
        # multiply, then add: a fused multiply-add would round differently in a kernel's vector body and in its tail
        total_TH += term_TH if weight_TJ is None else term_TH * weight_TJ[:, j, None]
    return total_TH.to(rows_CH.dtype)


def positions(mask_N: Tensor, count: int) -> Tensor:
    """Indices of the `count` true entries, ascending; on a device without waiting for it."""
    if mask_N.device.type == "cpu":
        return torch.nonzero(mask_N).view(-1)
    return torch.sort(mask_N.to(torch.uint8), descending=True, stable=True).indices[:count]


def fan_out(touched_TD: Tensor, count: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of rows for the destinations they touch, sorted by destination, then row: (destination_C, row_C, back_TJ).

    `back_TJ` are the copies of each row by ascending destination, at most `most`; absent ones are `count`, the all-zero
    row after the last copy.
    """
    rows, destinations = touched_TD.shape
    if touched_TD.device.type == "cpu":
        destination_C, row_C = torch.nonzero(touched_TD.T, as_tuple=True)
    else:
        at_C = positions(touched_TD.T.reshape(-1), count)
        destination_C, row_C = at_C // max(1, rows), at_C % max(1, rows)
    back_TD = torch.full((rows, destinations), count, device=touched_TD.device)
    back_TD[row_C, destination_C] = torch.arange(count, device=touched_TD.device)
    # copies are ordered by destination: ascending copies are ascending destinations, and the absent ones go last
    return destination_C, row_C, back_TD.sort(dim=1).values[:, : min(most, destinations)]


def expert_rows(arrived_CH: Tensor, slot_CK: Tensor, pairs_P: IntArray) -> tuple[Tensor, list[int], Tensor]:
    """Rows for the experts (X, H), the padded rows of each slot (P), and the row of each copy's choice (C, K).

    Slots follow one another; within a slot pairs keep their order; each run is padded to ROW_MULTIPLE. A last, all-zero
    row belongs to no slot and stands for absent choices (slot -1). `pairs_P` counts the pairs of each slot.
    """
    device, (copies, top_k) = arrived_CH.device, slot_CK.shape
    padded_P = (pairs_P + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    shift_P = (np.cumsum(padded_P) - padded_P) - (np.cumsum(pairs_P) - pairs_P)
    pairs, last = int(pairs_P.sum()), int(padded_P.sum())
    row_N = torch.from_numpy(np.arange(pairs) + np.repeat(shift_P, pairs_P)).to(device)
    flat_N = slot_CK.reshape(-1)
    pair_N = torch.sort(torch.where(flat_N >= 0, flat_N, len(pairs_P)), stable=True).indices[:pairs]
    rows_XH = arrived_CH.new_zeros(last + 1, arrived_CH.shape[1])
    rows_XH[row_N] = arrived_CH[pair_N // top_k]
    expert_row_CK = torch.full((copies * top_k,), last, device=device)
    expert_row_CK[pair_N] = row_N
    return rows_XH, padded_P.tolist(), expert_row_CK.view(copies, top_k)


def pack(x_CH: Tensor, slot_CK: Tensor, weight_CK: Tensor, name_C: Tensor | None = None) -> Tensor:
    """Rows of bytes (C, B): weights, slots, the token's name where given, hidden state."""
    copies, top_k = slot_CK.shape
    row_bytes = packed_bytes(top_k, named=name_C is not None) + x_CH.shape[1] * x_CH.element_size()
    packed_CB = torch.empty(copies, row_bytes, dtype=torch.uint8, device=x_CH.device)
    number_CK = slot_CK if name_C is None else torch.cat([slot_CK, name_C[:, None]], dim=1)
    fields = _fields(packed_CB, top_k, number_CK.shape[1], x_CH.dtype)
    for field, values in zip(fields, (x_CH, number_CK, weight_CK), strict=True):
        field.copy_(values)
    return packed_CB


def unpack(
    packed_CB: Tensor, top_k: int, dtype: torch.dtype, *, named: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inverts `pack`: hidden states (C, H), slots (C, K) int64, weights (C, K) float32, names (C,) int64."""
    x_CH, number_CK, weight_CK = _fields(packed_CB, top_k, top_k + named, dtype)
    number_CK = number_CK.long()
    return x_CH, number_CK[:, :top_k], weight_CK, number_CK[:, top_k] if named else None


def _fields(packed_CB: Tensor, top_k: int, numbers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Typed windows onto packed rows: hidden states, slots and name as int32, weights as float32."""
    weight_CK = packed_CB[:, : 4 * top_k].view(torch.float32)
    number_CK = packed_CB[:, 4 * top_k : 4 * (top_k + numbers)].view(torch.int32)
    return packed_CB[:, 4 * (top_k + numbers) :].view(dtype), number_CK, weight_CK
