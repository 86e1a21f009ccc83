"""A checkpoint quantised into planes: the file, the errors it states, perplexity with its experts, and refusals."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from placer.core.device.ladder import LADDERS, BitLadder  # noqa: E402
from placer.core.errors import InputFileError, MismatchError, UsageError  # noqa: E402
from placer.execute.experts import ExpertFile  # noqa: E402
from placer.execute.planes import perplexity, plane_weights, quantize_model  # noqa: E402
from traces.plane_store import load_plane_index, verify_planes  # noqa: E402

VOCABULARY, EXPERTS, LAYERS = 64, 4, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 24,
    "num_local_experts": EXPERTS,
    "initializer_range": 0.3,
    "head_dim": 8,
}
WHOLE = BitLadder(bits_K=(3, 8), nested=False)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 24))


def written_model(folder, kind="mixtral"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planes") / "tiny"
    written_model(folder)
    return folder


@pytest.fixture(scope="module")
def nested(checkpoint):
    return quantize_model(checkpoint, checkpoint.parent / "nested.safetensors", LADDERS["v1"], TOKENS)


@pytest.fixture(scope="module")
def copies(checkpoint):
    return {
        method: quantize_model(checkpoint, checkpoint.parent / f"{method}.safetensors", WHOLE, TOKENS, method=method)
        for method in ("gptq", "rtn")
    }


def test_the_file_is_what_the_index_says(checkpoint, nested) -> None:
    assert nested.shape_LEK == (LAYERS, EXPERTS, 3)
    verify_planes(nested)
    assert nested.total_bytes == LAYERS * EXPERTS * LADDERS["v1"].level_bytes(nested.shapes, 3)
    again = quantize_model(checkpoint, checkpoint.parent / "again.safetensors", LADDERS["v1"], TOKENS)
    assert again.path.read_bytes() == nested.path.read_bytes()
    assert load_plane_index(again.path).sha256 == nested.sha256


def test_errors_fall_with_the_level_and_are_those_of_the_weights(checkpoint, nested, copies) -> None:
    for index in (nested, *copies.values()):
        assert (np.diff(index.error_LEK, axis=2) < 0).all()
        assert (index.error_LEK > 0).all()
    assert copies["gptq"].error_LEK.mean() < copies["rtn"].error_LEK.mean()
    with ExpertFile(checkpoint) as file:
        exact = file.load(1, 2, dtype=torch.float32)
    eight = plane_weights(copies["rtn"], 2)(1, 2)
    width = (exact.down_HI.max(1).values - exact.down_HI.min(1).values)[:, None]
    assert ((eight.down_HI - exact.down_HI).abs() <= width / 255 * 0.75).all()


def test_perplexity_is_transformers_own_and_gets_worse_with_fewer_bits(checkpoint, nested, copies) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.from_numpy(TOKENS)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    own = perplexity(checkpoint, None, TOKENS)
    assert own.nats == pytest.approx(expected, rel=1e-4)
    assert own.tokens == TOKENS.shape[0] * (TOKENS.shape[1] - 1)
    eight = perplexity(checkpoint, plane_weights(copies["gptq"], 2), TOKENS)
    two = perplexity(checkpoint, plane_weights(nested, 1), TOKENS)
    assert abs(eight.nats - own.nats) < 0.01 < abs(two.nats - own.nats)
    everyone = np.ones((LAYERS, EXPERTS), dtype=int)
    assert perplexity(checkpoint, plane_weights(nested, everyone), TOKENS) == two
    everyone[0, 0] = 3
    assert perplexity(checkpoint, plane_weights(nested, everyone), TOKENS) != two


def test_an_expert_without_a_token_is_quantised_too(checkpoint, tmp_path) -> None:
    index = quantize_model(checkpoint, tmp_path / "few.safetensors", WHOLE, TOKENS[:2, :2], method="gptq")
    assert np.isfinite(index.error_LEK).all()
    assert (index.error_LEK[:, :, 1] < 0.01).all()


def one_line(caught) -> bool:
    return "\n" not in str(caught.value)


def test_bad_calibration_levels_and_methods_are_one_line(checkpoint, nested, tmp_path) -> None:
    out = tmp_path / "never.safetensors"
    for tokens, says in (
        (TOKENS[:0], "texts, positions"),
        (TOKENS[:1], "2 x 2 or more"),
        (TOKENS[0], "texts, positions"),
        (TOKENS + VOCABULARY, "ids are 0 to 63"),
        (TOKENS.astype(float), "ids are 0 to 63"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            quantize_model(checkpoint, out, LADDERS["v1"], tokens)
        assert one_line(caught)
    for method, ladder in (("mwq", WHOLE), ("gptq", LADDERS["v1"]), ("awq", WHOLE)):
        with pytest.raises(UsageError, match="give"):
            quantize_model(checkpoint, out, ladder, TOKENS, method=method)
    for level, error in ((0, UsageError), (4, UsageError), (np.ones((1, EXPERTS), dtype=int), MismatchError)):
        with pytest.raises(error):
            plane_weights(nested, level)
    assert not out.exists()


def test_bad_checkpoints_are_one_line_and_leave_no_file(checkpoint, tmp_path) -> None:
    out = tmp_path / "never.safetensors"
    name = "model.safetensors"
    tensors = load_file(checkpoint / name)
    expert = next(key for key in sorted(tensors) if "experts" in key)
    for change, says in ((torch.nan, "no number"), (None, "has no|without")):
        folder = tmp_path / str(change)
        folder.mkdir()
        (folder / "config.json").write_text((checkpoint / "config.json").read_text())
        broken = dict(tensors)
        if change is None:
            del broken[expert]
        else:
            broken[expert] = torch.full_like(broken[expert], change)
        save_file(broken, folder / name)
        with pytest.raises(InputFileError, match=says) as caught:
            quantize_model(folder, out, LADDERS["v1"], TOKENS)
        assert one_line(caught)
    biased = tmp_path / "biased"
    written_model(biased, "gpt_oss")
    assert json.loads((biased / "config.json").read_text())["model_type"] == "gpt_oss"
    with pytest.raises(InputFileError, match="have biases") as caught:
        quantize_model(biased, out, LADDERS["v1"], TOKENS)
    assert one_line(caught)
    assert not out.exists()
