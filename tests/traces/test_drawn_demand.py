"""Drawn demand: shares, unset entries, the note, and the work made of it."""

import numpy as np
import pytest

from placer.core.device.ladder import LADDERS
from placer.core.errors import UsageError
from traces.demand import drawn_demand
from traces.device_work import device_work, prefill_batches
from traces.ids import generator
from traces.store import load_trace, save_trace
from traces.synthetic import synthesize

V1 = LADDERS["v1"]


def small_trace(**more):
    return synthesize(
        num_layers=3, num_experts=8, top_k=2, num_tokens=2000, num_requests=6, seed=1, **{"null_experts": 0} | more
    )


def test_shares_are_kept_at_every_layer():
    trace = drawn_demand(small_trace(), V1, (0.3, 0.5, 0.2), generator(0))
    for bits, share in zip(V1.bits_K, (0.3, 0.5, 0.2), strict=True):
        off_L = np.abs((trace.bits_LTK == bits).mean(axis=(1, 2)) - share)
        assert (off_L < 5 * np.sqrt(0.25 / 4000)).all()
    assert "synthetic" in trace.notes[-1]
    work = device_work(trace, prefill_batches(trace, 100), V1)
    assert work.count_BLEK.sum() == 3 * 2000 * 2
    assert work.count_BLEK[..., 0].sum() == (trace.bits_LTK == 2).sum()


def test_a_share_of_nothing_is_never_drawn():
    trace = drawn_demand(small_trace(), V1, (0, 1, 0), generator(0))
    assert (trace.bits_LTK == 3).all()


def test_entries_without_an_expert_demand_nothing():
    plain = small_trace(null_experts=2)
    trace = drawn_demand(plain, V1, (0.3, 0.4, 0.3), generator(0))
    real_LTK = plain.expert_LTK < 8
    assert 0 < real_LTK.mean() < 1
    assert np.array_equal(trace.bits_LTK > 0, real_LTK)
    assert device_work(trace, prefill_batches(trace, 64), V1).count_BLEK.sum() == real_LTK.sum()


def test_same_generator_same_trace(tmp_path):
    one, two = (drawn_demand(small_trace(), V1, (0.3, 0.4, 0.3), generator(5)) for _ in range(2))
    assert one.sha256 == two.sha256 != drawn_demand(small_trace(), V1, (0.3, 0.4, 0.3), generator(6)).sha256
    save_trace(one, tmp_path / "drawn.safetensors")
    again = load_trace(tmp_path / "drawn.safetensors")
    assert np.array_equal(again.bits_LTK, one.bits_LTK)
    assert again.notes == one.notes
    assert again.sha256 == one.sha256


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ((0.5, 0.5), r"give one, 0 or more, for each of \(2, 3, 4\) bits"),
        ((0.5, 0.6, -0.1), "give one, 0 or more"),
        ((0.5, 0.6, 0.1), "add up to 1.2; they must add up to 1"),
        ((float("nan"), 0.5, 0.5), "give one, 0 or more"),
    ],
)
def test_odd_shares_are_refused(shares, says):
    with pytest.raises(UsageError, match=says):
        drawn_demand(small_trace(), V1, shares, generator(0))
