"""Expert weights from every layout of a checkpoint, read lazily; random experts on disk."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from placer.core.errors import InputFileError, UsageError
from placer.core.model import Site
from placer.execute import checkpoint as checkpoint_module
from placer.execute import write_random_experts
from placer.execute.experts import ExpertFile
from placer.execute.random_experts import stored_layers

LAYERS, EXPERTS, HIDDEN, INNER = 2, 5, 12, 6


@pytest.fixture
def weights():
    """{(layer, expert): (gate, up, down)} as a model holds them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return {
        (layer, expert): tuple(torch.randn(shape, generator=generator) for shape in shapes)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }


def split_keys(weights, block="mlp", names=("gate_proj", "up_proj", "down_proj"), prefix="model."):
    return {
        f"{prefix}layers.{layer}.{block}.experts.{expert}.{name}.weight": matrix
        for (layer, expert), matrices in weights.items()
        for name, matrix in zip(names, matrices, strict=True)
    }


def fused_keys(weights, *, transposed):
    tensors = {}
    for layer in range(LAYERS):
        gate_up = torch.stack([torch.cat(weights[layer, e][:2]) for e in range(EXPERTS)])
        down = torch.stack([weights[layer, e][2] for e in range(EXPERTS)])
        if transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        tensors |= {
            f"model.layers.{layer}.mlp.experts.gate_up_proj": gate_up,
            f"model.layers.{layer}.mlp.experts.down_proj": down,
        }
    return tensors


LAYOUTS = {
    "qwen": split_keys,
    "mixtral": lambda w: split_keys(w, "block_sparse_moe", ("w1", "w3", "w2")),
    "multimodal": lambda w: split_keys(w, prefix="model.language_model."),
    "fused": lambda w: fused_keys(w, transposed=False),
    "fused transposed": lambda w: fused_keys(w, transposed=True),
}
OTHERS = {
    "model.embed_tokens.weight": torch.zeros(3, HIDDEN),
    "model.layers.0.mlp.gate.weight": torch.zeros(EXPERTS, HIDDEN),
    "model.layers.1.mlp.shared_experts.gate_proj.weight": torch.zeros(INNER, HIDDEN),
    "model.layers.0.mlp.gate_proj.weight": torch.zeros(INNER, HIDDEN),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_experts(tmp_path, weights, layout):
    save_file(LAYOUTS[layout](weights) | OTHERS, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with ExpertFile(path) as file:
            assert (file.hidden_size, file.moe_intermediate_size) == (HIDDEN, INNER)
            for (layer, expert), (gate, up, down) in weights.items():
                found = file.load(layer, expert, dtype=torch.float32)
                assert torch.equal(found.gate_up_FH, torch.cat([gate, up]))
                assert torch.equal(found.down_HI, down)
                assert found.down_HI.is_contiguous()


@pytest.mark.parametrize(("hidden", "inner"), [(8, 4), (4, 4), (4, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_orientation_is_found_even_where_one_shape_is_square(tmp_path, hidden, inner, transposed):
    gate_up, down = torch.randn(3, 2 * inner, hidden), torch.randn(3, hidden, inner)
    stored = (gate_up, down) if not transposed else (gate_up.transpose(1, 2), down.transpose(1, 2))
    names = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    path = tmp_path / "m.safetensors"
    save_file({name: matrix.contiguous() for name, matrix in zip(names, stored, strict=True)}, path)
    with ExpertFile(path) as file:
        assert (file.hidden_size, file.moe_intermediate_size) == (hidden, inner)
        assert torch.equal(file.load(0, 2, dtype=torch.float32).gate_up_FH, gate_up[2])
        assert torch.equal(file.load(0, 2, dtype=torch.float32).down_HI, down[2])


class Spy:
    """A safe_open that notes every slice taken."""

    def __init__(self, log, path, **options):
        self.log, self.path, self.inner = log, path, safe_open(path, **options)

    def __enter__(self):
        self.handle = self.inner.__enter__()
        return self

    def __exit__(self, *error):
        return self.inner.__exit__(*error)

    def keys(self):
        return self.handle.keys()

    def get_slice(self, key):
        return SpySlice(self.log, self.path.name, key, self.handle.get_slice(key))


class SpySlice:
    def __init__(self, log, file, key, part):
        self.log, self.file, self.key, self.part = log, file, key, part

    def __getitem__(self, index):
        self.log.append((self.file, self.key, index))
        return self.part[index]

    def __getattr__(self, name):
        return getattr(self.part, name)


def save_sharded(folder, tensors):
    """One layer per file, as in a large checkpoint, with its index."""
    index = {}
    for layer in range(LAYERS):
        part = {key: value for key, value in tensors.items() if f"layers.{layer}." in key}
        name = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_only_named_experts_and_files_are_read(tmp_path, weights, monkeypatch):
    log = []
    monkeypatch.setattr(checkpoint_module, "safe_open", lambda path, **options: Spy(log, path, **options))
    (tmp_path / "split").mkdir()
    (tmp_path / "fused").mkdir()
    save_sharded(tmp_path / "split", split_keys(weights))
    save_sharded(tmp_path / "fused", fused_keys(weights, transposed=False))
    with ExpertFile(tmp_path / "split") as file:
        assert log == []
        file.load(1, 3, dtype=torch.float32)
    name = "model-00002-of-00002.safetensors"
    stem = "model.layers.1.mlp.experts"
    roles = ("gate_proj", "up_proj", "down_proj")
    assert log == [(name, f"{stem}.3.{role}.weight", slice(None)) for role in roles]
    log.clear()
    with ExpertFile(tmp_path / "fused") as file:
        file.load(1, 3, dtype=torch.float32)
    assert log == [(name, f"{stem}.{part}", 3) for part in ("gate_up_proj", "down_proj")]


def test_missing_expert_layer_shard_and_matrix(tmp_path, weights):
    save_sharded(tmp_path, split_keys({key: value for key, value in weights.items() if key != (1, 4)}))
    with ExpertFile(tmp_path) as file:
        with pytest.raises(InputFileError, match=r"layer 1 expert 4 .*experts 0 to 3"):
            file.load(1, 4, dtype=torch.float32)
        with pytest.raises(InputFileError, match=rf"{tmp_path}: layer 7 expert 0 .*no layer 7"):
            file.load(7, 0, dtype=torch.float32)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with (
        ExpertFile(tmp_path) as file,
        pytest.raises(InputFileError, match=r"model-00002-of-00002\.safetensors: cannot"),
    ):
        file.load(1, 0, dtype=torch.float32)
    partial = tmp_path / "partial.safetensors"
    save_file({k: v for k, v in split_keys(weights).items() if "experts.2.up_proj" not in k}, partial)
    with ExpertFile(partial) as file, pytest.raises(InputFileError, match="layer 0 expert 2 has no up matrix"):
        file.load(0, 2, dtype=torch.float32)
    fused = tmp_path / "fused.safetensors"
    save_file(fused_keys(weights, transposed=False), fused)
    with ExpertFile(fused) as file, pytest.raises(InputFileError, match=r"layer 0 has no expert 5 .*experts 0 to 4"):
        file.load(0, 5, dtype=torch.float32)


def test_checkpoints_that_cannot_be_run_say_why(tmp_path, weights):
    def refused(tensors, match):
        path = tmp_path / "bad.safetensors"
        save_file(tensors, path)
        with pytest.raises(InputFileError, match=match), ExpertFile(path) as file:
            file.load(0, 1, dtype=torch.float32)

    fused = fused_keys(weights, transposed=False)
    refused(OTHERS, "no expert weights")
    refused(fused | {"model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(EXPERTS, 2 * INNER)}, "have biases")
    small = {k: v.to(torch.float8_e4m3fn) for k, v in split_keys(weights).items()}
    refused(small, "stored as F8_E4M3")
    refused(fused | {"model.layers.0.mlp.experts.down_proj": torch.zeros(EXPERTS, 7, 7)}, "do not fit together")
    draft = {key: value.clone() for key, value in split_keys(weights, prefix="draft.").items()}
    refused(split_keys(weights) | draft, "could be the same")
    up = {"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(INNER + 1, HIDDEN)}
    refused(split_keys(weights) | up, "layer 0 expert 1 has gate")
    for content, match in ((b"junk", "safetensors"), (b"", "safetensors")):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(InputFileError, match=match):
            ExpertFile(tmp_path / "bad.safetensors")
    with pytest.raises(InputFileError, match="nothing"):
        ExpertFile(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match=r"no \.safetensors file"):
        ExpertFile(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(InputFileError, match="not an index"):
        ExpertFile(tmp_path / "empty")


def test_stored_types_are_converted(tmp_path, weights):
    save_file({k: v.to(torch.bfloat16) for k, v in split_keys(weights).items()}, tmp_path / "m.safetensors")
    with ExpertFile(tmp_path) as file:
        found = file.load(0, 0, dtype=torch.float32)
    assert found.down_HI.dtype == torch.float32
    assert torch.equal(found.down_HI, weights[0, 0][2].to(torch.bfloat16).float())


def test_random_experts_are_seeded_and_keep_variance(tmp_path, helpers):
    model = helpers.toy_model(2, 3, 2, hidden=64, inner=32)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_experts(tmp_path / name, model, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    tensors = load_file(tmp_path / "a")
    assert len(tensors) == 2 * 3 * 3
    down = tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert down.shape == (64, 32)
    assert abs(float(down.var()) * 32 - 1) < 0.1
    matrices = {value.numpy().tobytes() for value in tensors.values()}
    assert len(matrices) == len(tensors)
    write_random_experts(tmp_path / "half", model, 1, dtype="bfloat16")
    half = load_file(tmp_path / "half")
    assert all(torch.equal(half[name], value.to(torch.bfloat16)) for name, value in tensors.items())


def test_an_expert_depends_on_its_place_not_on_the_models_size(tmp_path, helpers):
    write_random_experts(tmp_path / "small", helpers.toy_model(2, 3, 2), 9)
    write_random_experts(tmp_path / "large", helpers.toy_model(3, 7, 2), 9)
    large = load_file(tmp_path / "large")
    assert all(torch.equal(large[name], value) for name, value in load_file(tmp_path / "small").items())


def test_sites_that_share_a_pool_share_stored_experts(tmp_path, helpers):
    model = helpers.toy_model(3, 4, 2)
    sites = (Site(layer=0, num_experts=2), Site(layer=0, num_experts=2, round=1), Site(layer=2, num_experts=4, pool=0))
    model = replace(model, sites=sites)
    assert stored_layers(model) == (0, 0, 0)
    write_random_experts(tmp_path / "m", model, 0)
    assert len(load_file(tmp_path / "m")) == 4 * 3


def test_random_experts_file_is_whole_or_absent(tmp_path, helpers, monkeypatch):
    model = helpers.toy_model(1, 2, 1)
    with pytest.raises(UsageError, match="float16"):
        write_random_experts(tmp_path / "m", model, 0, dtype="float16")
    with pytest.raises(UsageError, match="matrices_per_expert is 2"):
        write_random_experts(tmp_path / "m", replace(model, matrices_per_expert=2), 0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("placer.execute.random_experts._write_matrix", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_random_experts(tmp_path / "m", model, 0)
    assert list(tmp_path.iterdir()) == []


def test_random_experts_header_follows_the_format(tmp_path, helpers):
    write_random_experts(tmp_path / "m", helpers.toy_model(1, 2, 1, hidden=6, inner=3), 0)
    raw = (tmp_path / "m").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    ends = [entry["data_offsets"][1] for entry in header.values()]
    starts = [entry["data_offsets"][0] for entry in header.values()]
    assert length % 8 == 0
    assert starts == [0, *ends[:-1]]
    assert ends[-1] == len(raw) - 8 - length == 2 * 3 * 6 * 3 * np.dtype(np.float32).itemsize


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_a_saved_transformers_block_computes_the_same(tmp_path, family):
    """Transformers' own MoE block, saved as it saves it, against our reference with the block's own routing."""
    transformers = pytest.importorskip("transformers")
    from placer.execute.reference import moe_layer

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
    }
    own = {
        "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
    }[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **own)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    block = model.model.layers[0].mlp
    x_TH = torch.randn(20, 32)
    with torch.inference_mode():
        expected = block(x_TH[None])
        expected_TH = (expected[0] if isinstance(expected, tuple) else expected)[0]
        logits = torch.nn.functional.linear(x_TH, block.gate.weight)
        weight_TK, expert_TK = logits.softmax(dim=-1).topk(2, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        with ExpertFile(tmp_path) as file:
            y_TH = moe_layer(x_TH, expert_TK, weight_TK, lambda e: file.load(0, e, dtype=torch.float32))
    assert torch.allclose(y_TH, expected_TH, rtol=1e-4, atol=1e-6)
    assert float(y_TH.abs().max()) > 1e-4
