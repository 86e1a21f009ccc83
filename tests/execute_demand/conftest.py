"""A tiny random checkpoint, its experts at three levels of noise, and text that the model itself has written."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VOCABULARY, POSITIONS = 48, 20

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    from placer.execute.demand import LevelWeights, full_weights, load_level_model
    from placer.execute.demand.quality import LevelRun
    from placer.execute.experts import ExpertWeights


def _write_checkpoint(folder, **sizes):
    """A random model of examples/small_moe's architecture."""
    spec = importlib.util.spec_from_file_location("small_moe_model", ROOT / "examples" / "small_moe" / "model.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(7)
    values = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    config = module.ModelConfig(
        vocab_size=VOCABULARY, num_attention_heads=2, num_experts_per_tok=2, initializer_range=0.4, **values | sizes
    )
    module.save_checkpoint(module.SmallMoE(config), folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return _write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory):
    """One with more experts."""
    return _write_checkpoint(tmp_path_factory.mktemp("other"), num_local_experts=6)


def noisy_levels(checkpoint, noise_K, bits_K=(2, 3, 4)):
    """The experts at levels whose weights are off by these shares of their own size."""
    full = full_weights(checkpoint)
    generator = torch.Generator().manual_seed(3)

    def off(matrix, noise):
        return matrix + noise * matrix.std() * torch.randn(matrix.shape, generator=generator)

    def levels(one):
        return tuple(ExpertWeights(off(one.gate_up_FH, n), off(one.down_HI, n)) for n in noise_K)

    expert_LEK = tuple(tuple(levels(one) for (one,) in expert_EK) for expert_EK in full.expert_LEK)
    return LevelWeights(moe_layers=full.moe_layers, bits_K=bits_K, expert_LEK=expert_LEK)


@pytest.fixture(scope="session")
def weights(checkpoint):
    """Level 1 is far off, level 2 less, level 3 exact."""
    return noisy_levels(checkpoint, (1.5, 0.5, 0.0))


@pytest.fixture
def model(checkpoint, weights):
    return load_level_model(checkpoint, weights)


@pytest.fixture(scope="session")
def text(checkpoint, weights):
    """Token ids (Q, S) drawn from what the exact model says, so that exact experts predict them best."""
    exact = load_level_model(checkpoint, weights)
    generator = torch.Generator().manual_seed(5)
    token_QS = torch.randint(VOCABULARY, (96, 1), generator=generator)
    with torch.no_grad():
        for _ in range(POSITIONS - 1):
            likely_QV = exact.logits(token_QS, LevelRun(weights, 3))[:, -1].softmax(dim=-1)
            token_QS = torch.cat([token_QS, likely_QV.multinomial(1, generator=generator)], dim=1)
    return token_QS.numpy()
