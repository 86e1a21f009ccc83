"""The requests of one rank: a left-padded batch with its cache of keys and values, decoded greedily step by step.

Legend: B requests of this rank, S positions of one step, T = B * S tokens, N of them routed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.execute.hf.backbone import Backbone
from placer.execute.hf.experts import DistributedExperts, Step

__all__ = ["RankBatch"]

IntArray = npt.NDArray[np.int64]


class RankBatch:
    """The rank's own requests; `advance` is one step, prefill first, and collective.

    All run in one batch: shorter prompts are padded on the left, masked, their positions counted from their own first
    token, as transformers' `generate` does. Padding and requests that have ended send no token to any expert.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers_L: Sequence[DistributedExperts],
        step: Step,
        prompts: Sequence[Sequence[int]],
        request_B: Sequence[int],
        num_requests: int,
        max_new_tokens: int,
    ) -> None:
        self._backbone, self._layers_L, self._step = backbone, layers_L, step
        self._num_requests, self._max_new_tokens = num_requests, max_new_tokens
        self.request_B: IntArray = np.asarray(request_B, dtype=np.int64)
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.running_B = np.ones(len(prompts), dtype=bool)
        longest = max((len(prompt) for prompt in prompts), default=0)
        self._next_BS = np.zeros((len(prompts), longest), dtype=np.int64)
        self._mask_BS = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self._next_BS[row, longest - len(prompt) :] = prompt
            self._mask_BS[row, longest - len(prompt) :] = 1
        self._cache = backbone.new_cache()
        self._chosen_B: Tensor | None = None
        self._started = False
        self.column_N: dict[str, IntArray] = {}

    @property
    def running(self) -> bool:
        """Whether any request is to go on."""
        return bool(self.running_B.any())

    @torch.inference_mode()
    def advance(self, begin: Any) -> int:
        """Runs one step on all ranks at once and returns how many tokens of this rank it routed; then call `take`.

        `begin` is the stamp at which the step begins. Its last span, of layer -1, is what comes behind the last layer.
        """
        self._step.begin, self._step.kind = begin, "decode" if self._started else "prefill"
        self._step.spans.clear()
        routed = self._forward()
        self._started = True
        self._step.attended(-1)
        return routed

    def _forward(self) -> int:
        step = self._step
        if not self.running:
            step.routed_N, step.token_N, self._chosen_B = None, np.zeros(0, dtype=np.int64), None
            self._note(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
            like = torch.zeros(0, self._backbone.hidden_size, dtype=self._backbone.dtype, device=self._backbone.device)
            for layer in self._layers_L:
                layer.join(self._backbone.top_k, like)
            return 0
        device = self._backbone.device
        width = self._next_BS.shape[1]
        position_BS = np.maximum(self._mask_BS.cumsum(axis=1) - 1, 0)[:, -width:]
        routed_BS = (self._mask_BS[:, -width:] == 1) & self.running_B[:, None]
        routed_N = np.flatnonzero(routed_BS)
        request_N = self.request_B[routed_N // width]
        step.token_N = position_BS.reshape(-1)[routed_N] * self._num_requests + request_N
        step.routed_N = None if len(routed_N) == routed_BS.size else torch.from_numpy(routed_N).to(device)
        self._note(routed_N, position_BS.reshape(-1)[routed_N])
        output = self._backbone.model(
            input_ids=torch.from_numpy(self._next_BS).to(device),
            attention_mask=torch.from_numpy(self._mask_BS).to(device),
            position_ids=torch.from_numpy(position_BS).to(device),
            use_cache=True,
            logits_to_keep=1,
            **{self._backbone.cache_name: self._cache},
        )
        self._chosen_B = output.logits[:, -1].float().argmax(dim=-1)
        return len(routed_N)

    def take(self) -> None:
        """Appends the tokens that the step chose; a request ends at an end-of-sequence token or at the limit."""
        if self._chosen_B is None:
            return
        chosen_B = self._chosen_B.cpu().numpy()
        for row in np.flatnonzero(self.running_B).tolist():
            token = int(chosen_B[row])
            self.generated[row].append(token)
            ended = token in self._backbone.eos_ids or len(self.generated[row]) == self._max_new_tokens
            self.running_B[row] = not ended
        self._next_BS = chosen_B[:, None]
        self._mask_BS = np.pad(self._mask_BS, ((0, 0), (0, 1)), constant_values=1)

    def _note(self, routed_N: IntArray, position_N: IntArray) -> None:
        """What a recording says of the step's tokens beside their experts."""
        width = max(1, self._next_BS.shape[1])
        self.column_N = {
            "request_id_T": self.request_B[routed_N // width],
            "position_T": position_N,
            "token_id_T": self._next_BS.reshape(-1)[routed_N],
            "phase_T": np.full(len(routed_N), self._started, dtype=np.int64),
        }
