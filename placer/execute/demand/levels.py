"""The weights of every expert at every level, in memory, and a layer's output when each token names its levels.

Legend: L routing sites, E experts, K levels of the ladder, T tokens, C experts of a token (top-k), X = T * C uses,
H hidden size.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from placer.core.device.planes import PlaneIndex
from placer.core.errors import UsageError
from placer.execute.experts import ExpertFile, ExpertWeights, grouped_ffn
from placer.execute.planes import plane_weights
from traces.hf_config import model_from_hf_config
from traces.plane_store import verify_planes

__all__ = ["LevelWeights", "LevelsOf", "full_weights", "level_weights", "run_levels"]

LevelsOf = Callable[[int, Tensor, Tensor], Tensor]
"""From a site, hidden states (T, H) and expert ids (T, C): the level, from 1, that each token demands, int64 (T, C)."""

FULL_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LevelWeights:
    """Experts at every level; raises UsageError where some lack a level.

    expert_LEK   weights of each expert at each level     bits_K   widths of the levels, ascending
    sha256       of the planes they come from, "" for none
    """

    moe_layers: tuple[int, ...]
    bits_K: tuple[int, ...]
    expert_LEK: tuple[tuple[tuple[ExpertWeights, ...], ...], ...]
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.expert_LEK or len(self.expert_LEK) != len(self.moe_layers):
            raise UsageError(f"level weights have {len(self.expert_LEK)} sites for layers {list(self.moe_layers)}")
        if len({len(expert_EK) for expert_EK in self.expert_LEK}) != 1:
            raise UsageError(
                "level weights have different numbers of experts at different sites; give the same of each"
            )
        if any(len(expert_K) != len(self.bits_K) for expert_EK in self.expert_LEK for expert_K in expert_EK):
            raise UsageError(f"level weights lack a level of some expert; give one for each of {self.bits_K} bits")
        if any(a >= b for a, b in itertools.pairwise(self.bits_K)):
            raise UsageError(f"bits_K is {self.bits_K}; give every width once, ascending")

    @property
    def shape_LEK(self) -> tuple[int, int, int]:
        """Sites, experts, levels."""
        return len(self.expert_LEK), len(self.expert_LEK[0]), len(self.bits_K)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.expert_LEK[0][0][0].down_HI.shape[0])


def level_weights(index: PlaneIndex) -> LevelWeights:
    """Every expert at every level, float32, from a file of planes whose checksums are compared first.

    Raises InputFileError. Complexity: O(L E K) times the weights of an expert, in time and in memory.
    """
    verify_planes(index)
    weights_K = [plane_weights(index, level) for level in range(1, index.ladder.levels + 1)]
    sites, experts, _ = index.shape_LEK
    return LevelWeights(
        moe_layers=index.moe_layers,
        bits_K=index.ladder.bits_K,
        expert_LEK=tuple(
            tuple(tuple(weights_of(site, expert) for weights_of in weights_K) for expert in range(experts))
            for site in range(sites)
        ),
        sha256=index.sha256,
    )


def full_weights(model_path: Path) -> LevelWeights:
    """The checkpoint's own experts as the only level (32 bits). Raises InputFileError."""
    spec = model_from_hf_config(model_path)
    with ExpertFile(model_path) as file:
        expert_LEK = tuple(
            tuple((file.load(layer, expert, dtype=torch.float32),) for expert in range(spec.num_experts))
            for layer in spec.moe_layers
        )
    return LevelWeights(moe_layers=spec.moe_layers, bits_K=(FULL_BITS,), expert_LEK=expert_LEK)


def run_levels(
    expert_EK: tuple[tuple[ExpertWeights, ...], ...],
    hidden_TH: Tensor,
    expert_TC: Tensor,
    weight_TC: Tensor,
    level_TC: Tensor,
) -> Tensor:
    """sum over c of weight_c * expert_c at level_c (hidden), (T, H); tokens of one expert and level run together.

    For inference: gradients are right, but slow.
    """
    levels = len(expert_EK[0])
    group_X = (expert_TC * levels + level_TC - 1).flatten()
    order_X = group_X.argsort(stable=True)
    token_X = order_X // expert_TC.shape[1]
    rows = torch.bincount(group_X, minlength=len(expert_EK) * levels).tolist()
    out_XH = grouped_ffn(hidden_TH[token_X], rows, list(itertools.chain.from_iterable(expert_EK)))
    out_XH = out_XH * weight_TC.flatten()[order_X, None]
    return torch.zeros_like(hidden_TH).index_add(0, token_X, out_XH)
