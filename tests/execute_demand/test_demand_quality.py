"""Loss and output error of levels, ceilings and drawn demand; what is recorded with bit routers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from placer.core.device.ladder import BitLadder
from placer.core.errors import MismatchError, UsageError
from placer.execute.demand import (
    BitRouters,
    drawn_levels,
    full_weights,
    held_out_loss,
    level_weights,
    load_level_model,
    record_demand,
)
from placer.execute.demand.levels import run_levels
from placer.execute.experts import swiglu
from placer.execute.planes import perplexity, plane_weights, quantize_model
from traces.device_work import device_work, prefill_batches
from traces.store import load_trace, save_trace

LADDER = BitLadder(bits_K=(2, 3, 4))


@pytest.fixture(scope="module")
def index(checkpoint, text, tmp_path_factory):
    return quantize_model(checkpoint, tmp_path_factory.mktemp("planes") / "planes.safetensors", LADDER, text[:8])


@pytest.fixture
def routers(model):
    """Untrained, with levels that depend on the token."""
    found = BitRouters.untrained(model, torch.Generator().manual_seed(1))
    found.weight_LEKH.data.normal_(generator=torch.Generator().manual_seed(2))
    return found.requires_grad_(requires_grad=False)


def test_levels_are_run_as_named(weights):
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(9, 32, generator=generator)
    expert_TC = torch.tensor([[0, 1], [1, 0], [3, 2]]).repeat(3, 1)
    level_TC = torch.tensor([[1, 3], [2, 2], [3, 1]]).repeat_interleave(3, dim=0)
    weight_TC = torch.rand(9, 2, generator=generator)
    out_TH = run_levels(weights.expert_LEK[1], hidden_TH, expert_TC, weight_TC, level_TC)
    for token in range(9):
        wanted_H = sum(
            weight_TC[token, c]
            * swiglu(hidden_TH[token], weights.expert_LEK[1][int(expert_TC[token, c])][int(level_TC[token, c]) - 1])
            for c in range(2)
        )
        torch.testing.assert_close(out_TH[token], wanted_H, rtol=1e-4, atol=1e-5)


def test_planes_give_the_loss_that_perplexity_gives(checkpoint, index, text):
    model = load_level_model(checkpoint, level_weights(index))
    assert model.weights.sha256 == index.sha256
    for level in (1, 3):
        alone = perplexity(checkpoint, plane_weights(index, level), text[:6])
        found = held_out_loss(model, text[:6], level)
        assert found.nats_per_token == pytest.approx(alone.nats, rel=1e-5)
        assert found.perplexity == pytest.approx(alone.value, rel=1e-5)
        assert found.count_LEK[..., level - 1].sum() == found.count_LEK.sum() == 2 * 2 * 6 * text.shape[1]


def test_ceilings_clip_demand(model, text, routers):
    ceiling_LE = np.random.default_rng(0).integers(1, 4, size=(2, 4))
    fixed = held_out_loss(model, text[:4], 3, ceiling_LE=ceiling_LE)
    used_LE, at_LE = fixed.count_LEK.sum(axis=2), np.take_along_axis(fixed.count_LEK, ceiling_LE[..., None] - 1, 2)
    assert np.array_equal(used_LE, at_LE[..., 0])
    free = held_out_loss(model, text[:4], routers.levels_of)
    clipped = held_out_loss(model, text[:4], routers.levels_of, ceiling_LE=ceiling_LE)
    assert (np.arange(1, 4) > ceiling_LE[..., None])[clipped.count_LEK > 0].sum() == 0
    # the first site sees the same states, so its demand is what the free one's is, moved down
    moved_EK = np.zeros((4, 3), dtype=np.int64)
    for expert, level in np.ndindex(4, 3):
        moved_EK[expert, min(level, ceiling_LE[0, expert] - 1)] += free.count_LEK[0, expert, level]
    assert np.array_equal(clipped.count_LEK[0], moved_EK)
    highest = held_out_loss(model, text[:4], routers.levels_of, ceiling_LE=np.full((2, 4), 3))
    assert highest.nats_per_token == free.nats_per_token


def test_ceilings_equal_the_planes_perplexity(checkpoint, index, text):
    level_LE = np.random.default_rng(1).integers(1, 4, size=(2, 4))
    model = load_level_model(checkpoint, level_weights(index))
    alone = perplexity(checkpoint, plane_weights(index, level_LE), text[:4])
    assert held_out_loss(model, text[:4], 3, ceiling_LE=level_LE).nats_per_token == pytest.approx(alone.nats, rel=1e-5)


def test_better_levels_have_lower_loss_and_error(checkpoint, model, text):
    reference = full_weights(checkpoint)
    found = [held_out_loss(model, text, level, reference=reference) for level in (1, 2, 3)]
    assert found[0].nats_per_token > found[1].nats_per_token > found[2].nats_per_token
    assert (found[0].output_error_L > found[1].output_error_L).all()
    assert (found[1].output_error_L > found[2].output_error_L).all()
    assert found[2].output_error_L.max() == 0
    assert held_out_loss(model, text[:2], 1).output_error_L is None
    own = held_out_loss(load_level_model(checkpoint, reference), text, 1)
    assert own.nats_per_token == pytest.approx(found[2].nats_per_token, rel=1e-6)


def test_drawn_levels_have_their_shares(model, text):
    share_LEK = np.zeros((2, 4, 3))
    share_LEK[..., :] = (0.2, 0.5, 0.3)
    share_LEK[1, 2] = (0, 1, 0)
    found = held_out_loss(model, text, drawn_levels(share_LEK, seed=0))
    again = held_out_loss(model, text, drawn_levels(share_LEK, seed=0))
    assert found.nats_per_token == again.nats_per_token
    used_LE1 = found.count_LEK.sum(axis=2, keepdims=True)
    off_LEK = np.abs(found.count_LEK / used_LE1 - share_LEK)
    assert (off_LEK < 5 * np.sqrt(0.25 / used_LE1)).all()
    assert found.count_LEK[1, 2, [0, 2]].sum() == 0


def test_recorded_demand_is_what_was_run(model, text, routers, tmp_path):
    prompts = [*text[:5].tolist(), [7], text[5, :9].tolist(), text[6, :9].tolist()]
    trace = record_demand(model, routers, prompts)
    assert trace.request_id_T.tolist() == [q for q, prompt in enumerate(prompts) for _ in prompt]
    assert trace.token_id_T.tolist() == [token for prompt in prompts for token in prompt]
    assert "trained bit routers" in trace.notes[-1]
    save_trace(trace, tmp_path / "demand.safetensors")
    assert load_trace(tmp_path / "demand.safetensors").sha256 == trace.sha256
    work = device_work(trace, prefill_batches(trace, 32), LADDER)
    assert work.count_BLEK.sum() == 2 * 2 * trace.num_tokens
    whole = device_work(record_demand(model, routers, text[:5].tolist()), [np.arange(5 * text.shape[1])], LADDER)
    alone = held_out_loss(model, text[:5], routers.levels_of)
    assert np.array_equal(whole.count_BLEK[0], alone.count_LEK)
    # each prompt by itself demands the same
    alone_T = np.concatenate([record_demand(model, routers, [prompt]).bits_LTK for prompt in prompts], axis=1)
    assert (alone_T == trace.bits_LTK).mean() > 0.99


def test_a_width_off_the_ladder_is_refused(model, text, routers):
    trace = record_demand(model, routers, text[:2].tolist())
    with pytest.raises(UsageError, match="the ladder has 2, 3"):
        device_work(replace(trace, known_sha256="", checked=True), prefill_batches(trace, 8), BitLadder(bits_K=(2, 3)))


def test_misfits_are_refused(checkpoint, other_checkpoint, model, weights, text, routers):
    with pytest.raises(UsageError, match="level is 4; the ladder has levels 1 to 3"):
        held_out_loss(model, text, 4)
    with pytest.raises(UsageError, match="levels 4 to 4"):
        held_out_loss(model, text, lambda site, hidden, expert: torch.full_like(expert, 4))
    with pytest.raises(MismatchError, match=r"ceilings are \(2, 5\)"):
        held_out_loss(model, text, 1, ceiling_LE=np.ones((2, 5), dtype=np.int64))
    with pytest.raises(UsageError, match="ceilings are 0 to 0"):
        held_out_loss(model, text, 1, ceiling_LE=np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(MismatchError, match=r"the reference has \(2, 6\)"):
        held_out_loss(model, text, 1, reference=full_weights(other_checkpoint))
    with pytest.raises(MismatchError, match=r"experts a layer: 4, the one in .* has 6; quantise this model"):
        load_level_model(other_checkpoint, weights)
    with pytest.raises(UsageError, match="give every width once"):
        replace(weights, bits_K=(2, 4, 3))
    with pytest.raises(UsageError, match="lack a level of some expert"):
        replace(weights, bits_K=(2, 3))
    with pytest.raises(UsageError, match="0 prompts"):
        record_demand(model, routers, [])
    other = load_level_model(other_checkpoint, full_weights(other_checkpoint))
    with pytest.raises(MismatchError, match="the bit routers are for"):
        record_demand(other, routers, [[1, 2]])
