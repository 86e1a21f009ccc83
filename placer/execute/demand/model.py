"""A model whose experts have levels: the checkpoint's own backbone, and at each MoE layer whatever is to be run there.

Legend: T tokens, C experts of a token (top-k), H hidden size, Q sequences, S positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.errors import MismatchError, UsageError
from placer.core.model import ModelSpec
from placer.execute.demand.levels import LevelWeights
from placer.execute.hf.backbone import Backbone, load_backbone
from traces.hf_config import model_from_hf_config

__all__ = ["LevelModel", "SiteRun", "load_level_model", "next_token_loss"]

SiteRun = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a site, hidden states (T, H), expert ids and router weights (T, C): the experts' output (T, H)."""


class _Experts(nn.Module):
    """Stands where a layer's experts were and calls what is set as `run`."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site
        self.run: SiteRun | None = None

    def forward(self, hidden_TH: Tensor, expert_TC: Tensor, weight_TC: Tensor) -> Tensor:
        assert self.run is not None
        return self.run(self.site, hidden_TH, expert_TC, weight_TC)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LevelModel:
    """A backbone on the processor, frozen, in float32, and the weights of its experts at every level."""

    spec: ModelSpec
    backbone: Backbone
    weights: LevelWeights
    experts_L: tuple[_Experts, ...]

    def logits(self, token_QS: Tensor, run: SiteRun) -> Tensor:
        """Next-token logits (Q, S, V) of whole sequences, with `run` at every site."""
        for experts in self.experts_L:
            experts.run = run
        return self.backbone.model(input_ids=token_QS, use_cache=False).logits

    def tokens(self, sequences: npt.ArrayLike) -> Tensor:
        """Equally long sequences as int64 (Q, S). Raises UsageError for ids that the model does not have."""
        token_QS = np.asarray(sequences)
        if token_QS.ndim != 2 or not token_QS.size or token_QS.dtype.kind not in "iu":
            raise UsageError(f"tokens are {token_QS.dtype} {token_QS.shape}; give whole numbers (sequences, positions)")
        if int(token_QS.min()) < 0 or int(token_QS.max()) >= self.backbone.vocab_size:
            worst = int(token_QS.min()) if int(token_QS.min()) < 0 else int(token_QS.max())
            raise UsageError(f"tokens have id {worst}; the model has ids 0 to {self.backbone.vocab_size - 1}")
        return torch.from_numpy(token_QS.astype(np.int64))


def load_level_model(model_path: Path, weights: LevelWeights) -> LevelModel:
    """The model in a checkpoint folder, its experts replaced by `weights`.

    Raises InputFileError for a folder that is no checkpoint, MismatchError where the weights are of another model.
    """
    backbone = load_backbone(model_path, dtype=torch.float32, device=torch.device("cpu"))
    spec = model_from_hf_config(model_path, name=Path(model_path).resolve().name)
    if backbone.clamped is not None:
        raise MismatchError(f"{model_path}: its experts have biases, which planes do not hold; give a model without")
    for name, planes, found in (
        ("MoE layers at", weights.moe_layers, backbone.layer_L),
        ("experts a layer:", weights.shape_LEK[1], spec.num_experts),
        ("a hidden size of", weights.hidden_size, backbone.hidden_size),
    ):
        if planes != found:
            raise MismatchError(
                f"the planes are of a model with {name} {_text(planes)}, the one in {model_path} has {_text(found)}; "
                "quantise this model"
            )
    experts_L = tuple(_Experts(site) for site in range(len(backbone.layer_L)))
    for block, experts in zip(backbone.blocks_L, experts_L, strict=True):
        block.experts = experts
    return LevelModel(spec=spec, backbone=backbone, weights=weights, experts_L=experts_L)


def next_token_loss(logits_QSV: Tensor, token_QS: Tensor) -> Tensor:
    """Cross-entropy of every next token, nats, (Q * (S - 1),)."""
    return nn.functional.cross_entropy(
        logits_QSV[:, :-1].flatten(0, 1).float(), token_QS[:, 1:].flatten(), reduction="none"
    )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
