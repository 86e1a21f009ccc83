"""Tiny random checkpoints written by transformers' own classes, plans for them, and what those classes generate."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from placer.core.plan import Plan
from traces.hf_config import model_from_hf_config

ROOT = Path(__file__).parents[2]
EXPERTS, TOP_K, VOCABULARY = 8, 3, 64
PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 9, 10, 11, 12, 13), (33,), (8, 8, 8, 8, 8))

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch
    import transformers

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    # so large that every expert matters: with the default, outputs would hardly depend on them
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 16,
    "pad_token_id": 0,
}
SIZES = {
    "mixtral": {"num_hidden_layers": 2, "intermediate_size": 48, "num_local_experts": EXPERTS},
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": EXPERTS,
        "head_dim": 8,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "olmoe": {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts": EXPERTS},
    "gpt_oss": {
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def small_model(kind):
    """A random model of the kind in which no parameter is zero or one by initialisation."""
    torch.manual_seed(sorted(SIZES).index(kind))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **COMMON, **SIZES[kind])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name or "router" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def make_plan(folder, ranks, *, slots_per_rank=None, seed=0, mode="per_rank", **fields):
    """A plan for the checkpoint: experts in random slots, what is left over filled with replicas."""
    spec = model_from_hf_config(folder)
    rng = np.random.default_rng(seed)
    slots = ranks * (slots_per_rank or -(-EXPERTS // ranks))
    rows = []
    for _ in range(spec.num_sites):
        row = np.concatenate([rng.permutation(EXPERTS), rng.integers(EXPERTS, size=slots - EXPERTS)])
        rows.append(row[rng.permutation(slots)])
    values = {
        "model": folder.name,
        "num_experts": EXPERTS,
        "num_ranks": ranks,
        "ranks_per_node": ranks,
        "moe_layers": spec.moe_layers,
        "slot_expert_LP": np.array(rows, dtype=np.int64),
        "mode": mode,
        "num_hidden_layers": spec.num_hidden_layers,
    }
    return Plan(**values | fields)


@functools.cache
def single_process_tokens(folder, max_new_tokens, prompts=PROMPTS):
    """What transformers alone generates for each prompt, one at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        rows.append(whole[0, len(prompt) :].tolist())
    return rows


def small_moe_checkpoint(folder):
    """A random checkpoint by examples/small_moe."""
    spec = importlib.util.spec_from_file_location("small_moe_model", ROOT / "examples" / "small_moe" / "model.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(7)
    config = module.ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        initializer_range=0.3,
    )
    module.save_checkpoint(module.SmallMoE(config), folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder by kind: the four architectures as transformers saves them, and the project's small model."""
    folders = {}
    for kind in SIZES:
        folders[kind] = tmp_path_factory.mktemp(kind)
        small_model(kind).save_pretrained(folders[kind])
    folders["small_moe"] = tmp_path_factory.mktemp("small_moe")
    small_moe_checkpoint(folders["small_moe"])
    return folders


@pytest.fixture(scope="session")
def executor_helpers():
    """What the executor's own tests share."""
    path = Path(__file__).parents[1] / "execute" / "conftest.py"
    spec = importlib.util.spec_from_file_location("execute_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def thread_ranks(executor_helpers):
    """Ranks that are threads of one process."""
    return executor_helpers.ThreadRanks


@pytest.fixture(scope="session")
def random_rounds(executor_helpers):
    """Rounds of random pieces."""
    return executor_helpers.random_rounds


@pytest.fixture
def tiny():
    return SimpleNamespace(
        KINDS=tuple(SIZES),
        EXPERTS=EXPERTS,
        PROMPTS=PROMPTS,
        TOP_K=TOP_K,
        make_plan=make_plan,
        single_process_tokens=single_process_tokens,
        small_model=small_model,
    )
