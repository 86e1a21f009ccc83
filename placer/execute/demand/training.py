"""Training of bit routers with D2MoE's capacity and loss; backbone and experts stay as they are.

Legend: L routing sites, E experts, K levels of the ladder, T tokens, C experts of a token (top-k), X = T * C uses in
order of experts, H hidden size, Q sequences, S positions.
"""

from collections.abc import Sequence

import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.errors import ExecutionError, UsageError
from placer.execute.demand.levels import LevelWeights
from placer.execute.demand.model import LevelModel, next_token_loss
from placer.execute.demand.routers import BitRouters
from placer.execute.experts import ExpertWeights, swiglu
from traces.summarize import Progress

__all__ = ["CAPACITIES", "TrainingPass", "bit_router_loss", "train_bit_routers", "within_capacity"]

CAPACITIES: dict[tuple[int, ...], tuple[float, ...]] = {
    (2, 3, 4): (0.3, 0.4, 0.3),
    (5, 6, 7, 8): (0.25, 0.25, 0.25, 0.25),
}
"""D2MoE's capacity of each level, by the widths of its two ladders; other ladders get equal shares."""

TOKENS_PER_STEP = 2048
LEARNING_RATE = 2e-2
ROUNDING = 1e-9


def train_bit_routers(
    model: LevelModel,
    tokens: npt.ArrayLike,
    *,
    alpha: float,
    seed: int,
    steps: int,
    capacity_K: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> BitRouters:
    """Bit routers trained on `tokens`, whole numbers (Q, S), a few sequences drawn at every step.

    alpha        weight of the mean bits in the loss, nats for a bit
    capacity_K   share of an expert's tokens that each level takes in a forward pass (None: D2MoE's)

    What the paper leaves open is decided here. T of "at most c_k T tokens" is the tokens routed to that expert in that
    pass; a token beyond gets nothing from the expert, so that its level is not rewarded. The output is the chosen
    level's, and its gradient that of the mean over all levels weighted by their probabilities (straight-through), so
    that levels are compared with one another. The mean bits of a layer are over the token's experts. Adam, its step
    falling to nothing.

    The same seed gives the same routers on the same number of threads. Raises UsageError, and ExecutionError where the
    loss is no number. Complexity: O(K) times a training step of the model without weight gradients.
    Reference: D2MoE (arXiv 2504.15299), dual routing.
    """
    token_QS = model.tokens(tokens)
    bits_K = model.weights.bits_K
    capacity_K = _refuse_odd(alpha, steps, token_QS, capacity_K, bits_K)
    generator = torch.Generator().manual_seed(seed)
    routers = BitRouters.untrained(model, generator)
    # Adam moves every weight alike: a state of H numbers must not outweigh the bias H times
    rates = {routers.bias_LEK: LEARNING_RATE, routers.weight_LEKH: LEARNING_RATE / model.backbone.hidden_size}
    optimizer = torch.optim.Adam([{"params": [tensor], "lr": rate} for tensor, rate in rates.items()])
    sequences = max(1, TOKENS_PER_STEP // token_QS.shape[1])
    last = {}
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 - step / steps)
        drawn = torch.randint(len(token_QS), (sequences,), generator=generator)
        batch_BS = token_QS[drawn]
        one = TrainingPass(routers, model.weights, capacity_K, generator)
        entropy_T = next_token_loss(model.logits(batch_BS, one.run), batch_BS)
        loss = bit_router_loss(entropy_T, one.probability_L, bits_K, alpha)
        if not torch.isfinite(loss):
            raise ExecutionError(
                f"step {step} has loss {loss.detach().item()}; the planes or the model hold no numbers"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = {
            "nats_per_token": entropy_T.detach().mean().item(),
            "mean_bits": _mean_bits(one.probability_L, bits_K),
            "dropped": one.dropped,
        }
        if progress is not None:
            progress(step + 1, steps)
    routers.requires_grad_(requires_grad=False)
    routers.about = {
        "alpha": alpha,
        "capacity": list(capacity_K),
        "planes_sha256": model.weights.sha256,
        "seed": seed,
        "steps": steps,
        "tokens": steps * sequences * token_QS.shape[1],
        "last_step": last,
    }
    return routers


def bit_router_loss(entropy_T: Tensor, probability_L: Sequence[Tensor], bits_K: Sequence[int], alpha: float) -> Tensor:
    """mean over tokens of [CE + (alpha / L) * sum over sites and levels of p_k b_k]; p of a site is (T, C, K).

    The last token of a sequence has bits and no CE; each mean is over its own tokens.
    """
    width_K = torch.tensor(bits_K, dtype=entropy_T.dtype)
    mean_L = torch.stack([(probability_TCK @ width_K).mean() for probability_TCK in probability_L])
    return entropy_T.mean() + alpha * mean_L.mean()


def within_capacity(group_X: Tensor, capacity_G: Tensor, generator: torch.Generator) -> Tensor:
    """Which uses their group takes, (X,) bool: of each group a random `capacity_G`, all where they are no more.

    Complexity: O(X log X).
    """
    shuffled_X = torch.randperm(len(group_X), generator=generator)
    order_X = shuffled_X[group_X[shuffled_X].argsort(stable=True)]
    rows_G = torch.bincount(group_X, minlength=len(capacity_G))
    start_G = rows_G.cumsum(0) - rows_G
    rank_X = torch.arange(len(group_X)) - start_G[group_X[order_X]]
    taken_X = torch.zeros(len(group_X), dtype=torch.bool)
    taken_X[order_X] = rank_X < capacity_G[group_X[order_X]]
    return taken_X


class TrainingPass:
    """One forward pass of training: what every site is to run, the probabilities it gave, the share of uses dropped."""

    def __init__(
        self, routers: BitRouters, weights: LevelWeights, capacity_K: Sequence[float], generator: torch.Generator
    ) -> None:
        self._routers, self._weights, self._generator = routers, weights, generator
        self._capacity_K = torch.tensor(capacity_K, dtype=torch.float64)
        self.probability_L: list[Tensor] = []
        self._uses = self._dropped = 0

    @property
    def dropped(self) -> float:
        """Share of (token, expert) uses beyond capacity."""
        return self._dropped / max(1, self._uses)

    def run(self, site: int, hidden_TH: Tensor, expert_TC: Tensor, weight_TC: Tensor) -> Tensor:
        """The experts' output, (T, H), differentiable in the routers."""
        expert_EK = self._weights.expert_LEK[site]
        levels = len(self._capacity_K)
        probability_TCK = self._routers.probabilities(site, hidden_TH, expert_TC)
        self.probability_L.append(probability_TCK)
        order_X = expert_TC.flatten().argsort(stable=True)
        token_X, expert_X = order_X // expert_TC.shape[1], expert_TC.flatten()[order_X]
        rows_E = torch.bincount(expert_X, minlength=len(expert_EK))
        probability_XK = probability_TCK.flatten(0, 1)[order_X]
        level_X = probability_XK.detach().argmax(dim=-1)
        capacity_EK = (rows_E[:, None] * self._capacity_K + ROUNDING).floor()
        taken_X = within_capacity(expert_X * levels + level_X, capacity_EK.flatten(), self._generator)
        self._uses, self._dropped = self._uses + len(taken_X), self._dropped + int((~taken_X).sum())
        out_KXH = _all_levels(expert_EK, hidden_TH[token_X].split(rows_E.tolist()))
        mean_XH = torch.einsum("xk,kxh->xh", probability_XK, out_KXH)
        # the value of the likeliest level, the gradient of the mean
        likeliest_XH = out_KXH.detach()[level_X, torch.arange(len(level_X))]
        out_XH = mean_XH + (likeliest_XH - mean_XH.detach())
        out_XH = out_XH * (taken_X * weight_TC.flatten()[order_X])[:, None]
        return torch.zeros_like(hidden_TH).index_add(0, token_X, out_XH)


def _all_levels(expert_EK: Sequence[Sequence[ExpertWeights]], input_E: Sequence[Tensor]) -> Tensor:
    """Each expert's output at every level for its own rows, (K, X, H)."""
    used = [(expert_K, x_XH) for expert_K, x_XH in zip(expert_EK, input_E, strict=True) if len(x_XH)]
    return torch.cat([torch.stack([swiglu(x_XH, one) for one in expert_K]) for expert_K, x_XH in used], dim=1)


def _mean_bits(probability_L: Sequence[Tensor], bits_K: Sequence[int]) -> float:
    """Bits of the likeliest levels, mean over all uses."""
    width_K = torch.tensor(bits_K, dtype=torch.float64)
    return float(torch.stack([width_K[p_TCK.argmax(-1)].mean() for p_TCK in probability_L]).mean())


def _refuse_odd(
    alpha: float, steps: int, token_QS: Tensor, capacity_K: Sequence[float] | None, bits_K: tuple[int, ...]
) -> tuple[float, ...]:
    if not 0 <= alpha < float("inf"):
        raise UsageError(f"alpha is {alpha!r}; give the nats that a bit costs, 0 or more")
    if steps < 1:
        raise UsageError(f"steps is {steps}; give 1 or more")
    if token_QS.shape[1] < 2:
        raise UsageError(f"tokens have {token_QS.shape[1]} position; a next token needs 2 or more")
    if capacity_K is None:
        return CAPACITIES.get(bits_K, (1 / len(bits_K),) * len(bits_K))
    if len(capacity_K) != len(bits_K) or not all(0 < share <= 1 for share in capacity_K):
        raise UsageError(
            f"capacity_K is {tuple(capacity_K)}; give a share above 0, at most 1, for each of {bits_K} bits"
        )
    return tuple(capacity_K)
