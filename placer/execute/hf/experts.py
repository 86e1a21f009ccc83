"""The module that takes the place of a model's experts: it sends tokens to the ranks that hold theirs, and back.

Legend: T tokens that the model computes on this rank (padding too), N of them that are routed, K top-k, H hidden size,
P slots of one rank, L MoE layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.plan import Plan
from placer.core.replicas import LayerSlots, choose_slots
from placer.execute.dispatch import DispatchMetadata, combine, dispatch
from placer.execute.experts import ExpertWeights, grouped_ffn
from placer.execute.job import ExecutionMode

__all__ = ["DistributedExperts", "Step"]

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Step:
    """What all layers of a rank need to know of the step that is running; the caller changes it before each step.

    routed_N     indices among the model's tokens of those that are routed (no padding), or None for all
    token_N      an id of each routed token, the same wherever it runs: replica choices may hash it
    mark, beat   called at the end and at the beginning of each phase
    counts_L3    copies sent to and received from other ranks, and pairs computed, by layer
    kept         (expert ids, router weights) of each layer, (N, K) each, where `keep` is set
    """

    plan: Plan
    mode: ExecutionMode
    rank: int
    mark: Callable[[], None]
    beat: Callable[[int, int], None]
    counts_L3: IntArray
    routed_N: Tensor | None = None
    token_N: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    keep: bool = False
    kept: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=list)


class DistributedExperts(nn.Module):
    """The experts of one layer over all ranks; a call is collective, with or without tokens.

    `experts_P` are those that the plan puts on this rank. Which replica serves a token is chosen here, on the
    processor, and counts as dispatch.
    """

    def __init__(self, site: int, slots: LayerSlots, experts_P: Sequence[ExpertWeights | None], step: Step) -> None:
        super().__init__()
        self.site, self.slots, self.experts_P, self.step = site, slots, tuple(experts_P), step

    def forward(self, hidden_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """sum over k of weight_k * expert_k(hidden), (T, H); zero for tokens that are not routed."""
        step, site = self.step, self.site
        step.mark()
        step.beat(site, 1)
        routed_N = step.routed_N
        x_NH = hidden_TH if routed_N is None else hidden_TH[routed_N]
        expert_NK = (expert_TK if routed_N is None else expert_TK[routed_N]).cpu().numpy()
        weight_NK = (weight_TK if routed_N is None else weight_TK[routed_N]).float()
        assert len(x_NH) == len(step.token_N)
        source_N = np.full(len(x_NH), step.rank, dtype=np.int64)
        slot_NK = choose_slots(self.slots, step.plan.replica_choice, expert_NK, source_N, step.token_N)
        slots = torch.from_numpy(slot_NK).to(hidden_TH.device)
        per_rank = step.plan.slots_per_rank
        rows_XH, rows_P, metadata = dispatch(x_NH, slots, weight_NK, mode=step.mode, slots_per_rank=per_rank)
        step.mark()
        step.beat(site, 2)
        out_XH = grouped_ffn(rows_XH, rows_P, self.experts_P)
        step.mark()
        step.beat(site, 3)
        y_NH = combine(out_XH, metadata)
        step.mark()
        step.beat(min(site + 1, len(step.counts_L3) - 1), 0)
        step.counts_L3[site] = _counts(metadata, step.rank)
        if step.keep:
            step.kept.append((expert_NK, weight_NK.cpu().numpy()))
        return y_NH if routed_N is None else torch.zeros_like(hidden_TH).index_copy_(0, routed_N, y_NH)

    def join(self, top_k: int, like: Tensor) -> None:
        """Takes part in the layer's exchange without a token; `like` (0, H) has the hidden states' type and device."""
        nothing = torch.zeros(0, top_k, dtype=torch.int64, device=like.device)
        self(like, nothing, nothing.float())


def _counts(metadata: DispatchMetadata, rank: int) -> tuple[int, int, int]:
    sent, received = sum(metadata.send_R), sum(metadata.receive_R)
    return sent - metadata.send_R[rank], received - metadata.receive_R[rank], metadata.pairs
