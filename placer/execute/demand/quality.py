"""What levels cost in quality: loss on held-out text and error of each layer's output, for any demand and ceilings.

Legend: L routing sites, E experts, K levels of the ladder, T tokens, C experts of a token (top-k), H hidden size.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.errors import MismatchError, UsageError
from placer.execute.demand.levels import LevelsOf, LevelWeights, run_levels
from placer.execute.demand.model import LevelModel, next_token_loss
from traces.summarize import Progress

__all__ = ["HeldOut", "LevelRun", "drawn_levels", "held_out_loss"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
SEQUENCES_PER_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Quality on held-out text.

    nats_per_token    cross-entropy, mean over all next tokens       nats_Q    the same for each sequence
    count_LEK         (token, expert) uses at exactly each level
    output_error_L    squared error of each layer's experts' output over that output squared, both from the same inputs
                      at that layer, beside full weights; None where no reference is given
    """

    nats_per_token: float
    nats_Q: FloatArray
    count_LEK: IntArray
    output_error_L: FloatArray | None

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(self.nats_per_token)

    def mean_bits(self, bits_K: tuple[int, ...]) -> float:
        """Bits of a use, mean over all uses."""
        return float(self.count_LEK.sum(axis=(0, 1)) @ np.asarray(bits_K)) / max(1, int(self.count_LEK.sum()))


class LevelRun:
    """Runs a site at the levels that `demand` names (one level for all, or a function), clipped to ceilings.

    Counts what it used, and keeps expert ids and demanded levels, (T, C) each, where `keep` is set. Raises UsageError
    for a level that the weights do not have, MismatchError for ceilings of another shape.
    """

    def __init__(
        self,
        weights: LevelWeights,
        demand: int | LevelsOf,
        *,
        ceiling_LE: IntArray | None = None,
        reference: LevelWeights | None = None,
        keep: bool = False,
    ) -> None:
        sites, experts, levels = self.shape_LEK = weights.shape_LEK
        if isinstance(demand, int) and not 1 <= demand <= levels:
            raise UsageError(f"level is {demand}; the ladder has levels 1 to {levels}")
        if ceiling_LE is not None:
            if ceiling_LE.shape != (sites, experts):
                raise MismatchError(f"ceilings are {ceiling_LE.shape}; the planes have {(sites, experts)}")
            if not 1 <= int(ceiling_LE.min()) <= int(ceiling_LE.max()) <= levels:
                raise UsageError(
                    f"ceilings are {int(ceiling_LE.min())} to {int(ceiling_LE.max())}; the ladder has levels 1 to "
                    f"{levels}"
                )
        if reference is not None and reference.shape_LEK[:2] != (sites, experts):
            raise MismatchError(
                f"the reference has {reference.shape_LEK[:2]} sites and experts, not {(sites, experts)}"
            )
        self._weights, self._demand, self._reference, self._keep = weights, demand, reference, keep
        self._ceiling_LE = None if ceiling_LE is None else torch.from_numpy(ceiling_LE.astype(np.int64))
        self.count_LEK = np.zeros(self.shape_LEK, dtype=np.int64)
        self._square_L2 = np.zeros((sites, 2))
        self.kept_L: list[list[tuple[IntArray, IntArray]]] = [[] for _ in range(sites)]

    @property
    def output_error_L(self) -> FloatArray | None:
        """Relative squared error of what each site gave so far."""
        if self._reference is None:
            return None
        return self._square_L2[:, 0] / np.maximum(self._square_L2[:, 1], np.finfo(np.float64).tiny)

    def __call__(self, site: int, hidden_TH: Tensor, expert_TC: Tensor, weight_TC: Tensor) -> Tensor:
        """The experts' output, (T, H)."""
        _, experts, levels = self.shape_LEK
        if isinstance(self._demand, int):
            level_TC = torch.full_like(expert_TC, self._demand)
        else:
            level_TC = self._demand(site, hidden_TH, expert_TC)
            if level_TC.shape != expert_TC.shape or not 1 <= int(level_TC.min()) <= int(level_TC.max()) <= levels:
                raise UsageError(
                    f"site {site} is demanded at levels {int(level_TC.min())} to {int(level_TC.max())}, shape "
                    f"{tuple(level_TC.shape)}; give 1 to {levels} for each of {tuple(expert_TC.shape)}"
                )
        if self._keep:
            self.kept_L[site].append((expert_TC.numpy(), level_TC.numpy()))
        if self._ceiling_LE is not None:
            level_TC = torch.minimum(level_TC, self._ceiling_LE[site][expert_TC])
        flat_X = (expert_TC * levels + level_TC - 1).flatten()
        self.count_LEK[site] += torch.bincount(flat_X, minlength=experts * levels).view(experts, levels).numpy()
        out_TH = run_levels(self._weights.expert_LEK[site], hidden_TH, expert_TC, weight_TC, level_TC)
        if self._reference is not None:
            full_TH = run_levels(
                self._reference.expert_LEK[site], hidden_TH, expert_TC, weight_TC, torch.ones_like(expert_TC)
            )
            self._square_L2[site] += [float((out_TH - full_TH).square().sum()), float(full_TH.square().sum())]
        return out_TH


@torch.no_grad()
def held_out_loss(
    model: LevelModel,
    tokens: npt.ArrayLike,
    demand: int | LevelsOf,
    *,
    ceiling_LE: IntArray | None = None,
    reference: LevelWeights | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Loss of the model on `tokens`, whole numbers (Q, S), each sequence on its own.

    demand       one level for every use, or what bit routers name (`BitRouters.levels_of`)
    ceiling_LE   a plan's ceilings, to which demand is clipped
    reference    full weights, to measure the layers' output error with (about doubles the time)

    Raises UsageError and MismatchError. Complexity: one forward pass.
    """
    token_QS = model.tokens(tokens)
    if token_QS.shape[1] < 2:
        raise UsageError(f"tokens have {token_QS.shape[1]} position; a next token needs 2 or more")
    run = LevelRun(model.weights, demand, ceiling_LE=ceiling_LE, reference=reference)
    parts = []
    for batch_BS in token_QS.split(SEQUENCES_PER_BATCH):
        loss_T = next_token_loss(model.logits(batch_BS, run), batch_BS)
        parts.append(loss_T.double().view(len(batch_BS), -1).mean(dim=1).numpy())
        if progress is not None:
            progress(min(len(parts) * SEQUENCES_PER_BATCH, len(token_QS)), len(token_QS))
    nats_Q = np.concatenate(parts)
    return HeldOut(
        nats_per_token=float(nats_Q.mean()),
        nats_Q=nats_Q,
        count_LEK=run.count_LEK,
        output_error_L=run.output_error_L,
    )


def drawn_levels(share_LEK: FloatArray, seed: int) -> LevelsOf:
    """A demand that looks at no token: levels drawn with these shares for each site and expert.

    What trained routers must beat. Rows of `share_LEK` add up to 1, or to 0 for an expert that is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    edge_LEK = torch.from_numpy(np.cumsum(share_LEK, axis=2))

    def levels_of(site: int, hidden_TH: Tensor, expert_TC: Tensor) -> Tensor:
        drawn_TC = torch.rand(expert_TC.shape, generator=generator, dtype=torch.float64)
        below_TCK = edge_LEK[site][expert_TC][..., :-1] <= drawn_TC[..., None]
        return below_TCK.sum(dim=-1) + 1

    return levels_of
