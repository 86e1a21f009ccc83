"""A real model whose experts are read from planes says what it says with the same weights in memory."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from device_run_cases import layer_in_memory, make_device, make_device_plan, weights_in_memory, write_planes
from torch import nn

from placer.core.errors import MismatchError, UsageError
from placer.core.timeline import PHASES
from placer.execute.device.bench import model_layer_times, placeholder_device
from placer.execute.device.experts import DeviceExperts, DeviceStep
from placer.execute.device.generate import generate_on_device
from placer.execute.device.session import open_session

PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 9, 10, 11), (33,))
NEW_TOKENS = 5
EXPERTS, TOP_K, HIDDEN, INNER = 6, 2, 32, 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 63,
    "pad_token_id": 0,
    "num_hidden_layers": 2,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
}
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("planes") / "planes.safetensors"
    return write_planes(path, layers=2, experts=EXPERTS, hidden=HIDDEN, inner=INNER, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    found = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found)
    return found


def hottest_levels(site, hidden_NH, expert_NK):
    """A rule that depends on everything it is given."""
    return 1 + (expert_NK + site + (hidden_NH[:, :1].numpy() > 0)) % 3


class InMemory(nn.Module):
    """The reference in the place of a model's experts, with or without a level for every choice."""

    def __init__(self, index, site, levels_of, ceiling_E):
        super().__init__()
        self.load, self.levels = weights_in_memory(index), index.ladder.levels
        self.site, self.levels_of, self.ceiling_E = site, levels_of, ceiling_E

    def forward(self, hidden_TH, expert_TK, weight_TK):
        expert_TK = expert_TK.numpy()
        level_TK = np.full(expert_TK.shape, self.levels)
        if self.levels_of is not None:
            level_TK = self.levels_of(self.site, hidden_TH, expert_TK)
        level_TK = np.minimum(level_TK, self.ceiling_E[expert_TK])
        return layer_in_memory(self.load, self.site, self.levels, hidden_TH, expert_TK, level_TK, weight_TK.float())


@pytest.mark.parametrize("levels_of", [None, hottest_levels])
@pytest.mark.parametrize("routed", [None, [0, 2, 3, 6]])
def test_the_module_equals_the_reference_bit_for_bit(index, levels_of, routed) -> None:
    rng = np.random.default_rng(2)
    plan = make_device_plan(index, buffer_experts=2, ceiling_LE=np.array([[3, 2, 1, 3, 3, 2], [3, 3, 3, 3, 1, 3]]))
    hidden_TH = torch.from_numpy(rng.standard_normal((7, HIDDEN)).astype(np.float32))
    expert_TK = torch.from_numpy(np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(7)]))
    weight_TK = torch.from_numpy(rng.random((7, TOP_K)).astype(np.float32))
    with open_session(plan, index, make_device()) as session:
        step = DeviceStep(session)
        step.routed_N = None if routed is None else torch.tensor(routed)
        for site in range(2):
            session.begin()
            found_TH = DeviceExperts(site, session, step, levels_of)(hidden_TH, expert_TK, weight_TK)
            session.end()
            wanted_TH = InMemory(index, site, levels_of, plan.ceiling_LE[site])(hidden_TH, expert_TK, weight_TK)
            if routed is not None:
                kept = torch.zeros(7, 1)
                kept[routed] = 1
                wanted_TH = wanted_TH * kept
            assert torch.equal(found_TH, wanted_TH)


@needs_transformers
@pytest.mark.parametrize("levels_of", [None, hottest_levels])
@pytest.mark.parametrize("fields", [{"buffer_experts": 1}, {"cache": "lru", "cache_experts": 4, "resident": 1}])
def test_tokens_are_those_of_the_model_in_memory(folder, index, levels_of, fields) -> None:
    import transformers

    plan = make_device_plan(index, **fields)
    tokens, timeline = generate_on_device(
        folder, plan, index, make_device(), PROMPTS, NEW_TOKENS, levels_of=levels_of, warm_up=1
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for site, layer in enumerate(model.model.layers):
        layer.mlp.experts = InMemory(index, site, levels_of, plan.ceiling_LE[site])
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert row == whole[0, len(prompt) :].tolist()
    about = timeline.about
    assert about["generated"] == tokens
    assert about["tokens_by_iteration"][0] == sum(len(prompt) for prompt in PROMPTS)
    ran = timeline.tokens[timeline.phase == PHASES.index("experts")].sum()
    assert ran == 2 * TOP_K * sum(about["tokens_by_iteration"])
    assert about["peak_plane_bytes"] <= plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes


@needs_transformers
def test_generation_refuses_what_does_not_fit(folder, index, tmp_path) -> None:
    def refused(error, match, *, prompts=PROMPTS, new=2, planes=index, levels_of=None):
        plan = make_device_plan(planes, buffer_experts=2)
        with pytest.raises(error, match=match):
            generate_on_device(folder, plan, planes, make_device(), prompts, new, levels_of=levels_of)

    refused(UsageError, "max_new_tokens is 0", new=0)
    refused(UsageError, "prompts is empty", prompts=())
    refused(UsageError, "prompt 1 is", prompts=((1,), ()))
    refused(MismatchError, "token 64", prompts=((64,),))
    other = write_planes(Path(tmp_path) / "other", layers=3, experts=EXPERTS, hidden=HIDDEN, inner=INNER)
    refused(MismatchError, "quantise this model", planes=other)
    refused(UsageError, "levels go from 1 to 3", levels_of=lambda _, __, expert_NK: expert_NK * 0 + 4)


@needs_transformers
def test_the_model_s_own_layers_are_timed_for_prefill_and_decode(folder, index) -> None:
    tokens_N, layer_N = model_layer_times(folder, index, placeholder_device(64, 1.0), repetitions=2, seed=0)
    assert {1, 4, 8, 16, 32, 128} <= set(tokens_N.tolist())
    assert (layer_N > 0).all()


def random_routers(index, **other):
    from placer.execute.demand import BitRouters

    generator = torch.Generator().manual_seed(8)
    levels = len(other.get("bits_K", index.ladder.bits_K))
    weight_LEKH = torch.randn(2, EXPERTS, levels, other.pop("hidden", HIDDEN), generator=generator)
    fields = {"model": "case", "moe_layers": index.moe_layers, "bits_K": index.ladder.bits_K} | other
    return BitRouters(weight_LEKH=weight_LEKH, bias_LEK=torch.zeros(2, EXPERTS, levels), **fields)


@needs_transformers
def test_trained_routers_say_the_levels_of_a_run(index, folder, tmp_path) -> None:
    from placer.execute.demand import BitRouters

    random_routers(index).save(tmp_path / "routers.safetensors")
    routers = BitRouters.load(tmp_path / "routers.safetensors")

    def by_hand(site, hidden_NH, expert_NK):
        logits_NKK = torch.einsum("nh,nckh->nck", hidden_NH, routers.weight_LEKH[site].detach()[expert_NK])
        return logits_NKK.argmax(dim=-1).numpy() + 1

    plan, device = make_device_plan(index), make_device()
    tokens = [
        generate_on_device(folder, plan, index, device, PROMPTS, NEW_TOKENS, levels_of=levels_of)[0]
        for levels_of in (routers.for_planes(index), by_hand, None)
    ]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


@needs_transformers
@pytest.mark.parametrize("other", [{"hidden": 16}, {"bits_K": (4, 5)}, {"moe_layers": (0, 3)}])
def test_routers_of_other_planes_are_refused(index, other) -> None:
    with pytest.raises(MismatchError, match="train routers for them"):
        random_routers(index, **other).for_planes(index)
