"""Our experts against transformers' own classes, from what those classes save."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from placer.core.errors import InputFileError
from placer.execute.experts import ClampedGate, ExpertFile, grouped_ffn, swiglu


def experts_modules(model):
    return {layer: block.mlp.experts for layer, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_expert_computes_what_transformers_computes(checkpoints, tiny, tmp_path, kind, fused):
    """`fused`: the names and layout that transformers has in memory, which a checkpoint may have as well."""
    model, folder = tiny.small_model(kind), checkpoints[kind]
    if fused:
        folder = tmp_path
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items() if "experts" in k}, tmp_path / "m.safetensors"
        )
    x_TH = 3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    weight_T1 = torch.ones(20, 1)
    with torch.inference_mode(), ExpertFile(folder) as file:
        modules = experts_modules(model)
        assert modules
        for layer, experts in modules.items():
            for expert in range(tiny.EXPERTS):
                expected_TH = experts(x_TH, torch.full((20, 1), expert), weight_T1)
                found = file.load(layer, expert, dtype=torch.float32)
                scale = float(expected_TH.abs().max())
                assert scale > 0.1
                assert torch.allclose(swiglu(x_TH, found), expected_TH, rtol=0, atol=1e-6 * max(1, scale))


def test_clamping_is_exercised_on_both_sides():
    gate, up = torch.tensor([[9.0, -9.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 9.0, -9.0]])
    gate_limited = torch.tensor([[7.0, -9.0, 1.0, 1.0]])
    expected = (torch.tensor([[1.0, 1.0, 7.0, -7.0]]) + 1) * gate_limited * torch.sigmoid(1.702 * gate_limited)
    assert torch.equal(ClampedGate()(gate, up), expected)
    assert not torch.equal(ClampedGate(1.0, 3.0)(gate, up), expected)


def test_rows_of_no_expert_stay_zero_in_spite_of_biases(checkpoints):
    with ExpertFile(checkpoints["gpt_oss"]) as file:
        expert = file.load(0, 0, dtype=torch.float32)
    out_XH = grouped_ffn(torch.zeros(9, 32), [0, 8], [None, expert])
    assert float(out_XH[:8].abs().min()) > 0
    assert float(out_XH[8].abs().max()) == 0


def test_checkpoints_with_biases_that_cannot_be_run_say_why(checkpoints, tmp_path):
    tensors = load_file(checkpoints["gpt_oss"] / "model.safetensors")
    path = tmp_path / "bad.safetensors"
    stem = "model.layers.0.mlp.experts"

    def refused(change, match):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, path)
        with pytest.raises(InputFileError, match=match), ExpertFile(path) as file:
            file.load(0, 1, dtype=torch.float32)

    refused({f"{stem}.down_proj_bias": None}, "layer 0 have biases, but none for down_proj")
    refused({f"{stem}.down_proj_bias": torch.zeros(8, 31)}, "needs a bias of 32 values for down_proj")
    packed = {f"{stem}.down_proj": None, f"{stem}.gate_up_proj": None}
    blocks = {
        f"{stem}.{name}_blocks": torch.zeros(8, 32, 1, 16, dtype=torch.uint8) for name in ("down_proj", "gate_up_proj")
    }
    refused(packed | blocks, r"gate_up_proj_blocks|down_proj_blocks.*MXFP4.*bfloat16 checkpoint")
    refused({f"{stem}.1.gate_proj.bias": torch.zeros(3)}, "layer 0 have biases in a layout")
