"""Device plans under a budget: never worse than what anybody would try, above their bound, legal; clear refusals."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_cases import COPIES, NESTED, SHAPES, device_of, work_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.check import check_device_plan
from placer.core.device.evaluate import evaluate_device
from placer.core.device.ladder import BitLadder
from placer.core.device.planes import PlaneIndex
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, MismatchError, UsageError
from placer.pipeline.device_planning import DevicePlanSettings, PlaneSizes, plan_device

MIB = 2**20
NO_CACHE = DevicePlanSettings(caches=("none",))


def sizes_of(work: DeviceWork, ladder: BitLadder = NESTED) -> PlaneSizes:
    sites, experts = work.count_BLEK.shape[1:3]
    return PlaneSizes(
        model="small", num_hidden_layers=sites, moe_layers=tuple(range(sites)), num_experts=experts, ladder=ladder,
        plane_bytes_K=ladder.plane_bytes_K(SHAPES),
    )  # fmt: skip


def index_of(work: DeviceWork, seed: int = 0) -> PlaneIndex:
    """Planes whose errors fall with the level."""
    shape = work.count_BLEK.shape[1:]
    error_LEK = np.random.default_rng(seed).uniform(0.5, 1.5, shape[:2])[..., None] * np.array([0.2, 0.05, 0.01])
    return PlaneIndex(
        path=Path("planes.safetensors"), model="small", num_hidden_layers=shape[0], moe_layers=tuple(range(shape[0])),
        num_experts=shape[1], ladder=NESTED, shapes=SHAPES, offset_LEK=np.zeros(shape, dtype=np.int64),
        crc32_LEK=np.zeros(shape, dtype=np.uint32), sha256="5" * 64, error_LEK=error_LEK,
    )  # fmt: skip


def all_bytes(work: DeviceWork, ladder: BitLadder = NESTED) -> int:
    sites, experts = work.count_BLEK.shape[1:3]
    return sites * experts * sum(ladder.plane_bytes_K(SHAPES))


@given(
    seed=st.integers(0, 2**32 - 1),
    nested=st.booleans(),
    speed=st.sampled_from([100.0, 400.0, 5000.0]),
    budget=st.floats(0.15, 1.1),
)
@settings(max_examples=20, deadline=None)
def test_legal_above_its_bound_and_no_worse_than_the_simple_plans(
    seed: int, nested: bool, speed: float, budget: float
) -> None:
    ladder, work = (NESTED if nested else COPIES), work_of(seed, (6, 2, 6, 3))
    device = device_of(speed, memory_mib=budget * all_bytes(work, ladder) / MIB)
    plan = plan_device(work, device, sizes_of(work, ladder))
    assert check_device_plan(plan, device=device, work=work) == []
    found = evaluate_device(plan, work, device)
    assert plan.objective == pytest.approx(found.mean_iteration_ns)
    assert plan.bound is not None
    assert plan.bound <= plan.objective
    resident_none = np.zeros_like(plan.resident_LE)
    whole = sum(plan.plane_bytes_K)
    hottest = np.argsort(-work.count_BLEK.sum(axis=(0, 3)).reshape(-1), kind="stable")
    hottest = hottest[: (device.memory_bytes - whole) // whole] if nested else hottest[:0]
    resident_hot = resident_none.copy()
    resident_hot.reshape(-1)[hottest] = 3
    blank = replace(plan, cache="none", cache_bytes=0)
    for order in ("hebf", "resident_first"):
        nothing = replace(blank, resident_LE=resident_none, buffer_bytes=device.memory_bytes, order=order)
        hot = replace(blank, resident_LE=resident_hot, buffer_bytes=whole, order=order)
        for simple in (nothing, hot):
            assert plan.objective <= evaluate_device(simple, work, device).mean_iteration_ns * (1 + 1e-12)


def test_more_memory_is_never_slower_and_the_last_is_all_resident() -> None:
    work = work_of(4, (20, 3, 12, 3), 0.6)
    budgets = [0.04, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0, 1.2]
    plans = [
        plan_device(work, device_of(memory_mib=share * all_bytes(work) / MIB), sizes_of(work), NO_CACHE)
        for share in budgets
    ]
    objectives, bounds = [plan.objective or 0.0 for plan in plans], [plan.bound or 0.0 for plan in plans]
    assert all(later <= earlier * 1.005 for earlier, later in itertools.pairwise(objectives))
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(bounds))
    assert evaluate_device(plans[-1], work, device_of()).read_bytes_BL.sum() == 0
    assert objectives[0] > 1.5 * objectives[-1]
    assert (
        plans[0].sha256
        == plan_device(work, device_of(memory_mib=0.04 * all_bytes(work) / MIB), sizes_of(work), NO_CACHE).sha256
    )
    # nobody's expert has nothing to gain
    unused_LE = work.count_BLEK.sum(axis=(0, 3)) == 0
    assert unused_LE.any()
    assert all((plan.resident_LE[unused_LE] == 0).all() for plan in plans)


def test_the_named_smallest_budget_is_enough() -> None:
    work = work_of(6)
    with pytest.raises(InfeasibleError, match=r"below the smallest legal plan, .* MiB") as refused:
        plan_device(work, device_of(memory_mib=0.001), sizes_of(work))
    found = re.search(r"\((\d+) bytes\): a buffer", str(refused.value))
    assert found is not None
    smallest = int(found[1])
    assert smallest == sum(NESTED.plane_bytes_K(SHAPES))
    exactly = device_of(memory_mib=smallest / MIB)
    assert exactly.memory_bytes == smallest
    plan = plan_device(work, exactly, sizes_of(work))
    assert (plan.resident_bytes, plan.buffer_bytes) == (0, smallest)
    with pytest.raises(InfeasibleError):
        plan_device(work, device_of(memory_mib=(smallest - 1) / MIB), sizes_of(work))


def test_a_quality_limit_is_kept_and_buys_time() -> None:
    work = work_of(8, (20, 3, 8, 3), 0.7)
    index, device = index_of(work), device_of(150.0, memory_mib=0.3 * all_bytes(work) / MIB)
    free = plan_device(work, device, index, NO_CACHE)
    assert (free.quality_cost, free.ceiling_LE.min()) == (0.0, 3)
    times = [free.objective or 0.0]
    for limit in (0.0, 0.01, 0.04, 0.2):
        plan = plan_device(work, device, index, replace(NO_CACHE, most_quality_cost=limit))
        assert plan.quality_cost is not None
        assert plan.quality_cost <= limit + 1e-9
        assert plan.quality_cost == evaluate_device(plan, work, device, error_LEK=index.error_LEK).quality_cost
        assert plan.bound is not None
        assert plan.objective is not None
        assert plan.bound <= plan.objective
        assert plan.hashes["planes"] == index.sha256
        times.append(plan.objective)
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(times))
    assert times[-1] < 0.8 * times[0]


def test_clipping_makes_a_smaller_budget_legal() -> None:
    work = work_of(9)
    index, base = index_of(work), NESTED.plane_bytes_K(SHAPES)[0]
    device = device_of(memory_mib=base / MIB)
    with pytest.raises(InfeasibleError, match="or allow clipping"):
        plan_device(work, device, index)
    plan = plan_device(work, device, index, DevicePlanSettings(most_quality_cost=1.0))
    assert (plan.ceiling_LE == 1).all()
    with pytest.raises(InfeasibleError, match="smallest legal plan"):
        plan_device(work, device, index, DevicePlanSettings(most_quality_cost=0.001))


def test_cpsat_chooses_no_worse() -> None:
    work = work_of(10, (10, 2, 8, 3), 0.7)
    device = device_of(200.0, memory_mib=0.4 * all_bytes(work) / MIB)
    exact = plan_device(work, device, sizes_of(work), replace(NO_CACHE, solver="cpsat"))
    greedy = plan_device(work, device, sizes_of(work), NO_CACHE)
    assert (exact.objective or 0.0) <= (greedy.objective or 0.0)
    assert check_device_plan(exact, device=device, work=work) == []


def test_a_cache_is_chosen_where_the_hot_experts_change() -> None:
    """Six phases of ten iterations, four experts of 24 each: residency serves one phase, a cache every one."""
    count_BLEK = np.zeros((60, 2, 24, 3), dtype=np.int64)
    for iteration in range(60):
        at = 4 * (iteration // 10)
        count_BLEK[iteration, :, at : at + 4, 1] = 2
    work = DeviceWork(tokens_B=np.full(60, 4), count_BLEK=count_BLEK)
    device = device_of(50.0, memory_mib=0.3 * all_bytes(work) / MIB)
    plan, without = plan_device(work, device, sizes_of(work)), plan_device(work, device, sizes_of(work), NO_CACHE)
    assert plan.cache == "lru"
    assert plan.objective is not None
    assert without.objective is not None
    assert without.bound is not None
    assert plan.objective < 0.5 * without.objective
    # the two bounds are of two classes of plans: this plan beats the one that knows no caches
    assert plan.objective < without.bound
    assert "every residency, cache" in plan.bound_by
    assert plan.bound is not None
    assert plan.bound <= plan.objective


def test_refusals() -> None:
    work, device = work_of(1), device_of()
    with pytest.raises(MismatchError, match=r"demand goes to level 4, the ladder has 3 \(2, 3, 4 bits\)"):
        plan_device(work_of(1, (2, 2, 5, 4)), device, sizes_of(work))
    with pytest.raises(MismatchError, match="sites, experts"):
        plan_device(work_of(1, (2, 3, 5, 3)), device, sizes_of(work))
    with pytest.raises(UsageError, match="no iterations"):
        plan_device(work_of(1, (0, 2, 5, 3)), device, sizes_of(work))
    with pytest.raises(UsageError, match="needs the error"):
        plan_device(work, device, sizes_of(work), DevicePlanSettings(most_quality_cost=0.1))
    for wrong, message in (
        ({"orders": ()}, "plan.orders"),
        ({"caches": ("lru",)}, "has to have none"),
        ({"caches": ("none", "belady")}, "must know the future"),
        ({"most_quality_cost": -1.0}, "most_quality_cost"),
        ({"solver": "ilp"}, "use greedy or cpsat"),
        ({"time_limit_s": 0.0}, "time_limit_s"),
    ):
        with pytest.raises(UsageError, match=message):
            DevicePlanSettings(**wrong)  # type: ignore[arg-type]
