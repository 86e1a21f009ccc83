"""Bit routers: capacity, loss and training, what they choose, and their file."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from placer.core.errors import ExecutionError, InputFileError, MismatchError, UsageError
from placer.execute.demand import (
    CAPACITIES,
    BitRouters,
    LevelWeights,
    drawn_levels,
    load_level_model,
    train_bit_routers,
)
from placer.execute.demand.levels import run_levels
from placer.execute.demand.quality import held_out_loss
from placer.execute.demand.training import TrainingPass, bit_router_loss, within_capacity
from placer.execute.experts import ExpertWeights, swiglu


def trained(model, text, alpha, steps=60, seed=0, **more):
    return train_bit_routers(model, text, alpha=alpha, seed=seed, steps=steps, **more)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 12), min_size=6, max_size=6), st.integers(0, 9)
)
def test_a_group_takes_as_many_as_it_can_and_no_more(groups, capacities, seed):
    group_X, capacity_G = torch.tensor(groups, dtype=torch.int64), torch.tensor(capacities)
    taken_X = within_capacity(group_X, capacity_G, torch.Generator().manual_seed(seed))
    again_X = within_capacity(group_X, capacity_G, torch.Generator().manual_seed(seed))
    assert torch.equal(taken_X, again_X)
    rows_G = torch.bincount(group_X, minlength=6)
    assert torch.equal(torch.bincount(group_X[taken_X], minlength=6), torch.minimum(rows_G, capacity_G))


def test_what_overflows_is_random():
    group_X, capacity_G = torch.zeros(100, dtype=torch.int64), torch.tensor([30])
    dropped = [within_capacity(group_X, capacity_G, torch.Generator().manual_seed(seed)) for seed in range(200)]
    share_X = torch.stack(dropped).double().mean(dim=0)
    # 200 draws of 0.3: every use is as likely to stay, the first no more than the last
    assert share_X.min() > 0.3 - 5 * math.sqrt(0.3 * 0.7 / 200)
    assert share_X.max() < 0.3 + 5 * math.sqrt(0.3 * 0.7 / 200)


def test_a_pass_never_exceeds_capacity_and_drops_what_overflows(model):
    generator = torch.Generator().manual_seed(1)
    routers = BitRouters.untrained(model, generator)
    # everybody wants the highest level
    routers.bias_LEK.data[..., 2] = 9.0
    one = TrainingPass(routers, model.weights, (0.3, 0.4, 0.3), generator)
    hidden_TH = torch.randn(200, 32, generator=generator)
    expert_TC = torch.randn(200, 4, generator=generator).argsort(dim=-1)[:, :2]
    weight_TC = torch.ones(200, 2)
    weight_TC[:, 1] = 0
    with torch.no_grad():
        out_TH = one.run(0, hidden_TH, expert_TC, weight_TC)
        whole_TH = run_levels(
            model.weights.expert_LEK[0], hidden_TH, expert_TC, weight_TC, torch.full_like(expert_TC, 3)
        )
    rows_E = torch.bincount(expert_TC.flatten(), minlength=4)
    taken = sum(int(0.3 * rows + 1e-9) for rows in rows_E.tolist())
    assert one.dropped == pytest.approx(1 - taken / 400)
    kept_T = out_TH.abs().sum(dim=1) > 0
    torch.testing.assert_close(out_TH[kept_T], whole_TH[kept_T], rtol=1e-4, atol=1e-4)
    first_E = torch.bincount(expert_TC[kept_T, 0], minlength=4)
    assert (first_E <= (0.3 * rows_E + 1e-9).floor()).all()


def test_papers_capacities_partition_the_tokens():
    assert CAPACITIES[2, 3, 4] == (0.3, 0.4, 0.3)
    assert CAPACITIES[5, 6, 7, 8] == (0.25,) * 4


def test_loss_by_hand():
    # two sites, two tokens, one expert each: mean bits 3 and 3.5 at the first, 2 and 4 at the second
    first = torch.tensor([[[0.5, 0.0, 0.5]], [[0.0, 0.5, 0.5]]])
    second = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    loss = bit_router_loss(torch.tensor([1.0, 2.0]), [first, second], (2, 3, 4), alpha=0.1)
    assert loss.item() == pytest.approx(1.5 + 0.1 / 2 * (3.25 + 3.0))


def test_gradient_is_that_of_the_mean_over_levels(model):
    """The value is the likeliest level's, the derivative by p_k what level k gives."""
    generator = torch.Generator().manual_seed(2)
    routers = BitRouters.untrained(model, generator)
    hidden_TH = torch.randn(1, 32, generator=generator)
    expert_TC, weight_TC = torch.tensor([[1]]), torch.ones(1, 1)
    one = TrainingPass(routers, model.weights, (1.0, 1.0, 1.0), generator)
    out_TH = one.run(0, hidden_TH, expert_TC, weight_TC)
    probability_TCK = one.probability_L[0]
    probability_TCK.retain_grad()
    direction_H = torch.randn(32, generator=generator)
    (out_TH @ direction_H).sum().backward()
    by_level_KH = torch.cat([swiglu(hidden_TH, one) for one in model.weights.expert_LEK[0][1]])
    torch.testing.assert_close(probability_TCK.grad[0, 0], by_level_KH @ direction_H)
    torch.testing.assert_close(out_TH[0], by_level_KH[probability_TCK[0, 0].argmax()])


def test_dear_bits_lead_to_the_lowest_level_everywhere(model, text):
    routers = trained(model, text, alpha=100.0, steps=40)
    found = held_out_loss(model, text, routers.levels_of)
    assert found.count_LEK[..., 0].sum() == found.count_LEK.sum() > 0
    assert found.mean_bits((2, 3, 4)) == 2


def test_free_bits_lead_up_where_quality_differs(model, text):
    routers = trained(model, text, alpha=0.0, steps=60, capacity_K=(1.0, 1.0, 1.0))
    found = held_out_loss(model, text, routers.levels_of)
    share_K = found.count_LEK.sum(axis=(0, 1)) / found.count_LEK.sum()
    assert share_K[2] > 0.6
    assert share_K[0] < 0.25
    assert found.nats_per_token < held_out_loss(model, text, drawn_levels(np.full((2, 4, 3), 1 / 3), 0)).nats_per_token


def test_same_seed_same_routers(model, text):
    one, two, other = (trained(model, text, 0.1, steps=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.weight_LEKH, two.weight_LEKH)
    assert torch.equal(one.bias_LEK, two.bias_LEK)
    assert not torch.equal(one.weight_LEKH, other.weight_LEKH)
    assert one.about == two.about
    assert one.about["tokens"] == 4 * (2048 // text.shape[1]) * text.shape[1]


def test_model_stays_as_it_is(model, text):
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    expert = model.weights.expert_LEK[0][0][0].down_HI.clone()
    trained(model, text, 0.1, steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.backbone.model.state_dict().items())
    assert torch.equal(expert, model.weights.expert_LEK[0][0][0].down_HI)


def test_levels_of_are_the_likeliest(model):
    routers = BitRouters.untrained(model, torch.Generator().manual_seed(0))
    routers.weight_LEKH.data.zero_()
    routers.bias_LEK.data[1, 2] = torch.tensor([0.0, 1.0, -1.0])
    routers.bias_LEK.data[1, 3] = torch.tensor([0.0, 1.0, 2.0])
    level_TC = routers.levels_of(1, torch.zeros(2, 32), torch.tensor([[2, 3], [3, 2]]))
    assert level_TC.tolist() == [[2, 3], [3, 2]]
    assert level_TC.dtype == torch.int64


def test_file_keeps_everything(model, text, tmp_path):
    routers = trained(model, text, 0.1, steps=2)
    routers.save(tmp_path / "routers.safetensors")
    again = BitRouters.load(tmp_path / "routers.safetensors")
    assert torch.equal(again.weight_LEKH, routers.weight_LEKH)
    assert torch.equal(again.bias_LEK, routers.bias_LEK)
    assert (again.model, again.moe_layers, again.bits_K) == (routers.model, routers.moe_layers, routers.bits_K)
    assert again.about == routers.about
    again.refuse_misfit(model)
    # the safetensors library reads the same
    assert torch.equal(load_file(tmp_path / "routers.safetensors")["bias_LEK"], routers.bias_LEK)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda arrays, text: text.update(format="x"), "holds no bit routers"),
        (lambda arrays, text: text.update(schema="9"), "schema '9'"),
        (lambda arrays, text: text.pop("bits"), "damaged bit routers"),
        (lambda arrays, text: text.update(bits="[2, 3]"), "do not fit 2 layers and 2 levels"),
        (lambda arrays, text: arrays.pop("bias_LEK"), "damaged bit routers"),
        (lambda arrays, text: arrays["bias_LEK"].fill_(math.nan), "values that are no numbers"),
    ],
)
def test_spoilt_files_are_refused_in_one_line(model, tmp_path, change, says):
    routers = BitRouters.untrained(model, torch.Generator().manual_seed(0))
    arrays = {"weight_LEKH": routers.weight_LEKH.data, "bias_LEK": routers.bias_LEK.data}
    text = {"format": "placer-bit-routers", "schema": "1", "model": "m", "moe_layers": "[0, 1]"}
    text |= {"bits": "[2, 3, 4]", "about": "{}"}
    change(arrays, text)
    save_file(arrays, tmp_path / "spoilt.safetensors", metadata=text)
    with pytest.raises(InputFileError, match=says) as caught:
        BitRouters.load(tmp_path / "spoilt.safetensors")
    assert "\n" not in str(caught.value)


def test_routers_of_another_model_are_refused(model, other_checkpoint):
    from placer.execute.demand import full_weights

    other = load_level_model(other_checkpoint, full_weights(other_checkpoint))
    routers = BitRouters.untrained(other, torch.Generator().manual_seed(0))
    with pytest.raises(MismatchError, match="with experts a layer 6, the model and its planes have experts a layer 4"):
        routers.refuse_misfit(model)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"capacity_K": (0.5, 0.5)}, "capacity_K is"),
        ({"tokens": [[1], [2]]}, "tokens have 1 position"),
        ({"tokens": [[1, 99]]}, "tokens have id 99; the model has ids 0 to 47"),
        ({"tokens": [[1, -1]]}, "tokens have id -1"),
        ({"tokens": [[0.5, 1.0]]}, "give whole numbers"),
    ],
)
def test_odd_arguments_are_refused(model, text, values, says):
    arguments = {"tokens": text, "alpha": 0.1, "seed": 0, "steps": 1} | values
    with pytest.raises(UsageError, match=says):
        train_bit_routers(model, arguments.pop("tokens"), **arguments)


def test_planes_that_are_no_numbers_end_training(checkpoint, weights, text):
    none = ExpertWeights(torch.full((48, 32), math.nan), torch.zeros(32, 24))
    expert_LEK = tuple(tuple((none,) * 3 for _ in expert_EK) for expert_EK in weights.expert_LEK)
    spoilt = LevelWeights(moe_layers=weights.moe_layers, bits_K=(2, 3, 4), expert_LEK=expert_LEK)
    with pytest.raises(ExecutionError, match="step 0 has loss nan"):
        trained(load_level_model(checkpoint, spoilt), text, 0.1, steps=1)


def test_progress_is_told(model, text):
    told = []
    trained(model, np.asarray(text), 0.1, steps=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
