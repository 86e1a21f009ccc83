import subprocess
import sys

import numpy as np
import pytest

from placer.core.errors import DependencyError, InputFileError, MismatchError, UsageError
from placer.core.model import ModelSpec
from traces.recorder import RoutingRecorder, record_prompts
from traces.router_output import extract_choice, past_length, to_numpy, weights_of

torch = pytest.importorskip("torch")

TINY = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, (0, 1, 2)),
    "qwen3_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
         "decoder_sparse_step": 1, "mlp_only_layers": [0]},
        (1, 2),
    ),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, (0, 1, 2)),
    "deepseek_v3": (
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
         "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
        (1, 2),
    ),
    "gpt_oss": ({"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}, (0, 1, 2)),
}  # fmt: skip


def tiny_model(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**TINY, **FAMILIES[family][0]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def own_routing(model, layers, input_ids):
    """What each layer's router itself answers to its layer's input, asked a second time and by hand."""
    asked, inputs = {}, {}
    for layer in layers:
        block = model.model.layers[layer].mlp
        router = getattr(block, "gate", None) or block.router

        def keep(_module, args, layer=layer):
            inputs[layer] = args[0].clone()

        asked[layer] = (router, router.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=input_ids)
        for _, handle in asked.values():
            handle.remove()
        return {layer: asked[layer][0](inputs[layer]) for layer in layers}


EVERY_FAMILY = [
    # each imports another modelling file, which takes longer than its test
    pytest.param(family, marks=() if family in ("mixtral", "deepseek_v3") else pytest.mark.slow)
    for family in FAMILIES
]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_hook_hears_the_models_own_routing(family):
    model = tiny_model(family)
    layers = FAMILIES[family][1]
    input_ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=input_ids)
    trace = recorder.finish()
    assert trace.model.moe_layers == layers
    assert trace.model.num_experts == 8
    for row, (layer, output) in enumerate(own_routing(model, layers, input_ids).items()):
        logits, weights, indices = output[0], output[1], output[2]
        assert np.array_equal(trace.expert_LTK[row], indices.numpy()), layer
        assert np.allclose(trace.weight_LTK[row], weights.float().numpy(), atol=1e-3)
        if family != "deepseek_v3":
            # an independent reading: the plain top-k of the logits (DeepSeek chooses by group and bias)
            plain = logits.reshape(-1, 8).topk(indices.shape[-1]).indices.sort().values
            assert np.array_equal(np.sort(trace.expert_LTK[row], axis=1), plain.numpy())
    assert trace.request_id_T.tolist() == [0] * 7 + [1] * 7
    assert trace.position_T.tolist() == [*range(7)] * 2
    assert not trace.phase_T.any()
    assert trace.token_id_T is None


def test_generation_is_decode_of_the_same_requests():
    model = tiny_model("mixtral")
    input_ids = torch.randint(3, 100, (2, 5))
    mask = torch.ones_like(input_ids)
    mask[1, :2] = 0
    with RoutingRecorder(model, token_ids=True) as recorder:
        recorder.label(domain="law")
        model.generate(input_ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        recorder.label(domain="art")
        with torch.no_grad():
            model(input_ids[:1])
    trace = recorder.finish("mine")
    assert trace.request_id_T.tolist() == [0] * 5 + [1] * 3 + [0, 1] * 2 + [2] * 5
    assert trace.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 3, 6, 4, 0, 1, 2, 3, 4]
    assert trace.phase_T.tolist() == [0] * 8 + [1] * 4 + [0] * 5
    assert trace.token_id_T[:8].tolist() == [*input_ids[0].tolist(), *input_ids[1, 2:].tolist()]
    labels = [trace.tags["domain"].names[code] for code in trace.tags["domain"].codes_T]
    assert labels == ["law"] * 12 + ["art"] * 5
    assert trace.provenance == "mine"


def test_hooks_are_gone_after_the_block():
    model = tiny_model("mixtral")
    with pytest.raises(RuntimeError, match="stop"), RoutingRecorder(model) as recorder:
        raise RuntimeError("stop")
    model(input_ids=torch.randint(3, 100, (1, 4)))
    with pytest.raises(UsageError, match="nothing was recorded"):
        recorder.finish()


def test_another_spec_must_fit():
    model = tiny_model("mixtral")
    spec = ModelSpec.uniform("four", num_experts=8, top_k=2, num_hidden_layers=4)
    with RoutingRecorder(model, spec=spec) as recorder:
        model(input_ids=torch.randint(3, 100, (1, 4)))
    with pytest.raises(MismatchError, match=r"0\.\.3 \(4\).*0\.\.2 \(3\)"):
        recorder.finish()


class OddRouter(torch.nn.Module):
    """A router whose output is made up."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, hidden):
        return self.answer(hidden.shape[0] * hidden.shape[1])


class OddLayer(torch.nn.Module):
    def __init__(self, answer, calls):
        super().__init__()
        self.router, self.calls = OddRouter(answer), calls

    def forward(self, hidden):
        for _ in range(self.calls):
            self.router(hidden)
        return hidden


class OddModel(torch.nn.Module):
    """Two layers with odd routers, called with (batch, tokens) of ids."""

    def __init__(self, answer, calls=1):
        super().__init__()
        self.layers = torch.nn.ModuleList([OddLayer(answer, calls), OddLayer(answer, calls)])

    def forward(self, input_ids):
        hidden = input_ids[:, :, None].float()
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def ids(tokens, top_k=2):
    return torch.arange(tokens * top_k).reshape(tokens, top_k) % 7


@pytest.mark.parametrize(
    ("answer", "calls", "message"),
    [
        pytest.param(lambda n: torch.rand(n, 8), 1, "without the chosen ids", id="dbrx: logits only"),
        pytest.param(lambda n: (torch.rand(n, 8), torch.rand(n, 8)), 1, "without the chosen ids", id="llama4"),
        pytest.param(lambda n: (ids(n), ids(n)), 1, "without the chosen ids", id="two integer tensors"),
        pytest.param(
            lambda n: (torch.rand(n, 8), torch.nn.functional.one_hot(ids(n, 1)[:, 0], 8)),
            1,
            "integers that are no expert ids",
            id="switch: a mask",
        ),
        pytest.param(lambda n: (torch.rand(n, 8), ids(n) - 5), 1, "no expert ids", id="negative"),
        pytest.param(lambda n: (torch.rand(n, 8), ids(n + 1)), 1, "saw 5 tokens of a call with 4", id="padded"),
        pytest.param(lambda n: (torch.rand(n, 8), ids(n)), 2, "called twice", id="rounds"),
        pytest.param(lambda n: (torch.rand(n, 8), ids(n)), 0, "was not called", id="skipped"),
    ],
)
def test_what_cannot_be_recorded_is_said(answer, calls, message):
    model = OddModel(answer, calls)
    with pytest.raises(MismatchError, match=message), RoutingRecorder(model):
        model(torch.ones(1, 4, dtype=torch.long))


def test_other_outputs_are_served_by_extract_and_the_model_is_guessed():
    model = OddModel(lambda n: {"chosen": ids(n), "weights": torch.rand(n, 8, dtype=torch.bfloat16)})
    with RoutingRecorder(model, extract=lambda output: (output["weights"], output["chosen"])) as recorder:
        model(torch.ones(2, 3, dtype=torch.long))
    trace = recorder.finish()
    assert np.array_equal(trace.expert_LTK[0], ids(6).numpy())
    assert trace.weight_LTK.shape == trace.expert_LTK.shape
    assert trace.model.num_experts == 7
    assert any("--model" in note for note in trace.notes)


def test_four_tuples_and_all_expert_weights_are_read():
    scores = torch.rand(4, 8)
    chosen = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 0]])
    weights, indices = extract_choice((torch.rand(4, 8), chosen, scores, None))
    assert indices is chosen
    read = weights_of(weights, chosen.numpy(), np.array([True, True, False, True]))
    assert np.allclose(read, scores.gather(1, chosen)[[0, 1, 3]].numpy(), atol=1e-3)
    assert weights_of(torch.rand(3, 8), chosen.numpy(), np.ones(4, bool)) is None
    assert weights_of(torch.rand(4, 3), chosen.numpy(), np.ones(4, bool)) is None
    assert extract_choice((None, 3)) == (None, None)


def test_pasts_of_every_form():
    keys = torch.zeros(1, 2, 9, 4)
    assert past_length(None) == 0
    assert past_length(((keys, keys),)) == 9
    assert past_length(()) == 0
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]


def test_models_without_or_with_too_many_routers():
    with pytest.raises(UsageError, match="no module in a layer"):
        RoutingRecorder(torch.nn.Linear(2, 2))
    model = OddModel(lambda n: None)
    model.layers[0].second = OddRouter(lambda n: None)
    with pytest.raises(UsageError, match="layer 0 has two modules"):
        RoutingRecorder(model)
    with pytest.raises(UsageError, match="input_ids or inputs_embeds"), RoutingRecorder(OddModel(lambda n: None)) as _:
        OddModel.__call__(_._model, torch.ones(3))


def save_checkpoint(folder):
    """A tiny model with a byte tokenizer, as a folder that from_pretrained reads."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tiny_model("olmoe").save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<eos>": 1, "<pad>": 2, **{letter: 3 + i for i, letter in enumerate("abcdefgh")}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)


def test_prompts_through_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path)
    seen = []
    trace = record_prompts(tmp_path, ["a b c", "d e"], progress=lambda done, total: seen.append((done, total)))
    assert trace.request_id_T.tolist() == [0, 0, 0, 1, 1]
    assert trace.model.top_k == 3
    assert seen == [(1, 2), (2, 2)]
    longer = record_prompts(tmp_path, ["a b c"], max_new_tokens=2)
    assert longer.num_tokens <= 5
    assert np.array_equal(longer.expert_LTK[:, :3], trace.expert_LTK[:, :3])
    with pytest.raises(UsageError, match="no tokens"):
        record_prompts(tmp_path, [" "])
    with pytest.raises(UsageError, match="prompts"):
        record_prompts(tmp_path, [])


def test_folders_that_are_no_checkpoints(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(InputFileError, match=r"no config\.json"):
        record_prompts(tmp_path, ["a"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputFileError, match="no checkpoint"):
        record_prompts(tmp_path, ["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"placer\[hf\]"):
        record_prompts(tmp_path, ["a"])


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, traces.recorder, traces.readers, traces.synthetic, traces.stats, traces.hf_config; "
        "print(sorted({'torch', 'transformers', 'simpy', 'pulp', 'ortools'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
