"""The module that takes the place of a model's experts on one device: it chooses levels, loads planes and computes.

Legend: T tokens that the model computes (padding too), N of them that are routed, K top-k, H hidden size, E experts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.errors import UsageError
from placer.execute.device.rows import ItemRows, weighted_choices
from placer.execute.device.session import Session

__all__ = ["DeviceExperts", "DeviceStep", "LevelsOf"]

IntArray = npt.NDArray[np.int64]

LevelsOf = Callable[[int, Tensor, IntArray], IntArray]
"""(site, hidden states (N, H), experts (N, K)) -> the level, from 1, that each choice demands, (N, K)."""


class DeviceStep:
    """What a session's layers need to know of the step that is running, in the names that `hf.RankBatch` uses."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.kind = "prefill"
        self.routed_N: Tensor | None = None
        self.token_N: IntArray = np.zeros(0, dtype=np.int64)
        self.begin: Any = None
        self.spans: list[Any] = []

    def attended(self, site: int) -> None:
        """Ends a span of attention in front of `site` (-1: behind the last)."""
        self.session.runner.attended(site, len(self.token_N))


class DeviceExperts(nn.Module):
    """The experts of one site, their planes read as the session's plan says.

    levels_of   what each choice demands, from 1; clipped to the plan's ceilings. None: the ladder's highest
    """

    def __init__(self, site: int, session: Session, step: DeviceStep, levels_of: LevelsOf | None = None) -> None:
        super().__init__()
        self.site, self.session, self.step, self.levels_of = site, session, step, levels_of

    def forward(self, hidden_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """sum over k, ascending, of weight_k * expert_k(hidden) at k's level, (T, H); zero for what is not routed.

        Raises UsageError for a level that is not on the ladder.
        """
        routed_N, plan = self.step.routed_N, self.session.plan
        x_NH = hidden_TH if routed_N is None else hidden_TH[routed_N]
        expert_NK = (expert_TK if routed_N is None else expert_TK[routed_N]).numpy().astype(np.int64)
        weight_NK = (weight_TK if routed_N is None else weight_TK[routed_N]).float()
        if self.levels_of is None:
            level_NK = np.full(expert_NK.shape, plan.ladder.levels, dtype=np.int64)
        else:
            level_NK = np.asarray(self.levels_of(self.site, x_NH, expert_NK), dtype=np.int64)
            if level_NK.shape != expert_NK.shape or (
                level_NK.size and not 1 <= int(level_NK.min()) <= int(level_NK.max()) <= plan.ladder.levels
            ):
                raise UsageError(
                    f"levels_of gave {level_NK.shape} levels up to {level_NK.max(initial=0)} for {expert_NK.shape} "
                    f"choices; levels go from 1 to {plan.ladder.levels}"
                )
        level_NK = np.minimum(level_NK, plan.ceiling_LE[self.site][expert_NK])
        rows = ItemRows(expert_NK, level_NK, plan.num_experts, plan.ladder.levels)
        y_NH = weighted_choices(self.session.runner.run(self.site, x_NH, rows), weight_NK)
        return y_NH if routed_N is None else torch.zeros_like(hidden_TH).index_copy_(0, routed_N, y_NH)
