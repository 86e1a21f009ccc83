"""The cost of a device plan: by hand, against the compiled twin, and what clipping costs."""

import numpy as np
import pytest
from device_cases import COPIES, NESTED, device_of, plan_of, work_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.evaluate import clipping_loss_LEK, evaluate_device, mean_clipping_loss
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, MismatchError, UsageError
from solvers.bits.replay import COMPILED_RULES, replay


def test_one_expert_by_hand() -> None:
    """Two planes read one after another; three tokens at the second level wait for both."""
    count_BLEK = np.zeros((1, 1, 2, 3), dtype=np.int64)
    count_BLEK[0, 0, 1, 1] = 3
    work = DeviceWork(tokens_B=np.array([3]), count_BLEK=count_BLEK)
    device = device_of()
    plan = plan_of(work, NESTED)
    base, residual, _ = (device.read_ns(size) for size in plan.plane_bytes_K)
    found = evaluate_device(plan, work, device)
    # base 6 us, one residual 1.5 us, three tokens 4 + 2/3 of 3 us
    assert found.makespan_ns_BL.tolist() == [[base + residual + 13_500]]
    assert found.iteration_ns_B.tolist() == [base + residual + 13_500 + 6_500]
    assert found.read_bytes_BL.tolist() == [[plan.plane_bytes_K[0] + plan.plane_bytes_K[1]]]
    assert found.quality_cost is None
    with_base = plan_of(work, NESTED, resident_LE=np.array([[0, 1]]))
    assert evaluate_device(with_base, work, device).makespan_ns_BL.tolist() == [[residual + 13_500]]


def test_a_cache_saves_the_second_iteration() -> None:
    work = work_of(1, (1, 2, 4, 3))
    twice = DeviceWork(tokens_B=np.tile(work.tokens_B, 2), count_BLEK=np.tile(work.count_BLEK, (2, 1, 1, 1)))
    everything = 2 * 4 * sum(plan_of(work, NESTED).plane_bytes_K)
    plan = plan_of(twice, NESTED, cache="lru", cache_bytes=everything)
    found = evaluate_device(plan, twice, device_of())
    assert found.read_bytes_BL[0].sum() > 0
    assert found.read_bytes_BL[1].sum() == 0
    assert found.iteration_ns_B[1] < found.iteration_ns_B[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    nested=st.booleans(),
    copies=st.booleans(),
    order=st.sampled_from(COMPILED_RULES),
    room=st.floats(0, 1),
    speed=st.sampled_from([100.0, 1000.0, 10_000.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_compiled_twin_is_equal(
    seed: int, nested: bool, copies: bool, order: str, room: float, speed: float
) -> None:
    ladder, device, work = (NESTED if nested else COPIES), device_of(speed, copies=copies), work_of(seed)
    rng = np.random.default_rng(seed + 1)
    shape = work.count_BLEK.shape[1:3]
    plan = plan_of(
        work, ladder, resident_LE=rng.integers(0, 4, shape), ceiling_LE=rng.integers(1, 4, shape), order=order
    )
    one, site = sum(plan.plane_bytes_K), 5 * sum(plan.plane_bytes_K)
    plan = plan_of(
        work, ladder, resident_LE=plan.resident_LE, ceiling_LE=plan.ceiling_LE, order=order,
        buffer_bytes=int(one + room * (site - one)),
    )  # fmt: skip
    found = evaluate_device(plan, work, device)
    twin = replay(
        work.clipped(plan.ceiling_LE), plan.present_LEK, order=plan.order, buffer_bytes=plan.buffer_bytes,
        device=device, ladder=ladder, plane_bytes_K=plan.plane_bytes_K,
    )  # fmt: skip
    np.testing.assert_array_equal(found.makespan_ns_BL, twin.makespan_ns_BL)
    np.testing.assert_array_equal(found.read_bytes_BL, twin.read_bytes_BL)


def test_both_refuse_a_buffer_that_holds_no_expert() -> None:
    work = work_of(3)
    plan = plan_of(work, NESTED, buffer_bytes=1)
    with pytest.raises(InfeasibleError, match="bytes at once and the buffer has 1"):
        evaluate_device(plan, work, device_of())
    with pytest.raises(InfeasibleError, match="bytes at once and the buffer has 1"):
        replay(
            work, plan.present_LEK, order="hebf", buffer_bytes=1, device=device_of(), ladder=NESTED,
            plane_bytes_K=plan.plane_bytes_K,
        )  # fmt: skip


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_clipping_costs_what_every_use_loses(seed: int) -> None:
    work = work_of(seed)
    rng = np.random.default_rng(seed)
    error_LEK = -np.sort(-rng.random(work.count_BLEK.shape[1:]), axis=-1)
    ceiling_LE = rng.integers(1, 4, work.count_BLEK.shape[1:3])
    lost, uses = 0.0, 0
    for (_, site, expert, level), count in np.ndenumerate(work.count_BLEK):
        used = min(level, ceiling_LE[site, expert] - 1)
        lost += count * (error_LEK[site, expert, used] - error_LEK[site, expert, level])
        uses += count
    assert mean_clipping_loss(work, ceiling_LE, error_LEK) == pytest.approx(lost / max(1, uses), abs=1e-12)
    loss_LEK = clipping_loss_LEK(work.count_BLEK.sum(axis=0), error_LEK)
    assert (loss_LEK[..., -1] == 0).all()
    assert (np.diff(loss_LEK, axis=-1) <= 1e-12).all()


def test_what_does_not_belong_together_is_refused() -> None:
    work = work_of(5)
    plan = plan_of(work, NESTED)
    with pytest.raises(MismatchError, match="plan for this model and ladder"):
        evaluate_device(plan, work_of(5, (4, 3, 5, 3)), device_of())
    with pytest.raises(UsageError, match="no iterations"):
        evaluate_device(plan, work_of(5, (0, 2, 5, 3)), device_of())
    with pytest.raises(UsageError, match="prefetch"):
        evaluate_device(plan_of(work, NESTED, prefetch_layers=1), work, device_of())
    with pytest.raises(MismatchError, match="errors are"):
        mean_clipping_loss(work, plan.ceiling_LE, np.zeros((1, 1, 3)))
