"""Records the routing of any Hugging Face MoE model through forward hooks on its routers.

Legend: L layers, T tokens, K top-k, B sequences of a batch.

The recorder does not import torch: modules and tensors are used through their own methods. `record_prompts` does.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import DependencyError, InputFileError, MismatchError, UsageError
from placer.core.model import ModelSpec
from traces.hf_config import model_from_hf_config
from traces.ids import convert_ids, id_dtype
from traces.readers.raw import infer_model
from traces.readers.text import first_line
from traces.router_output import describe, extract_choice, past_length, to_numpy, weights_of
from traces.summarize import Progress
from traces.trace import RoutingTrace, Tag

__all__ = ["ROUTER_PATTERN", "RoutingRecorder", "record_prompts"]

ROUTER_PATTERN = r"(TopK|Topk)(Router|Gating)$|Router$"
"""Class names of router modules; their output is a tuple that holds the chosen ids, integers (tokens, k)."""

LAYER_PATTERN = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

Extract = Callable[[Any], tuple[Any, Any]]


class RoutingRecorder:
    """Context manager: hooks `model`'s routers while it is open; `finish` gives the trace of what was run.

        with RoutingRecorder(model) as recorder:
            model.generate(**tokenizer("Guten Tag", return_tensors="pt"))
        trace = recorder.finish()

    A forward call without past keys and values starts a request for each sequence of its batch; calls with them go on
    with those requests (beam search, which reorders them, is not followed). Padding by attention_mask is left out.
    `extract(output) -> (weights or None, indices)` serves routers whose output is not that tuple.
    Raises UsageError when no router is found, MismatchError when a router's output cannot be read.
    """

    def __init__(
        self,
        model: Any,
        *,
        spec: ModelSpec | None = None,
        pattern: str = ROUTER_PATTERN,
        extract: Extract | None = None,
        token_ids: bool = False,
    ) -> None:
        self._model, self._spec, self._extract, self._keep_token_ids = model, spec, extract, token_ids
        self._routers = _routers(model, pattern)
        self._handles: list[Any] = []
        self._chosen: dict[int, list[npt.NDArray[np.uint16]]] = {layer: [] for layer in self._routers}
        self._weights: dict[int, list[npt.NDArray[np.float16] | None]] = {layer: [] for layer in self._routers}
        self._call: dict[int, int] = {}
        self._mask_T: npt.NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._columns: dict[str, list[npt.NDArray[Any]]] = {"request_id_T": [], "position_T": [], "phase_T": []}
        self._requests_B: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._next_request = 0
        self._labels: dict[str, str] = {}
        self._request_labels: list[dict[str, str]] = []

    def __enter__(self) -> "RoutingRecorder":
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles.append(self._model.register_forward_hook(self._end))
        for layer, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._router_hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def label(self, **tags: str) -> None:
        """Tags of all requests that start from now on, such as domain="medicine"."""
        self._labels = {name: str(value) for name, value in tags.items()}

    def finish(self, provenance: str = "") -> RoutingTrace:
        """The trace of every call so far. Raises UsageError when nothing was run."""
        if not self._columns["request_id_T"]:
            raise UsageError("nothing was recorded; run the model inside the `with` block")
        layer_ids = tuple(sorted(self._routers))
        parts = [np.concatenate(_widest(self._chosen[layer])) for layer in layer_ids]
        columns = max(part.shape[1] for part in parts)
        expert_LTK = np.full((len(parts), len(parts[0]), columns), 65535, dtype=np.uint16)
        for row, part in enumerate(parts):
            expert_LTK[row, :, : part.shape[1]] = part
        spec, notes = self._model_spec(expert_LTK, layer_ids)
        weight_LTK = None
        if all(part is not None for layer in layer_ids for part in self._weights[layer]):
            weight_LTK = np.zeros(expert_LTK.shape, dtype=np.float16)
            for row, layer in enumerate(layer_ids):
                start = 0
                for weight_TK in self._weights[layer]:
                    assert weight_TK is not None
                    weight_LTK[row, start : start + len(weight_TK), : weight_TK.shape[1]] = weight_TK
                    start += len(weight_TK)
        flat: dict[str, Any] = {name: np.concatenate(values) for name, values in self._columns.items()}
        return RoutingTrace(
            model=spec,
            expert_LTK=convert_ids(expert_LTK, id_dtype(spec.num_ids)),
            weight_LTK=weight_LTK,
            tags=self._tags(flat["request_id_T"]),
            provenance=provenance or f"recorded from {type(self._model).__name__}",
            notes=notes,
            **flat,
        )

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward call: who its tokens are."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or len(tokens.shape) < 2:
            raise UsageError("the recorded model was called without input_ids or inputs_embeds (batch, tokens)")
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        # transformers 5.24 calls it cache, earlier ones past_key_values
        kept = kwargs.get("past_key_values")
        past = past_length(kwargs.get("cache") if kept is None else kept)
        if not past or len(self._requests_B) != batch:
            self._requests_B = np.arange(self._next_request, self._next_request + batch, dtype=np.int32)
            self._next_request += batch
            self._request_labels += [self._labels] * batch
        mask = kwargs.get("attention_mask")
        if mask is not None and len(mask.shape) == 2 and int(mask.shape[1]) >= length:
            whole_BT = to_numpy(mask) != 0
            position_BT = (np.cumsum(whole_BT, axis=1) - 1)[:, -length:]
            mask_BT = whole_BT[:, -length:]
        else:
            mask_BT = np.ones((batch, length), dtype=bool)
            position_BT = np.broadcast_to(past + np.arange(length), (batch, length))
        self._mask_T = mask_BT.reshape(-1)
        decode = past > 0 and length == 1
        self._columns["request_id_T"].append(np.repeat(self._requests_B, length)[self._mask_T])
        self._columns["position_T"].append(position_BT.reshape(-1)[self._mask_T].astype(np.int32))
        self._columns["phase_T"].append(np.full(int(self._mask_T.sum()), decode, dtype=np.uint8))
        if self._keep_token_ids and len(tokens.shape) == 2:
            self._columns.setdefault("token_id_T", []).append(
                to_numpy(tokens).reshape(-1)[self._mask_T].astype(np.int32)
            )
        self._call = {}

    def _end(self, _module: Any, _args: Any, _output: Any) -> None:
        """After a forward call: every router must have been heard."""
        if missing := sorted(set(self._routers) - set(self._call)):
            raise MismatchError(
                f"the router of layer {missing[0]} was not called in a forward pass; record a model that is neither "
                "compiled nor skipping layers"
            )

    def _router_hook(self, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, _args: Any, output: Any) -> None:
            weights, indices = (self._extract or extract_choice)(output)
            if indices is None:
                raise MismatchError(
                    f"layer {layer}: {type(module).__name__} returns {describe(output)}, without the chosen ids; give "
                    "extract=, a function that turns its output into (weights, indices)"
                )
            if layer in self._call:
                raise MismatchError(
                    f"layer {layer}: the router was called twice in one forward pass; rounds are not recorded"
                )
            ids = to_numpy(indices)
            ids = ids.reshape(-1, ids.shape[-1])
            if len(ids) != len(self._mask_T):
                raise MismatchError(
                    f"layer {layer}: the router saw {len(ids)} tokens of a call with {len(self._mask_T)}; give batches "
                    "without padding, in which every token is routed"
                )
            ordered = np.sort(ids, axis=1)
            twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
            # a one-hot mask of experts is made of integers as well
            if ids.size and (twice.any() or int(ids.min()) < -1 or int(ids.max()) >= 65535):
                raise MismatchError(
                    f"layer {layer}: {type(module).__name__} returns integers that are no expert ids; give extract=, a "
                    "function that turns its output into (weights, indices)"
                )
            self._call[layer] = len(ids)
            self._chosen[layer].append(np.where(ids < 0, 65535, ids)[self._mask_T].astype(np.uint16))
            self._weights[layer].append(weights_of(weights, ids, self._mask_T))

        return hook

    def _model_spec(
        self, expert_LTK: npt.NDArray[np.uint16], layer_ids: tuple[int, ...]
    ) -> tuple[ModelSpec, tuple[str, ...]]:
        spec = self._spec
        if spec is None:
            config = getattr(self._model, "config", None)
            try:
                spec = model_from_hf_config(config.to_dict()) if config is not None else None
            except InputFileError as error:
                inferred, note = infer_model(expert_LTK, layer_ids)
                return inferred, (str(error), note)
        if spec is None:
            inferred, note = infer_model(expert_LTK, layer_ids)
            return inferred, (note,)
        if spec.moe_layers != layer_ids:
            raise MismatchError(
                f"model {spec.name!r} has experts in layers {_span(spec.moe_layers)}, routers were found in "
                f"{_span(layer_ids)}; give the spec of this model"
            )
        return spec, ()

    def _tags(self, request_id_T: npt.NDArray[np.int32]) -> dict[str, Tag]:
        tags = {}
        for name in sorted({name for labels in self._request_labels for name in labels}):
            texts = [labels.get(name, "") for labels in self._request_labels]
            names, code_of_request = np.unique(texts, return_inverse=True)
            small = np.dtype(np.uint8) if len(names) <= 256 else np.dtype(np.uint16)
            codes: npt.NDArray[Any] = code_of_request.astype(small)
            tags[name] = Tag(codes[request_id_T], tuple(names.tolist()))
        return tags


def record_prompts(
    folder: Path, prompts: Sequence[str], *, max_new_tokens: int = 0, progress: Progress | None = None
) -> RoutingTrace:
    """The routing of every prompt (a request each) and of `max_new_tokens` tokens generated greedily after it.

    `folder` holds config.json, safetensors and a tokenizer; nothing is downloaded. Raises DependencyError without
    transformers, InputFileError for a folder that is no such checkpoint, UsageError for no prompts.
    """
    if not prompts or max_new_tokens < 0:
        raise UsageError(f"{len(prompts)} prompts and max_new_tokens {max_new_tokens}; give some, and 0 or more tokens")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyError("recording needs torch and transformers; install placer[hf]") from error
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputFileError(f"{folder}: has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise InputFileError(f"{folder}: is no checkpoint with a tokenizer ({first_line(error)})") from error
    model.eval()
    with RoutingRecorder(model) as recorder, torch.no_grad():
        for done, prompt in enumerate(prompts, 1):
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            if not tokens.shape[1]:
                raise UsageError(f"prompt {done} has no tokens; leave empty prompts out")
            if max_new_tokens:
                # a generated token passes the routers only when the next one is asked for
                mask = tokens.new_ones(tokens.shape)
                model.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens + 1, do_sample=False)
            else:
                model(input_ids=tokens)
            if progress is not None:
                progress(done, len(prompts))
    return recorder.finish(provenance=f"recorded from {folder.name}")


def _routers(model: Any, pattern: str) -> dict[int, Any]:
    """The router module of each layer that has one."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        place = LAYER_PATTERN.search(name)
        if place is None or not re.search(pattern, type(module).__name__):
            continue
        layer = int(place.group(1))
        if layer in found:
            raise UsageError(
                f"layer {layer} has two modules like {pattern!r}, {type(found[layer]).__name__} and "
                f"{type(module).__name__}; give a pattern that matches one of them"
            )
        found[layer] = module
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no module in a layer whose class is like {pattern!r}; give the pattern of its "
            "router's class name"
        )
    return found


def _widest(parts: list[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.uint16]]:
    columns = max(part.shape[1] for part in parts)
    return [np.pad(part, ((0, 0), (0, columns - part.shape[1])), constant_values=65535) for part in parts]


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}..{layers[-1]} ({len(layers)})"
