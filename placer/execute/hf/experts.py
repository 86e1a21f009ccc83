"""The module that takes the place of a model's experts: it sends tokens to the ranks that hold theirs, and back.

Legend: T tokens that the model computes on this rank (padding too), N of them that are routed, K top-k, H hidden size,
P slots of one rank, L MoE layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.plan import Plan
from placer.core.replicas import LayerSlots, choose_slots
from placer.core.schedule import Kind
from placer.core.timeline import PHASES
from placer.execute.dispatch import SHIPMENTS, Carriage, Fabric, run_layer
from placer.execute.dispatch.lanes import Lanes, stamp
from placer.execute.dispatch.layer import Span
from placer.execute.experts import ExpertWeights, grouped_ffn
from placer.execute.job import ExecutionMode

__all__ = ["DistributedExperts", "Step"]

IntArray = npt.NDArray[np.int64]
ATTENTION = PHASES.index("attention")


@dataclass(slots=True, kw_only=True)
class Step:
    """What all layers of a rank need to know of the step that is running; the caller changes it before each step.

    fabric       where this rank is; set before the first step
    carriages    how each layer's all-to-alls run, by kind of step
    kind         prefill or decode, the same on all ranks
    routed_N     indices among the model's tokens of those that are routed (no padding), or None for all
    token_N      an id of each routed token, the same wherever it runs: replica choices may hash it
    beat         called with site and phase at the beginning of each phase
    begin        the stamp at which the span that is running began
    spans        (site, span) of all that the step has done: four for each layer, without gaps
    kept         (expert ids, router weights) of each layer, (N, K) each, where `keep` is set
    """

    plan: Plan
    mode: ExecutionMode
    rank: int
    carriages: Mapping[Kind, Sequence[Carriage]]
    lanes: Lanes
    beat: Callable[[int, int], None]
    fabric: Fabric | None = None
    kind: Kind = "prefill"
    routed_N: Tensor | None = None
    token_N: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    begin: Any = None
    spans: list[tuple[int, Span]] = field(default_factory=list)
    keep: bool = False
    kept: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=list)

    def attended(self, site: int) -> Any:
        """Ends a span of attention in front of `site` (-1: behind the last), and returns the stamp of its end."""
        end = stamp(self.lanes.device)
        self.spans.append((site, Span(ATTENTION, self.begin, end, tokens=len(self.token_N))))
        return end


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
        assert step.fabric is not None
        attended = step.attended(site)
        routed_N = step.routed_N
        x_NH = hidden_TH if routed_N is None else hidden_TH[routed_N]
        expert_NK = (expert_TK if routed_N is None else expert_TK[routed_N]).cpu().numpy()
        weight_NK = (weight_TK if routed_N is None else weight_TK[routed_N]).float()
        assert len(x_NH) == len(step.token_N)
        source_N = np.full(len(x_NH), step.rank, dtype=np.int64)
        chosen_NK = choose_slots(self.slots, step.plan.replica_choice, expert_NK, source_N, step.token_N)
        slot_NK = torch.from_numpy(chosen_NK).to(hidden_TH.device)
        shipment = SHIPMENTS[step.mode](
            step.fabric, step.carriages[step.kind][site], x_NH, slot_NK, weight_NK, step.plan.slots_per_rank
        )
        experts = partial(grouped_ffn, experts_P=self.experts_P)
        (y_NH,), spans = run_layer([shipment], experts, step.lanes, attended, partial(step.beat, site))
        step.spans += [(site, span) for span in spans]
        step.begin = spans[-1].end
        step.beat(min(site + 1, len(step.plan.slot_expert_LP) - 1), ATTENTION)
        if step.keep:
            step.kept.append((expert_NK, weight_NK.cpu().numpy()))
        return y_NH if routed_N is None else torch.zeros_like(hidden_TH).index_copy_(0, routed_N, y_NH)

    def join(self, top_k: int, like: Tensor) -> None:
        """Takes part in the layer's exchange without a token; `like` (0, H) has the hidden states' type and device."""
        nothing = torch.zeros(0, top_k, dtype=torch.int64, device=like.device)
        self(like, nothing, nothing.float())
