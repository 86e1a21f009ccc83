"""Devices small enough to simulate on paper. One read of 1000 bytes takes 11 us, of 2000 bytes 12 us."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from device_sim_cases import NESTED, device_of, plan_of, random_work, spans_of, work_of

from placer.core.device.cache import Plane
from placer.core.device.ladder import BitLadder
from placer.core.device.summary import summarize_device
from placer.core.errors import InfeasibleError, MismatchError, PlacerError, UsageError
from placer.core.timeline import PHASES
from sim.device import simulate_device

ONE = BitLadder(bits_K=(2,))
FIDELITIES = pytest.mark.parametrize("fidelity", ["port", "flow"])


def drawn(plan: Any, work: Any, device: Any, **options: Any) -> list[tuple[Any, ...]]:
    """(phase, start us, end us, site, expert, plane) by iteration and start."""
    spans, _ = spans_of(plan, work, device, **options)
    return [
        (PHASES[phase], start / 1000, end / 1000, site, expert, plane)
        for phase, start, end, site, expert, plane in zip(
            *(spans[name].tolist() for name in ("phase", "start_ns", "end_ns", "site", "expert", "plane")), strict=True
        )
    ]


@FIDELITIES
def test_two_experts_one_plane_resident(fidelity: Any) -> None:
    """Expert 0 has a token at level 1 and three at level 2, expert 1 two at level 1; expert 1's base is resident.

    B is 4, 3 (expert 0's planes) and 2: expert 1 comes last although it is there, since HEBF looks at B alone.
    """
    work = work_of([[[[1, 3, 0], [2, 0, 0]]]])
    plan = plan_of(work, resident_LE=np.array([[0, 1]]))
    # attention 4 + 4 * 0.25; items 6 + 4, 6 + 1.5 + 6 and 6 + 5
    assert drawn(plan, work, device_of(), fidelity=fidelity) == [
        ("attention", 0, 5, 0, -1, -1),
        ("load", 5, 17, 0, 0, 0),
        ("experts", 17, 27, 0, 0, 0),
        ("load", 17, 28, 0, 0, 1),
        ("experts", 28, 41.5, 0, 0, 1),
        ("experts", 41.5, 52.5, 0, 1, 0),
    ]
    summary = summarize_device(simulate_device(plan, work, device_of(), fidelity=fidelity))
    assert (summary.wait_ns, summary.stalls, summary.read_bytes, summary.reads) == (13_000, 2, 3000, 2)
    assert (summary.attention_ns, summary.experts_ns, summary.total_ns) == (5_000, 34_500, 52_500)
    assert summary.tokens_per_s == pytest.approx(4 / 52.5e-6)


@FIDELITIES
def test_two_hops(fidelity: Any) -> None:
    """A copy of 2000 bytes takes 2 us, of 1000 bytes 1.5; it goes beside the next read."""
    work = work_of([[[[1, 3, 0], [0, 0, 0]]]])
    assert drawn(plan_of(work), work, device_of(two_hops=True), fidelity=fidelity) == [
        ("attention", 0, 5, 0, -1, -1),
        ("load", 5, 17, 0, 0, 0),
        ("load", 17, 28, 0, 0, 1),
        ("copy", 17, 19, 0, 0, 0),
        ("experts", 19, 29, 0, 0, 0),
        ("copy", 28, 29.5, 0, 0, 1),
        ("experts", 29.5, 43, 0, 0, 1),
    ]


@FIDELITIES
def test_only_what_runs_beside_a_read_is_slowed(fidelity: Any) -> None:
    """Twice as slow: the first item does 5.5 of its 10 us during the second read's 11, the rest in 4.5."""
    work = work_of([[[[1, 3, 0], [0, 0, 0]]]])
    assert drawn(plan_of(work), work, device_of(slowdown=2.0), fidelity=fidelity) == [
        ("attention", 0, 5, 0, -1, -1),
        ("load", 5, 17, 0, 0, 0),
        ("experts", 17, 32.5, 0, 0, 0),
        ("load", 17, 28, 0, 0, 1),
        ("experts", 32.5, 46, 0, 0, 1),
    ]


@FIDELITIES
def test_a_read_waits_for_room(fidelity: Any) -> None:
    """One-plane experts of 2000 bytes and room for one: the second is read when the first is computed."""
    work = work_of([[[[1], [1]]]])
    assert drawn(plan_of(work, ONE, buffer_bytes=3000), work, device_of(), fidelity=fidelity)[1:] == [
        ("load", 5, 17, 0, 0, 0),
        ("experts", 17, 27, 0, 0, 0),
        ("load", 27, 39, 0, 1, 0),
        ("experts", 39, 49, 0, 1, 0),
    ]


@FIDELITIES
def test_demand_is_clipped_to_the_ceilings(fidelity: Any) -> None:
    work = work_of([[[[1, 1, 2], [0, 0, 0]]]])
    timeline = simulate_device(plan_of(work, ceiling_LE=np.array([[2, 3]])), work, device_of(), fidelity=fidelity)
    assert timeline.tokens[timeline.phase == PHASES.index("experts")].tolist() == [1, 3]


@FIDELITIES
def test_a_large_cache_misses_what_it_has_never_seen(fidelity: Any) -> None:
    work = random_work(8, (6, 3, 5, 3))
    plan = plan_of(work, cache="lru", cache_bytes=3 * 5 * 4000)
    spans, about = spans_of(plan, work, device_of(), fidelity=fidelity)
    loads = spans["phase"] == PHASES.index("load")
    planes = list(zip(*(spans[name][loads].tolist() for name in ("site", "expert", "plane")), strict=True))
    assert len(planes) == len(set(planes)) == about["demand_reads"] > 0
    uses = np.flip(np.cumsum(np.flip(work.count_BLEK, -1), -1), -1) > 0
    assert set(planes) == {tuple(key) for key in np.argwhere(uses.any(axis=0)).tolist()}
    assert about["cache_hits"] == uses.sum() - len(planes)


class KeepsTheNew:
    """A policy that throws out what a site used from the cache for what it had to read: lost where room is short."""

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        self.present_LEK = np.zeros(shape_LEK, dtype=np.bool_)
        self.planes: list[Plane] = []
        self.most = capacity_bytes // plane_bytes_K[0]

    @property
    def used_bytes(self) -> int:
        raise NotImplementedError

    def present_EK(self, site: int) -> npt.NDArray[np.bool_]:
        return self.present_LEK[site]

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        before, new = self.planes, [plane for plane in used if plane not in self.planes]
        self.planes = [*new, *before][: self.most]
        self.present_LEK[:] = False
        for plane in self.planes:
            self.present_LEK[plane] = True
        return [p for p in self.planes if p not in before], [p for p in before if p not in self.planes]


@FIDELITIES
@pytest.mark.parametrize(("buffer_bytes", "lost", "third_reads"), [(2000, 1, [0, 1]), (4000, 0, [0])])
def test_a_plane_is_lost_that_finds_no_room_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, fidelity: Any, buffer_bytes: int, lost: int, third_reads: list[int]
) -> None:
    """A cache of one plane has expert 2's; iteration 1 uses 0, 1, 2 in this order and the policy keeps 0 for 2.

    Expert 0 is done while 2 is still needed: it waits in the buffer, and is lost where expert 1 needs its room.
    """
    monkeypatch.setattr("sim.device.sites.make_cache", lambda policy, *sizes, **_: KeepsTheNew(*sizes))
    work = work_of([[[[0], [0], [1]]], [[[3], [2], [1]]], [[[1], [1], [0]]]])
    plan = plan_of(work, ONE, cache="lru", cache_bytes=2000, buffer_bytes=buffer_bytes)
    spans, about = spans_of(plan, work, device_of(), fidelity=fidelity)
    assert about["lost_from_cache"] == lost
    assert about["peak_plane_bytes"] <= plan.memory_bytes
    third = (spans["iteration"] == 2) & (spans["phase"] == PHASES.index("load"))
    assert spans["expert"][third].tolist() == (third_reads if lost else [1])


@FIDELITIES
def test_everything_resident_reads_nothing(fidelity: Any) -> None:
    work = random_work(3)
    plan = plan_of(work, resident_LE=np.full((3, 5), 3), buffer_bytes=0)
    timeline = simulate_device(plan, work, device_of(), fidelity=fidelity)
    assert PHASES.index("load") not in timeline.phase
    summary = summarize_device(timeline)
    assert summary.wait_ns == summary.reads == 0
    assert timeline.about["peak_plane_bytes"] == plan.resident_bytes == plan.memory_bytes


@FIDELITIES
def test_no_buffer_and_something_missing(fidelity: Any) -> None:
    work = work_of([[[[1, 0, 0]]]])
    plan = plan_of(work, buffer_bytes=0, memory_bytes=4000)
    with pytest.raises(InfeasibleError, match="expert 0 needs 2000 bytes at once and the buffer has 0"):
        simulate_device(plan, work, device_of(), fidelity=fidelity)


WORK = work_of([[[[1, 0, 0]]]], [[[[1, 0, 0]]]])


@pytest.mark.parametrize(
    ("plan", "options", "kind", "words"),
    [
        (plan_of(WORK), {"fidelity": "exact"}, UsageError, "fidelity is 'exact'; use one of port, flow"),
        (plan_of(WORK), {"iterations": 2}, UsageError, "iterations is 2; the work has 1"),
        (plan_of(WORK), {"iterations": 0}, UsageError, "iterations is 0"),
        (plan_of(random_work(0)), {}, MismatchError, "the work is for (1, 1, 3)"),
        (plan_of(WORK, prefetch_layers=1), {"fidelity": "port"}, UsageError, "the plan prefetches; use flow"),
        (plan_of(WORK, memory_bytes=3999), {}, InfeasibleError, "need 4000 bytes and the plan's memory_bytes allows"),
        (plan_of(WORK, buffer_bytes=2**27), {}, InfeasibleError, "and the device allows 67108864"),
    ],
)
def test_refuses(plan: Any, options: Any, kind: type[PlacerError], words: str) -> None:
    with pytest.raises(kind) as caught:
        simulate_device(plan, WORK, device_of(), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_device_is_summed_up() -> None:
    timeline = simulate_device(plan_of(WORK), WORK, device_of())
    timeline.about["mode"] = "per_rank"
    with pytest.raises(UsageError, match="mode 'per_rank'; give one of a device"):
        summarize_device(timeline)


def test_about_says_what_was_simulated() -> None:
    plan = plan_of(WORK, NESTED)
    about = simulate_device(plan, WORK, device_of(), trace_sha256="f" * 64).about
    assert (about["source"], about["mode"], about["num_ranks"], about["fidelity"]) == ("simulated", "device", 1, "flow")
    assert (about["plan_sha256"], about["trace_sha256"]) == (plan.sha256, "f" * 64)
    assert (about["order"], about["cache"], about["batch"], about["tokens_per_iteration"]) == ("hebf", "none", 4, 4)
