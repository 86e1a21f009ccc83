import json

import pytest

from placer.core.errors import InputFileError
from traces.hf_config import MODELS, model_from_hf_config, moe_layers

BASE = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
PUBLISHED = {
    # name: (routed layers, experts, top-k, billions of parameters in routed experts within these bounds)
    "gpt-oss-20b": (24, 32, 4, 19, 20.9),
    "deepseek-v3": (58, 256, 8, 640, 671),
    "mixtral-8x7b": (32, 8, 2, 44, 46.7),
    "qwen3-30b-a3b": (48, 128, 8, 28, 30.5),
    "qwen3-next-80b-a3b": (48, 512, 10, 76, 80),
    "kimi-k2": (60, 384, 8, 1000, 1040),
    "olmoe-1b-7b": (16, 64, 8, 6.3, 6.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    layers, experts, top_k, low, high = PUBLISHED[name]
    model = MODELS[name]
    assert (model.num_sites, model.num_experts, model.top_k) == (layers, experts, top_k)
    assert low * 1e9 < model.expert_params * experts * layers < high * 1e9
    assert model.name == name
    assert model.attention_params > 0


def test_every_preset_is_named_here():
    assert set(MODELS) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 0]}, (1, 2, 4)),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse", "dense"]}, (1, 3, 4)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, (1, 3, 5)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4}, (3,)),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, (1, 2, 3, 4, 5)),
        ({"moe_layers": [1, 3]}, (1, 3)),
        ({"interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"num_dense_layers": 3}, (3, 4, 5)),
    ],
)
def test_the_families_rules_of_moe_layers(rule, expected):
    assert moe_layers({**BASE, **rule}, 6) == expected
    assert model_from_hf_config({**BASE, **rule}).moe_layers == expected


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"num_local_experts": 8}, "num_experts", 8),
        ({"n_routed_experts": 8}, "num_experts", 8),
        ({"moe_num_experts": 8}, "num_experts", 8),
        ({"num_experts": 8, "moe_k": 3}, "top_k", 3),
        ({"num_experts": 8, "moe_topk": 3}, "top_k", 3),
        ({"num_experts": 8, "top_k_experts": 3}, "top_k", 3),
        ({"num_experts": 8, "moe_top_k": 3}, "top_k", 3),
        ({"num_experts": 8, "n_shared_experts": 2}, "shared_intermediate_size", 32),
        ({"num_experts": 8, "num_shared_experts": 1}, "shared_intermediate_size", 16),
        ({"num_experts": 8, "shared_expert_intermediate_size": 40}, "shared_intermediate_size", 40),
        ({"num_experts": 8, "model_type": "nemotron_h"}, "matrices_per_expert", 2),
        ({"num_experts": 8, "zero_expert_num": 4}, "num_ids", 12),
        ({"num_experts": 8, "torch_dtype": "float32"}, "weight_bytes", 4.0),
        ({"num_experts": 8, "dtype": "torch.float16"}, "weight_bytes", 2.0),
        ({"num_experts": 8, "quantization_config": {"quant_method": "fp8"}}, "weight_bytes", 1.0),
        ({"num_experts": 8, "quantization_config": {"quant_method": "mxfp4"}}, "weight_bytes", 0.53125),
        ({"num_experts": 8, "quantization_config": {"bits": 4, "group_size": 128}}, "weight_bytes", 0.515625),
        (
            {"num_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
            "attention_params",
            64 * 32 + 2 * 64 * 16 + 32 * 64,
        ),
        (
            {
                "num_experts": 8,
                "num_attention_heads": 4,
                "kv_lora_rank": 8,
                "q_lora_rank": 6,
                "qk_rope_head_dim": 2,
                "qk_nope_head_dim": 4,
                "v_head_dim": 5,
            },
            "attention_params",
            64 * 6 + 6 * 4 * 6 + 64 * (8 + 2) + 8 * 4 * (4 + 5) + 4 * 5 * 64,
        ),
    ],
)
def test_field_names(fields, name, value):
    base = {key: field for key, field in BASE.items() if key != "num_experts"}
    if name == "top_k":
        base.pop("num_experts_per_tok")
    assert getattr(model_from_hf_config({**base, **fields}), name) == value


def test_expert_size_falls_back_to_the_dense_size():
    config = {**BASE, "intermediate_size": 48}
    assert model_from_hf_config(config).moe_intermediate_size == 16
    config.pop("moe_intermediate_size")
    assert model_from_hf_config(config).moe_intermediate_size == 48


def test_nested_text_models():
    outer = {"model_type": "vision", "text_config": BASE, "hidden_size": 7, "vision_config": {"num_hidden_layers": 99}}
    model = model_from_hf_config(outer)
    assert (model.hidden_size, model.num_hidden_layers, model.name) == (64, 6, "vision")
    dbrx = {
        "model_type": "dbrx", "d_model": 32, "n_layers": 3, "n_heads": 4, "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
    }  # fmt: skip
    model = model_from_hf_config(dbrx)
    assert (model.num_experts, model.top_k, model.moe_intermediate_size, model.num_sites) == (4, 2, 48, 3)
    assert model.attention_params == 32 * 8 * (2 * 4 + 2 * 2)


def test_reads_a_file_and_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "tiny"}))
    one, two = model_from_hf_config(tmp_path / "config.json"), model_from_hf_config(tmp_path, name="mine")
    assert (one.name, two.name) == ("tiny", "mine")
    assert one.sites == two.sites


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "no experts in any of the fields"),
        ({"num_experts": 0}, "no experts"),
        ({"num_experts": 8.0}, "num_experts is 8.0"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_experts": -8}, "num_experts is -8"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok is '2'"),
        ({"num_hidden_layers": 10**9}, "no model has more"),
        ({"hidden_size": None}, "no hidden size"),
        ({"moe_layers": []}, "none of the 6 layers has experts"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": 3}, "mlp_only_layers is 3"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(InputFileError, match=message):
        model_from_hf_config({**BASE, **change})


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 5000])
def test_wrong_files_are_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputFileError, match=r"config\.json"):
        model_from_hf_config(tmp_path)
    with pytest.raises(InputFileError, match="absent"):
        model_from_hf_config(tmp_path / "absent")
