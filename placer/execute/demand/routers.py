"""Bit routers: a linear map in front of every expert that says at which level a token uses it (D2MoE section 4.2).

Legend: L routing sites, E experts, K levels of the ladder, T tokens, C experts of a token (top-k), H hidden size.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.device.planes import PlaneIndex
from placer.core.errors import InputFileError, MismatchError
from placer.execute.demand.model import LevelModel
from traces.tensorfile import TensorSpec, read_tensor_file, write_tensor_file

__all__ = ["BitRouters"]

FORMAT = "placer-bit-routers"
SCHEMA = "1"
FIRST_DEVIATION = 0.02
ARRAYS = ("weight_LEKH", "bias_LEK")


class BitRouters(nn.Module):
    """softmax over the levels from the state that enters the expert; the likeliest level is used.

    The paper gives no more than "a small router before each expert"; linear with a bias is ours. `about` says how they
    were trained. Reference: D2MoE (arXiv 2504.15299), dual routing.
    """

    def __init__(
        self, *, model: str, moe_layers: tuple[int, ...], bits_K: tuple[int, ...], weight_LEKH: Tensor, bias_LEK: Tensor
    ) -> None:
        super().__init__()
        shape = (len(moe_layers), weight_LEKH.shape[1], len(bits_K), weight_LEKH.shape[3])
        assert tuple(weight_LEKH.shape) == shape
        assert tuple(bias_LEK.shape) == shape[:3]
        self.model, self.moe_layers, self.bits_K = model, moe_layers, bits_K
        self.weight_LEKH, self.bias_LEK = nn.Parameter(weight_LEKH), nn.Parameter(bias_LEK)
        self.about: dict[str, Any] = {}

    @classmethod
    def untrained(cls, model: LevelModel, generator: torch.Generator) -> "BitRouters":
        """Small random weights and no bias: every level about equally likely."""
        sites, experts, levels = model.weights.shape_LEK
        shape = (sites, experts, levels, model.backbone.hidden_size)
        return cls(
            model=model.spec.name,
            moe_layers=model.weights.moe_layers,
            bits_K=model.weights.bits_K,
            weight_LEKH=FIRST_DEVIATION * torch.randn(shape, generator=generator),
            bias_LEK=torch.zeros(shape[:3]),
        )

    def probabilities(self, site: int, hidden_TH: Tensor, expert_TC: Tensor) -> Tensor:
        """Of every level, for each token and chosen expert, (T, C, K). Complexity: O(T E K H)."""
        experts, levels, hidden = self.weight_LEKH.shape[1:]
        weight = self.weight_LEKH[site].reshape(experts * levels, hidden)
        logits_TEK = nn.functional.linear(hidden_TH, weight).view(-1, experts, levels) + self.bias_LEK[site]
        index_TCK = expert_TC[:, :, None].expand(-1, -1, levels)
        return logits_TEK.gather(1, index_TCK).softmax(dim=-1)

    @torch.no_grad()
    def levels_of(self, site: int, hidden_TH: Tensor, expert_TC: Tensor) -> Tensor:
        """The likeliest level, from 1, for each token and chosen expert, int64 (T, C)."""
        return self.probabilities(site, hidden_TH.float(), expert_TC).argmax(dim=-1) + 1

    def for_planes(self, index: PlaneIndex) -> Callable[[int, Tensor, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """What a device's run takes: the level, from 1, of each choice, for planes of this file.

        Raises MismatchError where the routers are of another model or ladder.
        """
        self._refuse_other(index.moe_layers, index.num_experts, index.shapes[0][1], index.ladder.bits_K)

        def levels_of(site: int, hidden_NH: Tensor, expert_NC: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return self.levels_of(site, hidden_NH, torch.from_numpy(expert_NC)).numpy()

        return levels_of

    def refuse_misfit(self, model: LevelModel) -> None:
        """Raises MismatchError where the routers are of another model or ladder."""
        weights = model.weights
        self._refuse_other(weights.moe_layers, weights.shape_LEK[1], model.backbone.hidden_size, weights.bits_K)

    def _refuse_other(
        self, moe_layers: tuple[int, ...], num_experts: int, hidden_size: int, bits_K: tuple[int, ...]
    ) -> None:
        experts, hidden = self.weight_LEKH.shape[1], self.weight_LEKH.shape[3]
        for name, mine, other in (
            ("layers", self.moe_layers, moe_layers),
            ("experts a layer", experts, num_experts),
            ("hidden size", hidden, hidden_size),
            ("bits", self.bits_K, bits_K),
        ):
            if mine != other:
                raise MismatchError(
                    f"the bit routers are for {self.model!r} with {name} {mine}, the model and its planes have "
                    f"{name} {other}; train routers for them"
                )

    def save(self, path: Path) -> None:
        """Writes them as safetensors, whole or not at all."""
        arrays = {name: getattr(self, name).detach().numpy() for name in ARRAYS}
        text = {
            "format": FORMAT,
            "schema": SCHEMA,
            "model": self.model,
            "moe_layers": json.dumps(list(self.moe_layers)),
            "bits": json.dumps(list(self.bits_K)),
            "about": json.dumps(self.about, sort_keys=True),
        }
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        write_tensor_file(path, specs, arrays.items(), lambda: text, text)

    @classmethod
    def load(cls, path: Path) -> "BitRouters":
        """Reads what `save` wrote. Raises InputFileError naming what is missing or does not fit."""
        file = read_tensor_file(path)
        found = file.metadata
        if found.get("format") != FORMAT:
            raise InputFileError(f"{path}: holds no bit routers (no format: {FORMAT}); train them for your model")
        if found.get("schema") != SCHEMA:
            raise InputFileError(f"{path}: schema {found.get('schema')!r}; this placer reads schema {SCHEMA}")
        try:
            layers = tuple(int(layer) for layer in json.loads(found["moe_layers"]))
            bits_K = tuple(int(bits) for bits in json.loads(found["bits"]))
            about = dict(json.loads(found["about"]))
            weight_LEKH, bias_LEK = (np.array(file.arrays[name]) for name in ARRAYS)
            name = found["model"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputFileError(f"{path}: damaged bit routers ({error}); train them anew") from error
        if (
            weight_LEKH.ndim != 4
            or weight_LEKH.shape[:3] != bias_LEK.shape
            or (len(weight_LEKH), weight_LEKH.shape[2]) != (len(layers), len(bits_K))
            or {weight_LEKH.dtype, bias_LEK.dtype} != {np.dtype(np.float32)}
        ):
            raise InputFileError(
                f"{path}: weights {weight_LEKH.dtype} {weight_LEKH.shape} and biases {bias_LEK.shape} do not fit "
                f"{len(layers)} layers and {len(bits_K)} levels; train them anew"
            )
        if not (np.isfinite(weight_LEKH).all() and np.isfinite(bias_LEK).all()):
            raise InputFileError(f"{path}: bit routers with values that are no numbers; train them anew")
        routers = cls(
            model=name,
            moe_layers=layers,
            bits_K=bits_K,
            weight_LEKH=torch.from_numpy(weight_LEKH),
            bias_LEK=torch.from_numpy(bias_LEK),
        )
        routers.about = about
        return routers
