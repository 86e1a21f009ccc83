"""A model without its experts: transformers' own class, every other weight read from the checkpoint.

Legend: L MoE layers, H hidden size.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from placer.core.errors import ExecutionError, InputFileError, MismatchError
from placer.execute.checkpoint import CheckpointFiles
from placer.execute.experts import ClampedGate
from placer.execute.hf.architectures import Architecture, architecture_of

__all__ = ["Backbone", "load_backbone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A model whose experts are yet to be put in.

    blocks_L    the modules whose `experts` attribute is to be set     layer_L   the layer of each
    cache_name  what the model's forward calls its cache               eos_ids   tokens that end a request
    """

    model: Any
    blocks_L: tuple[nn.Module, ...]
    layer_L: tuple[int, ...]
    hidden_size: int
    top_k: int
    vocab_size: int
    clamped: ClampedGate | None
    cache_name: str
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return transformers.DynamicCache(config=self.model.config)


def load_backbone(model_path: Path, *, dtype: torch.dtype, device: torch.device) -> Backbone:
    """The model of a checkpoint folder on `device`, without experts: no expert's weights are read or allocated.

    Raises InputFileError for an unknown architecture or a missing tensor.
    """
    architecture = architecture_of(model_path)
    # placer says itself what is wrong with a model
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(model_path, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputFileError(f"{model_path}: transformers cannot build the model ({first})") from error
    config.output_router_logits = False
    blocks = _take_out_experts(model, architecture, model_path)
    _read_weights(model, architecture, model_path, dtype, device)
    _fill_buffers(model, device)
    model.eval().requires_grad_(requires_grad=False)
    clamped = None
    if architecture.clamped:
        gate = ClampedGate()
        alpha, limit = getattr(config, "swiglu_alpha", gate.alpha), getattr(config, "swiglu_limit", gate.limit)
        clamped = ClampedGate(float(alpha), float(limit))
    if config.hidden_size * dtype.itemsize % 4:
        raise MismatchError(f"{model_path}: hidden size {config.hidden_size} in {dtype}; the executor needs it even")
    # 5.24 renamed the argument
    known = inspect.signature(model.forward).parameters
    return Backbone(
        model=model,
        blocks_L=tuple(blocks.values()),
        layer_L=tuple(blocks),
        hidden_size=int(config.hidden_size),
        top_k=int(config.num_experts_per_tok),
        vocab_size=int(config.vocab_size),
        clamped=clamped,
        cache_name="cache" if "cache" in known else "past_key_values",
        eos_ids=_eos_ids(model_path, config),
        dtype=dtype,
        device=device,
    )


def _take_out_experts(model: Any, architecture: Architecture, model_path: Path) -> dict[int, nn.Module]:
    """The MoE blocks by layer, ascending, their experts replaced by nothing."""
    found = {}
    for layer, block in enumerate(model.model.layers):
        for module in block.modules():
            if type(getattr(module, "experts", None)).__name__ == architecture.experts_class:
                module.experts = nn.Identity()
                found[layer] = module
    if not found:
        raise InputFileError(
            f"{model_path}: transformers {transformers.__version__} builds it without {architecture.experts_class}, "
            "which placer replaces; use another version of transformers"
        )
    return found


def _read_weights(
    model: Any, architecture: Architecture, model_path: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives every parameter and persistent buffer its tensor from the checkpoint."""
    state: dict[str, Tensor] = {}
    with CheckpointFiles(model_path) as files:
        file_of = dict(files.keys)
        for name, empty in model.state_dict().items():
            key = name
            for inside, on_disk in architecture.renames:
                if key not in file_of:
                    key = key.replace(inside, on_disk)
            if key not in file_of:
                continue
            part = files.slice(key, file_of[key])
            if tuple(part.get_shape()) != tuple(empty.shape):
                raise InputFileError(
                    f"{file_of[key]}: {key} is {tuple(part.get_shape())}, config.json makes it {tuple(empty.shape)}"
                )
            state[name] = part[:].to(dtype=dtype if empty.is_floating_point() else empty.dtype, device=device)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.state_dict().items() if value.device.type == "meta"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputFileError(f"{model_path}: lacks {missing[0]}{more}; give the whole checkpoint")


@torch.no_grad()
def _fill_buffers(model: Any, device: torch.device) -> None:
    """Computes what no checkpoint holds, such as the frequencies of rotary positions."""
    for path, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        for name in names:
            # not a number until transformers has computed it, so that what it left out cannot pass for a value
            empty = getattr(module, name)
            setattr(module, name, torch.full_like(empty, torch.nan if empty.is_floating_point() else -1, device=device))
        if names:
            model._init_weights(module)
        if lost := [name for name in names if bool(getattr(module, name).isnan().any())]:
            raise ExecutionError(
                f"transformers {transformers.__version__} does not compute {path}.{lost[0]}; use a later version"
            )


def _eos_ids(model_path: Path, config: Any) -> tuple[int, ...]:
    """The tokens at which transformers' own `generate` ends."""
    try:
        settings = transformers.GenerationConfig.from_pretrained(model_path, local_files_only=True)
    except OSError:
        settings = transformers.GenerationConfig.from_model_config(config)
    eos = settings.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
