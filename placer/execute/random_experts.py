"""Random expert weights on disk, so that a trace can be replayed without its model's checkpoint.

Legend: H hidden size, I inner width of an expert.
"""

import json
import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_atomically
from placer.core.errors import UsageError
from placer.core.model import ModelSpec

__all__ = ["stored_layers", "write_random_experts"]

STORED = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def stored_layers(model: ModelSpec) -> tuple[int, ...]:
    """The layer under which each site's experts are stored, length L: its own, or the pool it shares."""
    return tuple(site.layer if site.pool is None else site.pool for site in model.sites)


def write_random_experts(path: Path, model: ModelSpec, seed: int, *, dtype: str = "float32") -> None:
    """Writes seeded SwiGLU experts of `model`'s shape as one safetensors file, one tensor per matrix (Qwen's keys).

    Values are uniform with variance 1 / inputs, so that activations keep their size through any number of layers.
    Each expert has its own generator: its weights depend on seed, layer and expert only. Streamed: memory stays at one
    matrix. Raises UsageError for a type other than float32 or bfloat16, or experts of other than three matrices.
    """
    if dtype not in STORED:
        raise UsageError(f"dtype is {dtype!r}; random experts are written as {' or '.join(STORED)}")
    if model.matrices_per_expert != 3:
        raise UsageError(f"model.matrices_per_expert is {model.matrices_per_expert}; placer runs SwiGLU experts, 3")
    experts: dict[int, int] = {}
    for site, layer in zip(model.sites, stored_layers(model), strict=True):
        experts[layer] = max(site.num_experts, experts.get(layer, 0))
    write_atomically(path, lambda temporary: _write(temporary, model, experts, seed, dtype))


def _write(path: Path, model: ModelSpec, experts: dict[int, int], seed: int, dtype: str) -> None:
    stored, width = STORED[dtype]
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "made_by": f"placer, seed {seed}"}}
    offset, length = 0, hidden * inner * width
    for layer, count in sorted(experts.items()):
        for expert in range(count):
            for name, shape in shapes.items():
                entry = {"dtype": stored, "shape": shape, "data_offsets": (offset, offset + length)}
                header[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = entry
                offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for layer, count in sorted(experts.items()):
            for expert in range(count):
                rng = np.random.default_rng([seed, layer, expert])
                for shape in shapes.values():
                    _write_matrix(file, rng, shape, dtype)


def _write_matrix(file: BinaryIO, rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> None:
    values = rng.random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(math.sqrt(12 / shape[1]))
    file.write((values.astype("<f4") if dtype == "float32" else _bfloat16(values)).tobytes())


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype("<u2")
