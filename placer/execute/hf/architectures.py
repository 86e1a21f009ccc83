"""Which models placer can generate with, and whether a plan is for the model in a folder; needs neither torch."""

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.core.check import assert_runnable
from placer.core.errors import DependencyError, InputFileError, MismatchError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from traces.hf_config import model_from_hf_config

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_of",
    "check_model",
    "plain_greedy",
    "read_json",
    "require_transformers",
]

OLDEST_TRANSFORMERS = 5

ALTERING = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Settings of transformers' `generate` that act in greedy decoding too, and their values that do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How placer finds its way in one of transformers' model classes.

    experts_class   the module that is replaced; called with hidden states (T, H), ids (T, K) and weights (T, K)
    renames         (part of a name in the class, what it is called on disk)
    clamped         whether the experts have gpt-oss's activation and biases
    """

    experts_class: str
    renames: tuple[tuple[str, str], ...] = ()
    clamped: bool = False


ARCHITECTURES = {
    "mixtral": Architecture(experts_class="MixtralExperts", renames=((".mlp.", ".block_sparse_moe."),)),
    "qwen3_moe": Architecture(experts_class="Qwen3MoeExperts"),
    "olmoe": Architecture(experts_class="OlmoeExperts"),
    "gpt_oss": Architecture(experts_class="GptOssExperts", clamped=True),
}
"""By the `model_type` of config.json."""


def require_transformers() -> None:
    """Raises DependencyError where transformers is missing or older than the classes that placer replaces."""
    if importlib.util.find_spec("transformers") is None:
        raise DependencyError("generating needs transformers, which is not installed; pip install 'placer[hf]'")
    version = importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) < OLDEST_TRANSFORMERS:
        raise DependencyError(
            f"generating needs transformers {OLDEST_TRANSFORMERS} or later, {version} is installed; "
            f"pip install 'transformers>={OLDEST_TRANSFORMERS}'"
        )


def architecture_of(model_path: Path) -> Architecture:
    """The architecture of the checkpoint in this folder. Raises InputFileError for one that placer does not know."""
    config = read_json(model_path / "config.json")
    kind = config.get("model_type")
    where = f"{model_path / 'config.json'}: "
    if kind not in ARCHITECTURES:
        raise InputFileError(f"{where}model_type is {kind!r}; placer generates with {', '.join(ARCHITECTURES)}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputFileError(
            f"{where}the model is quantised ({method}); placer runs unquantised experts, so give a float32, float16 "
            "or bfloat16 checkpoint"
        )
    architecture = ARCHITECTURES[kind]
    if not architecture.clamped and config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputFileError(f"{where}hidden_act is {config['hidden_act']!r}; placer runs experts with silu")
    return architecture


def check_model(plan: Plan, model_path: Path) -> ModelSpec:
    """The shape of the model in the folder; raises MismatchError where `plan` is for another model.

    A plan names no top-k: any serves. Raises InputFileError for a folder that is no checkpoint of a known architecture,
    ViolationError for a plan that leaves an expert without a slot.
    """
    architecture_of(model_path)
    model = model_from_hf_config(model_path, name=model_path.resolve().name)
    for name, planned, found in (
        ("experts", plan.num_experts, model.num_experts),
        ("MoE layers", len(plan.slot_expert_LP), model.num_sites),
        ("MoE layers at", list(plan.moe_layers), list(model.moe_layers)),
        ("layers", plan.num_hidden_layers or model.num_hidden_layers, model.num_hidden_layers),
    ):
        if planned != found:
            wanted, has = (f"{name} {n}" if name.endswith("at") else f"{n} {name}" for n in (planned, found))
            raise MismatchError(f"the plan is for {wanted}, the model in {model_path} has {has}; solve again for it")
    assert_runnable(plan)
    return model


def plain_greedy(model_path: Path) -> list[str]:
    """Warnings for settings in generation_config.json that change greedy tokens and are not applied."""
    path = model_path / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    found = [name for name, neutral in ALTERING.items() if config.get(name, neutral) not in (None, neutral)]
    return [f"{path}: {name} is {config[name]}; placer chooses the likeliest token without it" for name in found]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputFileError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(
            f"{path}: cannot be read ({error.strerror}); give a Hugging Face checkpoint folder"
        ) from error
    except ValueError as error:
        raise InputFileError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputFileError(f"{path}: is not a JSON object")
    return data
