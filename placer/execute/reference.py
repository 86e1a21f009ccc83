"""The same layers in one process, without slots, copies or messages: what every plan's outputs are compared with.

Legend: L sites, T tokens, K top-k, H hidden size, E experts, R ranks, X rows of one expert.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from placer.execute.dispatch.rows import ROW_MULTIPLE
from placer.execute.experts import ExpertWeights, swiglu

__all__ = ["attention_stand_in", "hidden_states", "moe_layer", "reference_forward"]

EPSILON = 1e-6


def hidden_states(seed: int, token_T: npt.NDArray[np.int64], hidden_size: int) -> npt.NDArray[np.float32]:
    """First hidden states of the tokens with these indices, (T, H): uniform in [-sqrt 3, sqrt 3), of variance 1.

    A hash of (seed, token, column), so that every rank can make its own tokens' and no other's.
    """
    column_H = np.arange(hidden_size).astype(np.uint64)
    with np.errstate(over="ignore"):
        x = np.asarray(token_T.astype(np.uint64)[:, None] * np.uint64(hidden_size) + column_H, dtype=np.uint64)
        x = (x + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    unit = (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return (unit - np.float32(0.5)) * np.float32(12.0**0.5)


def attention_stand_in(residual_TH: Tensor) -> Tensor:
    """Root-mean-square norm of the residual stream, (T, H): all that replay keeps of a layer's other half."""
    return functional.rms_norm(residual_TH, (residual_TH.shape[1],), eps=EPSILON)


def moe_layer(
    x_TH: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    load: Callable[[int], ExpertWeights],
    *,
    rank_TK: Tensor | None = None,
    ranks_per_node: int | None = None,
) -> Tensor:
    """sum over k ascending of weight_k * expert_k(x), (T, H), float32 inside; entries of -1 count as nothing.

    With `rank_TK` (the rank that computes each choice) the sum has the order of `per_rank` dispatch: inside each rank
    first, rounded to x's type as if sent, then over ranks ascending; with `ranks_per_node` that of `per_node`: the same
    inside each node first, rounded, then over nodes ascending.
    """
    result_TKH = x_TH.new_zeros(*expert_TK.shape, x_TH.shape[1])
    for expert in torch.unique(expert_TK[expert_TK >= 0]).tolist():
        token_X, column_X = torch.nonzero(expert_TK == expert, as_tuple=True)
        rows_XH = x_TH.new_zeros(len(token_X) + -len(token_X) % ROW_MULTIPLE, x_TH.shape[1])
        rows_XH[: len(token_X)] = x_TH[token_X]
        result_TKH[token_X, column_X] = swiglu(rows_XH, load(expert))[: len(token_X)]
    if rank_TK is None:
        return _sum_in_order(result_TKH, weight_TK, expert_TK >= 0).to(x_TH.dtype)
    total_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    if ranks_per_node is not None:
        node_TK = torch.where(rank_TK >= 0, rank_TK // ranks_per_node, -1)
        for node in torch.unique(node_TK[node_TK >= 0]).tolist():
            inside_TK = torch.where(node_TK == node, rank_TK, -1)
            total_TH += _sum_over_ranks(result_TKH, weight_TK, inside_TK, x_TH.dtype).to(x_TH.dtype).float()
        return total_TH.to(x_TH.dtype)
    return _sum_over_ranks(result_TKH, weight_TK, rank_TK, x_TH.dtype).to(x_TH.dtype)


def _sum_over_ranks(result_TKH: Tensor, weight_TK: Tensor, rank_TK: Tensor, dtype: torch.dtype) -> Tensor:
    total_TH = torch.zeros(result_TKH.shape[0], result_TKH.shape[2], dtype=torch.float32, device=result_TKH.device)
    for rank in torch.unique(rank_TK[rank_TK >= 0]).tolist():
        total_TH += _sum_in_order(result_TKH, weight_TK, rank_TK == rank).to(dtype).float()
    return total_TH


def _sum_in_order(result_TKH: Tensor, weight_TK: Tensor, counted_TK: Tensor) -> Tensor:
    total_TH = torch.zeros(result_TKH.shape[0], result_TKH.shape[2], dtype=torch.float32, device=result_TKH.device)
    for k in range(result_TKH.shape[1]):
        term_TH = result_TKH[:, k].float() * weight_TK[:, k, None]
        total_TH += torch.where(counted_TK[:, k, None], term_TH, 0.0)
    return total_TH


def reference_forward(
    seed: int,
    hidden_size: int,
    expert_LTK: Tensor,
    weight_LTK: Tensor,
    load: Callable[[int, int], ExpertWeights],
    *,
    dtype: torch.dtype,
    rank_LTK: Tensor | None = None,
    ranks_per_node: int | None = None,
) -> Tensor:
    """Residual stream (T, H) of all tokens after all layers; `load(site, expert)` gives weights, one at a time."""
    layers, tokens = expert_LTK.shape[:2]
    device = expert_LTK.device
    residual_TH = torch.from_numpy(hidden_states(seed, np.arange(tokens), hidden_size)).to(dtype=dtype, device=device)
    for layer in range(layers):
        x_TH = attention_stand_in(residual_TH)
        rank_TK = None if rank_LTK is None else rank_LTK[layer]
        update_TH = moe_layer(
            x_TH,
            expert_LTK[layer],
            weight_LTK[layer],
            partial(load, layer),
            rank_TK=rank_TK,
            ranks_per_node=ranks_per_node,
        )
        residual_TH = residual_TH + update_TH
    return residual_TH
