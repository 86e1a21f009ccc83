"""How well a model predicts text with other weights in its experts.

Legend: L routing sites, E experts, Q texts, S positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from placer.core.device.planes import PlaneIndex, plane_key
from placer.core.errors import MismatchError, UsageError
from placer.execute.experts import ExpertFile, ExpertWeights
from placer.execute.hf.architectures import require_transformers
from placer.execute.planes.inputs import ReplacedExperts, checked_tokens, run_model
from placer.execute.planes.weights import expert_weights
from traces.tensorfile import read_tensor_file

__all__ = ["Perplexity", "WeightsOf", "perplexity", "plane_weights"]

WeightsOf = Callable[[int, int], ExpertWeights]
"""The weights of an expert, given its site and number (both from 0)."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-likelihood of `tokens` next tokens, in nats."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


def perplexity(model_path: Path, weights_of: WeightsOf | None, tokens_QS: npt.NDArray[np.integer]) -> Perplexity:
    """The model's perplexity on texts (texts, positions) with these experts; None: with its own.

    Everything outside the experts is as in the checkpoint, in float32. Raises InputFileError, UsageError.
    """
    require_transformers()
    from placer.execute.hf.backbone import load_backbone

    backbone = load_backbone(Path(model_path), dtype=torch.float32, device=torch.device("cpu"))
    tokens = checked_tokens(tokens_QS, "held-out", backbone.vocab_size)
    with ExpertFile(Path(model_path), clamped=backbone.clamped) as file:

        def own(site: int, expert: int) -> ExpertWeights:
            return file.load(backbone.layer_L[site], expert, dtype=torch.float32)

        for site, block in enumerate(backbone.blocks_L):
            block.experts = ReplacedExperts(_at(own if weights_of is None else weights_of, site), None)
        total, start = 0.0, 0
        for logits_QSV in run_model(backbone, tokens):
            wanted_QS = torch.from_numpy(tokens[start : start + len(logits_QSV), 1:])
            start += len(logits_QSV)
            predicted_NV = logits_QSV[:, :-1].float().flatten(0, 1)
            total += float(functional.cross_entropy(predicted_NV, wanted_QS.flatten(), reduction="sum"))
    count = len(tokens) * (tokens.shape[1] - 1)
    return Perplexity(total / count, count)


def plane_weights(index: PlaneIndex, level: int | npt.NDArray[np.integer]) -> WeightsOf:
    """The experts of a plane file, all at one level (from 1) or each at its own, (L, E); read when asked for.

    Raises MismatchError for a table of another shape, UsageError for a level that is not on the ladder.
    """
    shape = index.shape_LEK[:2]
    level_LE = np.broadcast_to(np.asarray(level), shape) if np.ndim(level) == 0 else np.asarray(level)
    if level_LE.shape != shape:
        raise MismatchError(f"levels are given for {level_LE.shape} (sites, experts); the planes are {shape}")
    if level_LE.size and not 1 <= int(level_LE.min()) <= int(level_LE.max()) <= index.ladder.levels:
        raise UsageError(
            f"levels {int(level_LE.min())} to {int(level_LE.max())} are asked for; the ladder has 1 to "
            f"{index.ladder.levels}"
        )
    arrays = read_tensor_file(index.path).arrays

    def weights_of(site: int, expert: int) -> ExpertWeights:
        planes = index.ladder.planes_of(int(level_LE[site, expert]))
        names = [plane_key(index.moe_layers[site], expert, plane) for plane in planes]
        raws = [torch.from_numpy(arrays[name].copy()) for name in names]
        return expert_weights(raws, index.ladder, index.shapes)

    return weights_of


def _at(weights_of: WeightsOf, site: int) -> Callable[[int], ExpertWeights]:
    return lambda expert: weights_of(site, expert)
