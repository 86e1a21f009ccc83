"""Every reader against damaged files of its own kind: only placer's own one-line errors may come out."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_cases import make_trace, one_line_errors

from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.hf_config import MODELS, model_from_hf_config
from traces.model_presets import CONFIGS
from traces.profile_store import load_profile, save_profile
from traces.readers import read_any
from traces.store import save_trace
from traces.summarize import summarize
from traces.trace import RoutingTrace

MODEL = ModelSpec.uniform("m", num_experts=8, top_k=2, num_hidden_layers=3)
TRACE = make_trace(tokens=24, weights=True, columns=True, tags=True)


def npz(save):
    buffer = io.BytesIO()
    arrays = {"expert_TLK": TRACE.expert_LTK.transpose(1, 0, 2), "request_id_T": TRACE.request_id_T}
    save(buffer, **arrays, weight_TLK=TRACE.weight_LTK.transpose(1, 0, 2), task_T=TRACE.tags["task"].codes_T)
    return buffer.getvalue()


def jsonl():
    lines = [
        {"request_id": token // 5, "experts": TRACE.expert_LTK[:, token].tolist(), "position": token, "lang": "de"}
        for token in range(24)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def replies():
    buffer = io.BytesIO()
    np.save(buffer, TRACE.expert_LTK.transpose(1, 0, 2))
    raw = TRACE.expert_LTK.transpose(1, 0, 2).astype("<i4").tobytes()
    texts = [base64.b64encode(data).decode() for data in (buffer.getvalue(), raw)]
    return json.dumps(
        [
            {"choices": [{"routed_experts": texts[0]}], "usage": {"prompt_tokens": 4, "completion_tokens": 21}},
            {"meta_info": {"routed_experts": texts[1], "prompt_tokens": 4, "completion_tokens": 21}},
        ]
    ).encode()


def saved(save, item, tmp_path):
    save(item, tmp_path / "saved")
    return (tmp_path / "saved").read_bytes()


KINDS = {
    "npz": lambda _: npz(np.savez),
    "npz packed": lambda _: npz(np.savez_compressed),
    "jsonl": lambda _: jsonl(),
    "replies": lambda _: replies(),
    "logical_count": lambda _: json.dumps({"logical_count": np.arange(24).reshape(3, 8).tolist()}).encode(),
    "store": lambda tmp_path: saved(save_trace, TRACE, tmp_path),
    "profile": lambda tmp_path: saved(save_profile, summarize(TRACE), tmp_path),
}


def damaged(data, content):
    """`content` cut short, with bytes or whole stretches changed, or with a part repeated."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1)) if content else 0
        kind = data.draw(st.sampled_from(["byte", "digit", "cut", "drop", "repeat", "fill"]))
        length = data.draw(st.integers(1, 40))
        if kind == "byte" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "digit" and content:
            content[place] = data.draw(st.sampled_from(b'0123456789-.eE[]{}",'))
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length]
        else:
            content[place : place + length] = bytes([data.draw(st.sampled_from([0, 255]))]) * len(
                content[place : place + length]
            )
    return bytes(content)


def read(path, model):
    with one_line_errors():
        assert isinstance(read_any(path, None, model), RoutingTrace | LoadCounts)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(kind, data, tmp_path):
    if not (tmp_path / "good").exists():
        (tmp_path / "good").write_bytes(KINDS[kind](tmp_path))
    (tmp_path / "bad").write_bytes(damaged(data, (tmp_path / "good").read_bytes()))
    read(tmp_path / "bad", data.draw(st.sampled_from([None, MODEL])))
    with one_line_errors():
        load_profile(tmp_path / "bad")


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_arrays_in_whole_archives(data, tmp_path):
    with zipfile.ZipFile(io.BytesIO(npz(np.savez))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = data.draw(st.sampled_from(sorted(members)))
    members[name] = damaged(data, members[name])
    with zipfile.ZipFile(tmp_path / "bad", "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    read(tmp_path / "bad", data.draw(st.sampled_from([None, MODEL])))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["experts", "weights", "request_id", "position", "phase", "layers", "logical_count", "meta_info", "choices",
     "sglext", "routed_experts", "usage", "prompt_tokens", "lang"]
)  # fmt: skip


@given(value=st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON, max_size=3), max_size=5))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_under_the_right_names(value, tmp_path):
    (tmp_path / "bad").write_text(json.dumps(value))
    for source in ("jsonl", "vllm", "logical_count", "sglang", None):
        with one_line_errors():
            read_any(tmp_path / "bad", source, MODEL)


CONFIG_FIELDS = st.sampled_from(
    ["num_experts", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "hidden_size", "head_dim",
     "moe_intermediate_size", "intermediate_size", "first_k_dense_replace", "mlp_layer_types", "decoder_sparse_step",
     "mlp_only_layers", "moe_layer_freq", "moe_layers", "interleave_moe_layer_step", "expert_layer_period",
     "expert_layer_offset", "moe_layer_interval", "moe_layer_end_index", "text_config", "quantization_config", "dtype",
     "n_shared_experts", "kv_lora_rank", "q_lora_rank", "num_attention_heads", "num_key_value_heads", "model_type"]
)  # fmt: skip


@given(st.sampled_from(sorted(MODELS)), st.dictionaries(CONFIG_FIELDS, JSON | st.integers(-3, 70), max_size=3))
@settings(max_examples=120, deadline=None)
def test_any_config_under_the_right_names(name, changes):
    with one_line_errors():
        model_from_hf_config({**CONFIGS[name], **changes})
