"""ModelSpec from a Hugging Face config.json, with every field name that MoE families use, and presets.

The multi-token-prediction layers behind num_hidden_layers (num_nextn_predict_layers) are not counted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from placer.core.errors import InputFileError, UsageError
from placer.core.model import ModelSpec, Site
from traces.model_presets import CONFIGS

__all__ = ["MODELS", "model_from_hf_config", "moe_layers"]

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k", "num_experts_per_token")
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
HIDDEN = ("hidden_size", "d_model", "n_embd")
SIZE = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_SIZE = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
HEADS = ("num_attention_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "kv_n_heads", "multi_query_group_num")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "attn_config")
TWO_MATRICES = ("nemotron_h", "switch_transformers", "nllb-moe")
"""Families whose experts are up and down only, without a gate."""

DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}
QUANTIZED_BYTES = {"fp8": 1.0, "mxfp4": 0.53125, "compressed-tensors": 1.0, "bitsandbytes": 0.5}
MAX_LAYERS = 10_000


def model_from_hf_config(config: Mapping[str, Any] | Path | str, *, name: str | None = None) -> ModelSpec:
    """The model a config describes: a table, a config.json or the folder that holds it.

    attention_params is an estimate from hidden size, heads and head sizes (or the latent sizes of MLA); bytes per
    weight follow the quantisation, else the data type. Raises InputFileError naming the field that is missing or odd.
    """
    if isinstance(config, Mapping):
        where, table = name or "config", dict(config)
    else:
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        where, table = str(path), _load(path)
    fields = _Fields(where, table)
    experts, top_k = fields.number(EXPERTS, "experts"), fields.number(TOP_K, "experts per token")
    layers, hidden = fields.number(LAYERS, "layers"), fields.number(HIDDEN, "hidden size")
    size = fields.number(SIZE, "expert size")
    if layers > MAX_LAYERS:
        raise InputFileError(f"{where}: num_hidden_layers is {layers}; no model has more than {MAX_LAYERS} layers")
    shared = fields.optional(SHARED_SIZE) or (fields.optional(SHARED) or 0) * size
    kind = str(fields.get("model_type", ""))
    if kind.startswith("llama4") and not shared:
        # every Llama 4 MoE layer has one shared expert, which no field mentions
        shared = size
    routed = moe_layers(fields.flat, layers, where=where)
    if not routed:
        raise InputFileError(f"{where}: none of the {layers} layers has experts; give the config of an MoE model")
    null = fields.optional(("zero_expert_num",)) or 0
    try:
        return ModelSpec(
            name=name or str(table.get("_name_or_path") or table.get("model_type") or Path(where).parent.name),
            num_hidden_layers=layers,
            sites=tuple(Site(layer=layer, num_experts=experts, num_null_experts=null) for layer in routed),
            top_k=top_k,
            hidden_size=hidden,
            moe_intermediate_size=size,
            matrices_per_expert=2 if kind in TWO_MATRICES else 3,
            weight_bytes=_weight_bytes(fields),
            shared_intermediate_size=shared,
            attention_params=_attention_params(fields, hidden),
        )
    except UsageError as error:
        raise InputFileError(f"{where}: {error}") from error


def moe_layers(config: Mapping[str, Any], num_layers: int, *, where: str = "config") -> tuple[int, ...]:
    """The layers that have experts, by whichever of the families' rules the config states; all of them without a rule.

    Raises InputFileError for a rule that is not what it should be.
    """
    rule = _Fields(where, dict(config))
    layers = range(num_layers)
    kinds = rule.get("mlp_layer_types")
    if isinstance(kinds, list):
        return tuple(i for i, kind in enumerate(kinds[:num_layers]) if kind in ("sparse", "moe"))
    listed = rule.get("moe_layers")
    if isinstance(listed, list):
        return tuple(i for i in layers if i in listed)
    if step := rule.optional(("interleave_moe_layer_step",)):
        return tuple(i for i in layers if (i + 1) % step == 0)
    if period := rule.optional(("expert_layer_period",)):
        offset = rule.optional(("expert_layer_offset",)) or 0
        return tuple(i for i in layers if (i - offset) % period == 0)
    if interval := rule.optional(("moe_layer_interval",)):
        first, last = rule.optional(("moe_layer_start_index",)) or 0, rule.get("moe_layer_end_index", -1)
        last = last if isinstance(last, int) and last >= 0 else num_layers - 1
        return tuple(i for i in layers if (i + 1) % interval == 0 and first <= i <= last)
    frequency = rule.get("moe_layer_freq")
    if isinstance(frequency, list):
        return tuple(i for i, used in enumerate(frequency[:num_layers]) if used)
    dense = rule.optional(("first_k_dense_replace", "num_dense_layers")) or 0
    every = rule.optional(("moe_layer_freq", "decoder_sparse_step"))
    if "decoder_sparse_step" in rule.flat and "moe_layer_freq" not in rule.flat:
        only_dense = rule.get("mlp_only_layers") or []
        if not isinstance(only_dense, list):
            raise InputFileError(f"{where}: mlp_only_layers is {only_dense!r}; give a list of layers")
        return tuple(i for i in layers if every and (i + 1) % every == 0 and i not in only_dense)
    return tuple(i for i in layers if i >= dense and i % (every or 1) == 0)


class _Fields:
    """A config's fields with those of its nested text model in front of its own."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self.where = where
        self.flat = dict(table)
        # a table is merged once: the list grows while it is walked, three levels deep at most
        levels = [table]
        for _ in range(3):
            levels = [level[key] for level in levels for key in NESTED if isinstance(level.get(key), Mapping)]
            for level in levels:
                self.flat.update(level)

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it is."""
        return self.flat.get(name, default)

    def optional(self, names: tuple[str, ...]) -> int | None:
        """The first of these fields that is set, a whole number of 0 or more."""
        for name in names:
            value = self.flat.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
                raise InputFileError(f"{self.where}: {name} is {value!r}; give a whole number")
            return value
        return None

    def number(self, names: tuple[str, ...], what: str) -> int:
        """The same, which must be there and positive."""
        value = self.optional(names)
        if not value:
            raise InputFileError(
                f"{self.where}: no {what} in any of the fields {', '.join(names)}; give the config of an MoE model"
            )
        return value


def _attention_params(fields: _Fields, hidden: int) -> int:
    """Projections of one attention block: q, k, v and o, or the low-rank ones of MLA."""
    heads = fields.optional(HEADS) or max(1, hidden // 128)
    if latent := fields.optional(("kv_lora_rank",)):
        rope = fields.optional(("qk_rope_head_dim",)) or 0
        nope = fields.optional(("qk_nope_head_dim",)) or 0
        value = fields.optional(("v_head_dim",)) or nope
        low_rank = fields.optional(("q_lora_rank",))
        per_head = heads * (nope + rope)
        query = low_rank * (hidden + per_head) if low_rank else hidden * per_head
        return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    size = fields.optional(("head_dim",)) or hidden // heads
    shared = fields.optional(KV_HEADS) or heads
    return hidden * size * (2 * heads + 2 * shared)


def _weight_bytes(fields: _Fields) -> float:
    quantization = fields.get("quantization_config")
    if isinstance(quantization, Mapping):
        bits = quantization.get("bits") or quantization.get("w_bit")
        if isinstance(bits, int) and 0 < bits <= 32:
            group = quantization.get("group_size")
            # one 16-bit scale for each group of weights
            return bits / 8 + (2.0 / group if isinstance(group, int) and group > 0 else 0.0)
        method = str(quantization.get("quant_method", ""))
        if method in QUANTIZED_BYTES:
            return QUANTIZED_BYTES[method]
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return DTYPE_BYTES.get(dtype, 2.0)


def _load(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: is not JSON ({error}); give a Hugging Face config.json") from error
    if not isinstance(table, dict):
        raise InputFileError(f"{path}: is not a table; give a Hugging Face config.json")
    return table


MODELS: dict[str, ModelSpec] = {name: model_from_hf_config(config, name=name) for name, config in CONFIGS.items()}
"""ModelSpec by preset name: gpt-oss-20b, deepseek-v3, mixtral-8x7b, qwen3-30b-a3b, qwen3-next-80b-a3b, ..."""
