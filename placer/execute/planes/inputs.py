"""A model run on text with its own or other experts, and what its experts see: Hessians and held-out rows.

Legend: L routing sites, E experts, Q texts, S positions, T tokens, K top-k, H hidden size, I inner width, X rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from placer.core.errors import UsageError
from placer.execute.experts import ExpertFile, ExpertWeights, swiglu

if TYPE_CHECKING:
    from placer.execute.hf.backbone import Backbone

__all__ = ["ExpertInputs", "ReplacedExperts", "checked_tokens", "expert_inputs", "run_model"]

IntArray = npt.NDArray[np.int64]

TOKENS_AT_ONCE = 4096
HESSIAN_BYTES = 1 << 31
"""Hessians of as many sites as fit are gathered in one run of the model."""


@dataclass(slots=True, kw_only=True)
class ExpertInputs:
    """What one expert sees: H^ = X^T X of its inputs (H, H) and inner activations (I, I), and rows that are in neither.

    tokens       rows that the Hessians sum over
    held_out_X   inputs (X, H) from the texts kept for measuring, the first ones
    """

    hidden_HH: Tensor
    inner_II: Tensor
    tokens: int = 0
    held_out_X: list[Tensor] = field(default_factory=list)
    held_out: int = 0


class ReplacedExperts(nn.Module):
    """Takes the place of a layer's experts; `weights_of` gives an expert's weights when tokens are routed to it.

    `watch` is called with each expert's number and the rows routed to it.
    """

    def __init__(
        self, weights_of: Callable[[int], ExpertWeights], watch: Callable[[int, Tensor, ExpertWeights], None] | None
    ) -> None:
        super().__init__()
        self._weights_of, self._watch = weights_of, watch

    def forward(self, hidden_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """sum over k of weight_k * expert_k(hidden), (T, H)."""
        result_TH = torch.zeros_like(hidden_TH)
        for expert in torch.unique(expert_TK).tolist():
            token_X, column_X = torch.nonzero(expert_TK == expert, as_tuple=True)
            rows_XH, weights = hidden_TH[token_X], self._weights_of(expert)
            if self._watch is not None:
                self._watch(expert, rows_XH, weights)
            share_X1 = weight_TK[token_X, column_X, None].to(hidden_TH.dtype)
            result_TH.index_add_(0, token_X, swiglu(rows_XH, weights) * share_X1)
        return result_TH


def checked_tokens(tokens_QS: npt.NDArray[np.integer], name: str, vocab_size: int, texts: int = 1) -> IntArray:
    """The token ids as int64 (Q, S). Raises UsageError where there are none, too few texts, or ids unknown."""
    tokens = np.asarray(tokens_QS)
    if tokens.ndim != 2 or len(tokens) < texts or tokens.shape[1] < 2:
        raise UsageError(f"{name} tokens are {tokens.shape}; give (texts, positions), {texts} x 2 or more")
    if not np.issubdtype(tokens.dtype, np.integer) or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise UsageError(f"{name} tokens hold {tokens.max()!r}; the model's ids are 0 to {vocab_size - 1}")
    return tokens.astype(np.int64)


def run_model(backbone: "Backbone", tokens_QS: IntArray) -> Iterator[Tensor]:
    """Logits (q, S, vocabulary) of a few texts at a time, in order."""
    step = max(1, TOKENS_AT_ONCE // tokens_QS.shape[1])
    with torch.no_grad():
        for start in range(0, len(tokens_QS), step):
            ids = torch.from_numpy(tokens_QS[start : start + step]).to(backbone.device)
            yield backbone.model(input_ids=ids, use_cache=False).logits


def expert_inputs(
    backbone: "Backbone",
    file: ExpertFile,
    num_experts: int,
    calibration_QS: IntArray,
    measuring_QS: IntArray,
    held_out_rows: int,
) -> Iterator[tuple[int, list[ExpertInputs]]]:
    """Each site's number and its experts' inputs, from the model as it is; texts run once for every few sites."""
    hidden, inner = file.hidden_size, file.moe_intermediate_size
    site_bytes = num_experts * 8 * (hidden**2 + inner**2)
    at_once = max(1, HESSIAN_BYTES // site_bytes)
    sites = len(backbone.blocks_L)
    for first in range(0, sites, at_once):
        here = range(first, min(sites, first + at_once))
        seen = {site: [_nothing(hidden, inner) for _ in range(num_experts)] for site in here}
        for tokens_QS, held_out in ((calibration_QS, 0), (measuring_QS, held_out_rows)):
            _put_in_experts(backbone, file, seen, held_out)
            for _ in run_model(backbone, tokens_QS):
                pass
        yield from seen.items()


def _nothing(hidden: int, inner: int) -> ExpertInputs:
    return ExpertInputs(
        hidden_HH=torch.zeros(hidden, hidden, dtype=torch.float64),
        inner_II=torch.zeros(inner, inner, dtype=torch.float64),
    )


def _put_in_experts(backbone: "Backbone", file: ExpertFile, seen: dict[int, list[ExpertInputs]], held_out: int) -> None:
    for site, block in enumerate(backbone.blocks_L):
        layer = backbone.layer_L[site]

        def weights_of(expert: int, layer: int = layer) -> ExpertWeights:
            return file.load(layer, expert, dtype=backbone.dtype, device=backbone.device)

        watch = _watcher(seen[site], held_out) if site in seen else None
        block.experts = ReplacedExperts(weights_of, watch)


def _watcher(inputs_E: Sequence[ExpertInputs], held_out: int) -> Callable[[int, Tensor, ExpertWeights], None]:
    def watch(expert: int, rows_XH: Tensor, weights: ExpertWeights) -> None:
        inputs = inputs_E[expert]
        if held_out:
            kept = rows_XH[: held_out - inputs.held_out].cpu()
            inputs.held_out_X.append(kept)
            inputs.held_out += len(kept)
            return
        inputs.hidden_HH += (rows_XH.T @ rows_XH).double().cpu()
        gate_XI, up_XI = nn.functional.linear(rows_XH, weights.gate_up_FH).chunk(2, dim=-1)
        inner_XI = nn.functional.silu(gate_XI) * up_XI
        inputs.inner_II += (inner_XI.T @ inner_XI).double().cpu()
        inputs.tokens += len(rows_XH)

    return watch
