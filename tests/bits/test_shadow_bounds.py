"""The bounds on a device plan's iteration time: below every plan, below brute force on tiny work, tight at the ends."""

import itertools

import numpy as np
import pytest
from device_cases import COPIES, NESTED, SHAPES, device_of, plan_of, work_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.evaluate import evaluate_device
from placer.core.device.flowshop import run_in_order
from placer.core.device.items import ItemTimes, layer_items
from placer.core.device.ladder import BitLadder
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError
from solvers.bits.cache_bound import any_cache_bound_ns
from solvers.bits.options import LevelOptions, level_options
from solvers.bits.replay import replay
from solvers.bits.shadow import ascend

TWO = BitLadder(bits_K=(2, 3))


def options_of(work: DeviceWork, device: DeviceSpec, ladder: BitLadder) -> LevelOptions:
    return level_options(work, device, ladder, ladder.plane_bytes_K(SHAPES), ceilings=(ladder.levels,))


@given(
    seed=st.integers(0, 2**32 - 1),
    nested=st.booleans(),
    copies=st.booleans(),
    speed=st.sampled_from([100.0, 1000.0, 10_000.0]),
)
@settings(max_examples=40, deadline=None)
def test_no_residency_is_below_the_bound(seed: int, nested: bool, copies: bool, speed: float) -> None:
    ladder, device, work = (NESTED if nested else COPIES), device_of(speed, copies=copies), work_of(seed)
    rng = np.random.default_rng(seed)
    options = options_of(work, device, ladder)
    plan = plan_of(work, ladder, resident_LE=rng.integers(0, 4, work.count_BLEK.shape[1:3]), buffer_bytes=10**6)
    shadow = ascend(options, most_bytes=plan.resident_bytes, buffer_bytes=10**6)
    objective = evaluate_device(plan, work, device).mean_iteration_ns
    assert shadow.bound_ns is not None
    assert shadow.bound_ns <= objective
    # any shares give a bound: cost of the plan's own options is never above its time
    share_LB = rng.random(shadow.share_LB.shape)
    cost_LEO = options.cost_LEO(share_LB)
    mixed = np.take_along_axis(cost_LEO, plan.resident_LE[..., None], axis=2).sum() / work.num_iterations
    assert options.outside_ns + mixed <= objective * (1 + 1e-9)


def best_order_ns(count_EK: np.ndarray, present_EK: np.ndarray, device: DeviceSpec, buffer_bytes: int) -> float:
    """The least makespan of all orders with each expert's planes ascending that such a buffer can go on with."""
    items = layer_items(count_EK, present_EK, TWO)
    times = ItemTimes.of(items, device, TWO, TWO.plane_bytes_K(SHAPES))
    best = np.inf if len(items) else 0.0
    for order in itertools.permutations(range(len(items))):
        order_I = np.array(order, dtype=np.int64)
        place_I = np.argsort(order_I)
        if any(
            items.expert_I[item] == items.expert_I[item + 1] and place_I[item] > place_I[item + 1]
            for item in range(len(items) - 1)
        ):
            continue
        try:
            spans = run_in_order(items.taken(order_I), times.taken(order_I), buffer_bytes)
        except InfeasibleError:
            continue
        best = min(best, spans.makespan_ns)
    return best


@given(seed=st.integers(0, 2**32 - 1), speed=st.sampled_from([200.0, 800.0, 3000.0]), planes=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_brute_force_over_residency_caches_and_orders(seed: int, speed: float, planes: int) -> None:
    """Every order, every resident set, every decision what to keep after each of three iterations, one site."""
    work, device = work_of(seed, (3, 1, 2, 2), 0.8), device_of(speed)
    bytes_K = np.array(TWO.plane_bytes_K(SHAPES))
    memory = int(bytes_K[0] * planes)
    plane_P = [(expert, plane) for expert in range(2) for plane in range(2)]

    def size(held: frozenset[int]) -> int:
        return sum(int(bytes_K[plane_P[at][1]]) for at in held)

    def table(held: frozenset[int]) -> np.ndarray:
        present_EK = np.zeros((2, 2), dtype=np.bool_)
        for at in held:
            present_EK[plane_P[at]] = True
        return present_EK

    subsets = [frozenset(s) for n in range(5) for s in itertools.combinations(range(4), n)]
    needed = [
        frozenset(at for at in range(4) if work.count_BLEK[b, 0, plane_P[at][0], plane_P[at][1] :].any())
        for b in range(3)
    ]
    best_ns: dict[tuple[int, frozenset[int], int], float] = {}

    def time_of(b: int, held: frozenset[int], buffer_bytes: int) -> float:
        key = (b, held & needed[b], buffer_bytes)
        if key not in best_ns:
            best_ns[key] = best_order_ns(work.count_BLEK[b, 0], table(held), device, buffer_bytes)
        return best_ns[key]

    with_cache, without = np.inf, np.inf
    for resident in subsets:
        if size(resident) > memory:
            continue
        reached = {resident: 0.0}
        alone = 0.0
        for b in range(3):
            alone += time_of(b, resident, memory - size(resident))
            following: dict[frozenset[int], float] = {}
            for held, total in reached.items():
                now = total + time_of(b, held, memory - size(held))
                for kept in subsets:
                    if resident <= kept <= (held | needed[b]) and size(kept) <= memory:
                        following[kept] = min(following.get(kept, np.inf), now)
            reached = following
        with_cache = min(with_cache, *reached.values())
        # a plan's resident planes are the lowest of an expert
        present_EK = table(resident)
        if not (present_EK[:, 1] & ~present_EK[:, 0]).any():
            without = min(without, alone)
    options = options_of(work, device, TWO)
    shadow = ascend(options, most_bytes=memory, buffer_bytes=memory)
    assert shadow.bound_ns is not None
    assert shadow.bound_ns - options.outside_ns <= without / 3 + 1e-6
    cached = any_cache_bound_ns(options, TWO.plane_bytes_K(SHAPES), memory_bytes=memory, start_LB=shadow.share_LB)
    assert cached - options.outside_ns <= with_cache / 3 + 1e-6


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1.0), speed=st.sampled_from([100.0, 1000.0]))
@settings(max_examples=20, deadline=None)
def test_no_lru_cache_is_below_the_bound_for_caches(seed: int, share: float, speed: float) -> None:
    work, device = work_of(seed, (8, 2, 4, 3)), device_of(speed)
    options, bytes_K = options_of(work, device, NESTED), NESTED.plane_bytes_K(SHAPES)
    capacity = int(share * 8 * sum(bytes_K))
    plan = plan_of(work, NESTED, cache="lru", cache_bytes=capacity, buffer_bytes=10**6)
    bound = any_cache_bound_ns(options, bytes_K, memory_bytes=capacity, start_LB=np.full((2, 8), 0.5))
    assert bound <= evaluate_device(plan, work, device).mean_iteration_ns


def test_bounds_are_tight_where_one_machine_is_the_bottleneck() -> None:
    """Within 3 % of the plan found, I/O-bound and compute-bound; between, the shares are between."""
    work = work_of(7, (30, 4, 16, 3), 0.6)
    shares = []
    for speed in (50.0, 20_000.0):
        device = device_of(speed)
        options, bytes_K = options_of(work, device, NESTED), NESTED.plane_bytes_K(SHAPES)
        shadow = ascend(options, most_bytes=16 * sum(bytes_K), buffer_bytes=10**6)
        choice_LE = shadow.choices[0]
        found = replay(
            work, np.arange(3) < options.resident_O[choice_LE][..., None], order="resident_first", buffer_bytes=10**6,
            device=device, ladder=NESTED, plane_bytes_K=bytes_K,
        )  # fmt: skip
        objective = options.outside_ns + float(found.makespan_ns_BL.sum(axis=1).mean())
        assert shadow.bound_ns is not None
        assert shadow.bound_ns <= objective <= 1.03 * shadow.bound_ns
        shares.append(shadow.share_LB.mean())
    assert shares[0] == pytest.approx(1, abs=0.01)
    assert shares[1] == pytest.approx(0, abs=0.01)


def test_nothing_fits() -> None:
    work = work_of(2)
    shadow = ascend(options_of(work, device_of(), NESTED), most_bytes=10, buffer_bytes=10)
    assert (shadow.bound_ns, shadow.choices) == (None, ())
