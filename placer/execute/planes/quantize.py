"""A checkpoint's experts as a file of planes, with the error of every expert at every level.

Legend: L routing sites, E experts, K levels, Q texts, S positions, H hidden size, X rows.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.device.ladder import BitLadder, expert_shapes
from placer.core.device.planes import PlaneIndex
from placer.core.errors import InputFileError, UsageError
from placer.execute.experts import ExpertFile, ExpertWeights, swiglu
from placer.execute.hf.architectures import require_transformers
from placer.execute.planes.gptq import MatrixCodes, damped, gptq, inverse_factor, round_to_nearest
from placer.execute.planes.inputs import ExpertInputs, checked_tokens, expert_inputs
from placer.execute.planes.mwq import matryoshka
from placer.execute.planes.packing import PlaneMatrix, pack_plane
from placer.execute.planes.weights import expert_weights
from traces.hf_config import model_from_hf_config
from traces.plane_store import PlaneFileHeader, save_planes

__all__ = ["METHODS", "Method", "quantize_matrices", "quantize_model"]

FloatArray = npt.NDArray[np.float64]

Method = Literal["mwq", "gptq", "rtn"]
"""mwq: nested planes. gptq, rtn: whole copies at each width, by GPTQ or by rounding to the nearest."""

METHODS: tuple[Method, ...] = get_args(Method)

HELD_OUT_ROWS = 512
HELD_OUT_SHARE = 5


def quantize_model(
    model_path: Path,
    out_path: Path,
    ladder: BitLadder,
    calibration_QS: npt.NDArray[np.integer],
    *,
    method: Method = "mwq",
    text: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> PlaneIndex:
    """Quantises every routed expert of a Hugging Face checkpoint into `out_path`; returns the index.

    calibration_QS   token ids (texts, positions), two texts or more: every fifth text is kept out of the Hessians, and
                     the planes' errors (relative squared error of an expert's output) are measured on it
    text             what the calibration text is, for the file's `about`
    progress         called with (experts done, experts)

    An expert routed fewer tokens than a matrix has columns has its Hessian filled up: with the mean input of the
    layer's experts before gate and up, with independent inputs before down. One that no held-out token reaches is
    measured on rows drawn as wide as that filled-up Hessian says. `about` says so too.

    Raises UsageError for a method that does not fit the ladder or calibration without tokens, InputFileError for a
    checkpoint that is not one, has experts with biases, or weights that are no numbers. Deterministic.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; give one of {', '.join(METHODS)}")
    if ladder.nested != (method == "mwq"):
        kind = "nested planes" if method == "mwq" else "whole copies"
        raise UsageError(f"method {method} makes {kind}; give a ladder with nested={method == 'mwq'}")
    require_transformers()
    from placer.execute.hf.backbone import load_backbone

    model = model_from_hf_config(model_path, name=Path(model_path).resolve().name)
    backbone = load_backbone(Path(model_path), dtype=torch.float32, device=torch.device("cpu"))
    tokens_QS = checked_tokens(calibration_QS, "calibration", backbone.vocab_size, texts=2)
    kept_Q = np.arange(len(tokens_QS)) % HELD_OUT_SHARE == min(HELD_OUT_SHARE, len(tokens_QS)) - 1
    if backbone.clamped is not None:
        raise InputFileError(f"{model_path}: its experts have biases, which planes do not hold; quantise another model")
    with ExpertFile(Path(model_path)) as file:
        shapes = expert_shapes(file.hidden_size, file.moe_intermediate_size)
        shape_LEK = (len(backbone.layer_L), model.num_experts, ladder.levels)
        error_LEK = np.zeros(shape_LEK)
        about: dict[str, Any] = {
            "method": method,
            "calibration": text,
            "calibration_tokens": int(tokens_QS[~kept_Q].size),
            "held_out_tokens": int(tokens_QS[kept_Q].size),
            "few_tokens": "Hessian filled up to the number of columns: mean of the layer (gate, up), identity (down)",
        }

        def pieces() -> Iterator[tuple[int, int, int, npt.NDArray[np.uint8]]]:
            seen = expert_inputs(
                backbone, file, model.num_experts, tokens_QS[~kept_Q], tokens_QS[kept_Q], HELD_OUT_ROWS
            )
            for site, inputs_E in seen:
                mean_HH = sum(inputs.hidden_HH for inputs in inputs_E) / max(1, sum(i.tokens for i in inputs_E))
                for expert, inputs in enumerate(inputs_E):
                    weights = file.load(backbone.layer_L[site], expert, dtype=torch.float32)
                    _check_finite(weights, model_path, backbone.layer_L[site], expert)
                    hessians = _filled_up(inputs, mean_HH)
                    if not all(np.isfinite(hessian).all() for hessian in hessians):
                        raise InputFileError(
                            f"{model_path}: the inputs of layer {backbone.layer_L[site]} expert {expert} are no "
                            "numbers; the checkpoint is damaged"
                        )
                    planes = quantize_matrices(weights, hessians, ladder, method)
                    rows_XH = _rows(inputs, hessians[0])
                    for level in range(1, ladder.levels + 1):
                        found = expert_weights([planes[k] for k in ladder.planes_of(level)], ladder, shapes)
                        error_LEK[site, expert, level - 1] = _output_error(rows_XH, weights, found)
                    for plane, raw in enumerate(planes):
                        yield site, expert, plane, raw.numpy()
                    if progress is not None:
                        progress(site * model.num_experts + expert + 1, shape_LEK[0] * shape_LEK[1])

        header = PlaneFileHeader(
            model=model.name,
            num_hidden_layers=model.num_hidden_layers,
            moe_layers=backbone.layer_L,
            num_experts=model.num_experts,
            ladder=ladder,
            shapes=shapes,
            about=about,
        )
        return save_planes(Path(out_path), header, pieces(), lambda: error_LEK)


def quantize_matrices(
    weights: ExpertWeights, hessians: Sequence[FloatArray], ladder: BitLadder, method: Method
) -> list[Tensor]:
    """The K planes of an expert, each uint8 (bytes,); `hessians` of the inputs of gate and up, and of down."""
    matrices = [matrix.double().numpy() for matrix in (weights.gate_up_FH, weights.down_HI)]
    group = ladder.group_size
    if method == "rtn":
        copies = [[round_to_nearest(matrix, bits, group) for matrix in matrices] for bits in ladder.bits_K]
        return [_pack(codes, bits) for codes, bits in zip(copies, ladder.bits_K, strict=True)]
    ready = [(matrix, damped(hessian)) for matrix, hessian in zip(matrices, hessians, strict=True)]
    factors = [inverse_factor(hessian) for _, hessian in ready]
    if method == "gptq":
        return [
            _pack([gptq(matrix, factor, bits, group) for matrix, factor in zip(matrices, factors, strict=True)], bits)
            for bits in ladder.bits_K
        ]
    nested = [
        matryoshka(matrix, hessian, factor, ladder) for (matrix, hessian), factor in zip(ready, factors, strict=True)
    ]
    residuals = [
        pack_plane(
            [
                PlaneMatrix(
                    torch.from_numpy((codes.sign_RC >> (plane - 1)) & 1),
                    torch.from_numpy(codes.scale_RGQ[..., plane + 1]).half(),
                )
                for codes in nested
            ],
            1,
        )
        for plane in range(1, ladder.levels)
    ]
    return [_pack(nested, ladder.bits_K[0]), *residuals]


def _pack(codes: Sequence[MatrixCodes], bits: int) -> Tensor:
    return pack_plane(
        [
            PlaneMatrix(
                torch.from_numpy(matrix.code_RC),
                torch.from_numpy(matrix.scale_RGQ[..., 1]).half(),
                torch.from_numpy(matrix.scale_RGQ[..., 0]).half(),
            )
            for matrix in codes
        ],
        bits,
    )


def _check_finite(weights: ExpertWeights, model_path: Path, layer: int, expert: int) -> None:
    if weights.gate_up_bias_F is not None:
        raise InputFileError(f"{model_path}: its experts have biases, which planes do not hold; quantise another model")
    for name, matrix in (("gate and up", weights.gate_up_FH), ("down", weights.down_HI)):
        if not torch.isfinite(matrix).all():
            raise InputFileError(
                f"{model_path}: layer {layer} expert {expert} has a weight in {name} that is no number; the checkpoint "
                "is damaged"
            )


def _filled_up(inputs: ExpertInputs, mean_HH: Tensor | int) -> list[FloatArray]:
    """The expert's Hessians, with shared inputs for every token that is lacking."""
    hidden_HH, inner_II = inputs.hidden_HH, inputs.inner_II
    lacking = max(0, len(hidden_HH) - inputs.tokens)
    if lacking:
        hidden_HH = hidden_HH + lacking * mean_HH
    lacking = max(0, len(inner_II) - inputs.tokens)
    if lacking:
        share = float(inner_II.trace()) / len(inner_II) / inputs.tokens if inputs.tokens else 1.0
        inner_II = inner_II + lacking * share * torch.eye(len(inner_II), dtype=torch.float64)
    return [hidden_HH.numpy(), inner_II.numpy()]


def _rows(inputs: ExpertInputs, hessian_HH: FloatArray) -> Tensor:
    """Held-out inputs (X, H); where there are none, rows of the Hessian's Cholesky factor, which have its H^."""
    if inputs.held_out:
        return torch.cat(inputs.held_out_X)
    return torch.from_numpy(np.linalg.cholesky(damped(hessian_HH)).T).float() / max(1.0, inputs.tokens) ** 0.5


def _output_error(rows_XH: Tensor, weights: ExpertWeights, found: ExpertWeights) -> float:
    exact_XH = swiglu(rows_XH, weights).double()
    off_XH = swiglu(rows_XH, found).double() - exact_XH
    return float(off_XH.square().sum() / exact_XH.square().sum().clamp(min=sys.float_info.min))
