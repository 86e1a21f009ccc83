"""Orders of a layer's items: HEBF by hand, D2MoE's three steps, chains kept, and chain-Johnson by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import LinkClass
from placer.core.device.items import ORDER_RULES, Items, ItemTimes, layer_items, order_items
from placer.core.device.ladder import LADDERS, BitLadder
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.errors import UsageError

V1 = LADDERS["v1"]
COPIES = BitLadder(bits_K=(2, 3, 4), nested=False)
BYTES = (500, 250, 250)
COMPUTE = DeviceCompute(layer_us=1.0, base_us=2.0, residual_us=0.5, ffn_tokens=(1, 10), ffn_us=(1.0, 10.0))
DEVICE = DeviceSpec(
    name="toy", memory_mib=1.0, disk=LinkClass(gbytes_per_s=0.1, alpha_us=1.0), compute=COMPUTE
)  # 1 us + 10 ns per byte


def layer(count_EK, present_EK=None, ladder: BitLadder = V1, device: DeviceSpec = DEVICE) -> tuple[Items, ItemTimes]:
    count_EK = np.asarray(count_EK, dtype=np.int64)
    present_EK = np.zeros(count_EK.shape, bool) if present_EK is None else np.asarray(present_EK, bool)
    items = layer_items(count_EK, present_EK, ladder)
    return items, ItemTimes.of(items, device, ladder, BYTES)


def named(items: Items, order_I) -> list[str]:
    """Expert letter and bits of each item in the order."""
    return [f"{'ABCDEFGH'[items.expert_I[i]]}{V1.bits_K[items.plane_I[i]]}" for i in order_I]


def by_three_steps(items: Items, weight_I) -> list[int]:
    """D2MoE section 4.3 word for word: queues, heads, the head with the highest frequency moves."""
    queues = {
        int(e): sorted(np.flatnonzero(items.expert_I == e).tolist(), key=lambda i: items.plane_I[i])
        for e in np.unique(items.expert_I)
    }
    order = []
    while queues:
        heads = [queue[0] for queue in queues.values()]
        moved = min(heads, key=lambda i: (-weight_I[i], items.plane_I[i], items.expert_I[i]))
        order.append(moved)
        queue = queues[int(items.expert_I[moved])]
        queue.pop(0)
        if not queue:
            del queues[int(items.expert_I[moved])]
    return order


@st.composite
def counts(draw: st.DrawFn, planes: int = 3) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = draw(st.integers(1, 8))
    return rng.integers(0, draw(st.sampled_from([2, 4, 30])), (experts, planes))


def test_three_tokens_one_at_two_bits_and_two_at_three() -> None:
    """D2MoE's figure 9: all three use the base plane, two the next."""
    items, _ = layer([[1, 2, 0]])
    assert items.heat_I.tolist() == [3, 2]
    assert items.tokens_I.tolist() == [1, 2]


def test_hottest_expert_bit_first_by_hand() -> None:
    """B of A: 4 3 1, of B: 5 0 0, of C: 2 2 2."""
    items, times = layer([[1, 2, 1], [5, 0, 0], [0, 0, 2]])
    assert named(items, order_items(items, "hebf", times)) == ["B2", "A2", "A3", "C2", "C3", "C4", "A4"]


def test_ties_go_to_the_lower_plane_then_to_the_lower_expert() -> None:
    items, times = layer([[0, 2, 0], [0, 2, 0], [2, 0, 0], [0, 0, 0]])
    assert named(items, order_items(items, "hebf", times)) == ["A2", "B2", "C2", "A3", "B3"]


def test_exact_selections_let_a_hot_plane_wait_behind_a_cold_one() -> None:
    """Exactly: A 0 0 9, B 2 1 0. A's hot top plane shows only when the two below have moved."""
    items, times = layer([[0, 0, 9], [2, 1, 0]])
    assert named(items, order_items(items, "hebf_exact", times)) == ["B2", "B3", "A2", "A3", "A4"]
    assert named(items, order_items(items, "hebf", times)) == ["A2", "A3", "A4", "B2", "B3"]


def test_resident_first_takes_what_is_there_and_never_a_plane_before_a_lower_one() -> None:
    """A's base and C's middle plane are in memory; C's middle plane is of no use before its base."""
    present_EK = [[True, False, False], [False] * 3, [False, True, False]]
    items, times = layer([[1, 0, 0], [5, 0, 0], [0, 4, 0]], present_EK)
    assert named(items, order_items(items, "resident_first", times)) == ["A2", "B2", "C2", "C3"]


def test_johnson_by_hand() -> None:
    """Three base planes are read in 6 us each: the longest computing first, the shortest last."""
    items, times = layer([[1, 0, 0], [10, 0, 0], [2, 0, 0]])
    assert times.read_ns_I.tolist() == [6000, 6000, 6000]
    assert times.compute_ns_I.tolist() == [3000, 12000, 4000]
    assert named(items, order_items(items, "johnson", times)) == ["B2", "C2", "A2"]


def test_johnson_sees_what_waits_behind_a_plane() -> None:
    """A's first two planes compute nothing and B's base does, yet A's tokens, behind them, take longest."""
    items, times = layer([[0, 0, 10], [1, 0, 0]])
    assert named(items, order_items(items, "johnson", times)) == ["A2", "A3", "A4", "B2"]


@settings(max_examples=100, deadline=None)
@given(count_EK=counts())
def test_hebf_is_a_sort_by_heat_then_plane_then_expert(count_EK: np.ndarray) -> None:
    items, times = layer(count_EK)
    key = [(-h, k, e) for h, k, e in zip(items.heat_I, items.plane_I, items.expert_I, strict=True)]
    assert order_items(items, "hebf", times).tolist() == sorted(range(len(items)), key=key.__getitem__)


@settings(max_examples=100, deadline=None)
@given(count_EK=counts(), nested=st.booleans())
def test_both_readings_of_hebf_are_the_papers_three_steps(count_EK: np.ndarray, nested: bool) -> None:
    items, times = layer(count_EK, ladder=V1 if nested else COPIES)
    assert order_items(items, "hebf", times).tolist() == by_three_steps(items, items.heat_I)
    assert order_items(items, "hebf_exact", times).tolist() == by_three_steps(items, items.tokens_I)


@settings(max_examples=100, deadline=None)
@given(count_EK=counts(), rule=st.sampled_from(ORDER_RULES), nested=st.booleans(), data=st.data())
def test_every_rule_orders_every_item_once_and_planes_ascend(count_EK, rule, nested, data) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    items, times = layer(count_EK, rng.random(count_EK.shape) < 0.4, V1 if nested else COPIES)
    order_I = order_items(items, rule, times)
    assert sorted(order_I.tolist()) == list(range(len(items)))
    for expert in np.unique(items.expert_I):
        planes = items.plane_I[order_I][items.expert_I[order_I] == expert]
        assert (np.diff(planes) > 0).all()


@settings(max_examples=50, deadline=None)
@given(count_EK=counts(), rule=st.sampled_from(ORDER_RULES), seed=st.integers(0, 99))
def test_the_order_does_not_depend_on_how_items_are_given(count_EK, rule, seed: int) -> None:
    items, times = layer(count_EK, np.random.default_rng(seed).random(count_EK.shape) < 0.3)
    shuffled_I = np.random.default_rng(seed).permutation(len(items))
    expected = named(items, order_items(items, rule, times))
    mixed = items.taken(shuffled_I)
    assert named(mixed, order_items(mixed, rule, times.taken(shuffled_I))) == expected


def test_an_unknown_rule_is_refused() -> None:
    items, times = layer([[1, 0, 0]])
    with pytest.raises(UsageError, match="by_id, hebf, hebf_exact, resident_first, johnson"):
        order_items(items, "fastest", times)  # type: ignore[arg-type]


def test_no_items_have_an_empty_order_under_every_rule() -> None:
    items, times = layer(np.zeros((3, 3)))
    assert [order_items(items, rule, times).tolist() for rule in ORDER_RULES] == [[]] * len(ORDER_RULES)


@settings(max_examples=50, deadline=None)
@given(count_EK=counts(), seed=st.integers(0, 99), nested=st.booleans())
def test_times_follow_the_device(count_EK: np.ndarray, seed: int, nested: bool) -> None:
    """Item by item: bytes and read where missing, the planes of the level turned into weights where tokens run."""
    device = DeviceSpec(
        name="two hops", memory_mib=1.0, disk=DEVICE.disk, compute=COMPUTE, to_device=LinkClass(gbytes_per_s=1.0)
    )
    present_EK = np.random.default_rng(seed).random(count_EK.shape) < 0.4
    items, times = layer(count_EK, present_EK, V1 if nested else COPIES, device)
    for i, (expert, plane) in enumerate(zip(items.expert_I, items.plane_I, strict=True)):
        missing = not present_EK[expert, plane]
        assert times.bytes_I[i] == (BYTES[plane] if missing else 0)
        assert times.read_ns_I[i] == (1000 + 10 * BYTES[plane] if missing else 0)
        assert times.copy_ns_I[i] == (BYTES[plane] if missing else 0)
        residuals = plane if nested else 0
        tokens = count_EK[expert, plane]
        assert items.tokens_I[i] == tokens
        assert times.compute_ns_I[i] == (1000 * tokens + 2000 + 500 * residuals if tokens else 0)
        assert items.heat_I[i] == (count_EK[expert, plane:].sum() if nested else tokens)
    assert items.tokens_I.sum() == count_EK.sum()
