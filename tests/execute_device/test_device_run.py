"""A run computes what the same weights give in memory, loads what the plan says in its order, and holds no more."""

import numpy as np
import pytest
import torch
from device_run_cases import make_device, make_device_plan, make_work, replay_in_memory, write_planes

from placer.core.device.buffer import fitting_order
from placer.core.device.items import ItemTimes, layer_items, order_items
from placer.core.device.work import tokens_on_planes
from placer.core.timeline import PHASES
from placer.execute.device import run_device
from placer.execute.device.rows import ItemRows, assigned

LOAD, EXPERTS = PHASES.index("load"), PHASES.index("experts")


@pytest.fixture(scope="module")
def planes(tmp_path_factory):
    """Plane files by whether they are nested."""
    folder = tmp_path_factory.mktemp("planes")
    return {nested: write_planes(folder / f"{nested}.safetensors", nested=nested) for nested in (True, False)}


PLANS = {
    "hold": {"resident": 3, "buffer_experts": 0},
    "on_demand": {"nested": False, "order": "by_id", "buffer_experts": 2},
    "nested": {"order": "by_id", "buffer_experts": 5},
    "tight": {"order": "hebf"},
    "exact": {"order": "hebf_exact", "buffer_experts": 1.7},
    "base_resident": {"order": "resident_first", "resident": 1, "buffer_experts": 2},
    "some_resident": {"resident": [[3, 2, 1, 0, 0]] * 3},
    "lru": {"cache": "lru", "cache_experts": 4, "buffer_experts": 2},
    "lru_tight": {"cache": "lru", "cache_experts": 1.5},
    "lru_resident": {"cache": "lru", "cache_experts": 3, "resident": [[1, 0, 2, 0, 0]] * 3},
    "prefetch": {"prefetch_layers": 1, "buffer_experts": 6, "predicted": "right"},
    "prefetch_wrong": {"prefetch_layers": 1, "buffer_experts": 4, "predicted": "wrong"},
    "prefetch_lru": {
        "prefetch_layers": 1,
        "buffer_experts": 4,
        "cache": "lru",
        "cache_experts": 3,
        "predicted": "wrong",
    },
    "clipped": {"ceiling_LE": np.tile([1, 2, 3, 1, 2], (3, 1)), "buffer_experts": 2},
}


def run(planes, name, **more):
    fields = dict(PLANS[name])
    index = planes[fields.pop("nested", True)]
    work = make_work(index, predicted=fields.pop("predicted", None))
    plan = make_device_plan(index, **fields)
    outputs = []
    timeline = run_device(
        plan, work, index, make_device(**more), seed=3, on_output=lambda _, out_TH: outputs.append(out_TH)
    )
    return index, work, plan, timeline, outputs


@pytest.mark.parametrize("name", PLANS)
def test_outputs_counts_and_memory(planes, name) -> None:
    index, work, plan, timeline, outputs = run(planes, name)
    for iteration, out_TH in enumerate(outputs):
        assert torch.equal(out_TH, replay_in_memory(index, work, plan, 3, iteration))
    clipped = work.clipped(plan.ceiling_LE)
    for iteration in range(work.num_iterations):
        for site in range(len(plan.moe_layers)):
            here = (timeline.iteration == iteration) & (timeline.layer == site)
            tokens = timeline.tokens[here & (timeline.phase == EXPERTS)]
            count_EK = clipped.count_BLEK[iteration, site]
            assert sorted(tokens) == sorted(count_EK[count_EK > 0])
    assert timeline.about["peak_plane_bytes"] <= plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes
    if plan.cache == "none":
        assert timeline.about["lost_from_cache"] == 0
    if name == "hold":
        assert not (timeline.phase == LOAD).any()
        assert timeline.about["peak_plane_bytes"] == plan.resident_bytes == index.total_bytes


@pytest.mark.parametrize("name", ["on_demand", "nested", "tight", "exact", "base_resident", "some_resident"])
def test_planes_are_read_in_the_order_of_the_plan(planes, name) -> None:
    _, work, plan, timeline, _ = run(planes, name)
    for iteration in range(work.num_iterations):
        for site in range(len(plan.moe_layers)):
            items = layer_items(work.count_BLEK[iteration, site], plan.present_LEK[site], plan.ladder)
            times = ItemTimes.of(items, make_device(), plan.ladder, plan.plane_bytes_K)
            order_I = fitting_order(items, times, order_items(items, plan.order, times), plan.buffer_bytes)
            here = (timeline.iteration == iteration) & (timeline.layer == site)
            loads = np.flatnonzero(here & (timeline.phase == LOAD))
            wanted = times.bytes_I[order_I]
            np.testing.assert_array_equal(timeline.received_bytes[loads], wanted[wanted > 0])
            computed = items.tokens_I[order_I]
            ran = np.flatnonzero(here & (timeline.phase == EXPERTS))
            np.testing.assert_array_equal(timeline.tokens[ran], computed[computed > 0])


def test_spans_of_a_thread_do_not_overlap_and_nothing_is_computed_before_it_is_there(planes) -> None:
    _, _, plan, timeline, _ = run(planes, "nested", disk_limit_mbytes_per_s=30.0)
    end_ns = timeline.start_ns + timeline.duration_ns
    for of_disk in (True, False):
        mine = np.flatnonzero((timeline.phase == LOAD) == of_disk)
        assert (timeline.start_ns[mine][1:] >= end_ns[mine][:-1]).all()
    # by id with nothing resident: the first item of a site needs the site's first load
    for site in range(len(plan.moe_layers)):
        here = (timeline.iteration == 0) & (timeline.layer == site)
        first_load = np.flatnonzero(here & (timeline.phase == LOAD))[0]
        first_item = np.flatnonzero(here & (timeline.phase == EXPERTS))[0]
        assert timeline.start_ns[first_item] >= end_ns[first_load]


def test_a_cache_that_holds_everything_reads_every_plane_once(planes) -> None:
    index = planes[True]
    work = make_work(index, iterations=4)
    plan = make_device_plan(index, cache="lru", cache_experts=15, buffer_experts=2)
    timeline = run_device(plan, work, index, make_device())
    used_LEK = (tokens_on_planes(work.count_BLEK, nested=True) > 0).any(axis=0)
    assert (timeline.phase == LOAD).sum() == used_LEK.sum()


def test_what_is_read_ahead_is_not_read_again(planes) -> None:
    _, work, _, timeline, _ = run(planes, "prefetch")
    used = (tokens_on_planes(work.count_BLEK, nested=True) > 0).sum()
    assert (timeline.phase == LOAD).sum() == used
    # a disk that reads at the speed of memory leaves nothing of a right prediction unread
    assert timeline.about["prefetched"] > 0
    assert 0 < timeline.about["prefetch_used"] <= timeline.about["prefetched"]
    _, _, _, without, _ = run(planes, "nested")
    assert without.about["prefetched"] == 0


def test_same_seed_same_output_whatever_the_plan(planes) -> None:
    first, second = (run(planes, name)[4] for name in ("tight", "prefetch_lru"))
    assert len(first) == 3
    # the plans' work differs in nothing but what is predicted
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_assigned_choices_give_the_counts_and_no_expert_twice() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        tokens = int(rng.integers(1, 9))
        count_EK = np.zeros((4, 3), dtype=np.int64)
        for expert in range(4):
            for _ in range(int(rng.integers(0, tokens + 1))):
                count_EK[expert, rng.integers(3)] += 1
        expert_TK, level_TK = assigned(count_EK, tokens)
        np.testing.assert_array_equal(ItemRows(expert_TK, level_TK, 4, 3).count_EK, count_EK)
        for row_K in expert_TK:
            chosen = row_K[row_K >= 0]
            assert len(set(chosen.tolist())) == len(chosen)
