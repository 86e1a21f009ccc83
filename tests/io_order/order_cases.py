"""Random layers for the tests of orders, small enough to try every order, and an independent runner."""

import heapq
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from placer.core.device.items import Items, ItemTimes
from placer.core.device.work import tokens_on_planes


@dataclass(frozen=True)
class Case:
    items: Items
    times: ItemTimes


def make_case(
    count_EK, *, present_EK=None, read_K=None, copy_K=None, compute_I=None, bytes_EK=None, read_EK=None, copy_EK=None
) -> Case:
    """A nested layer from tokens at each level; by default reads of 10, no copies, compute 1 per token of the heat."""
    count_EK = np.asarray(count_EK, dtype=np.int64)
    experts, planes = count_EK.shape
    heat_EK = tokens_on_planes(count_EK, nested=True)
    expert_I, plane_I = np.nonzero(heat_EK)
    present_EK = np.zeros((experts, planes), bool) if present_EK is None else np.asarray(present_EK, bool)
    read_EK = np.tile(read_K or [10] * planes, (experts, 1)) if read_EK is None else np.asarray(read_EK)
    copy_EK = np.tile(copy_K or [0] * planes, (experts, 1)) if copy_EK is None else np.asarray(copy_EK)
    bytes_EK = read_EK if bytes_EK is None else np.asarray(bytes_EK)
    present_I = present_EK[expert_I, plane_I]
    heat_I = heat_EK[expert_I, plane_I]
    items = Items(
        expert_I=expert_I,
        plane_I=plane_I,
        tokens_I=count_EK[expert_I, plane_I],
        heat_I=heat_I,
        present_I=present_I,
    )
    taken = [np.where(present_I, 0, each[expert_I, plane_I]) for each in (read_EK, copy_EK, bytes_EK)]
    compute = heat_I if compute_I is None else np.asarray(compute_I, dtype=np.int64)
    times = ItemTimes(read_ns_I=taken[0], copy_ns_I=taken[1], compute_ns_I=compute, bytes_I=taken[2])
    return Case(items, times)


def random_case(
    rng: np.random.Generator, *, experts: int = 3, planes: int = 3, copies: bool = False, longest: int = 9
) -> Case:
    """Any present planes (holes too), any sizes, ties and items without compute; never without an item."""
    count_EK = rng.integers(0, 4, (experts, planes)) * (rng.random((experts, planes)) < 0.7)
    count_EK[0, 0] += not count_EK.any()
    present_EK = rng.random((experts, planes)) < rng.choice([0.0, 0.3, 0.7])
    read_EK = rng.integers(1, longest + 1, (experts, planes))
    copy_EK = rng.integers(0, longest + 1, (experts, planes)) * copies
    case = make_case(
        count_EK,
        present_EK=present_EK,
        read_EK=read_EK,
        copy_EK=copy_EK,
        bytes_EK=rng.integers(1, 6, (experts, planes)),
    )
    compute_I = np.where(case.items.tokens_I > 0, rng.integers(0, longest + 1, len(case.items)), 0)
    times = ItemTimes(
        read_ns_I=case.times.read_ns_I,
        copy_ns_I=case.times.copy_ns_I,
        compute_ns_I=compute_I,
        bytes_I=case.times.bytes_I,
    )
    return Case(case.items, times)


@st.composite
def cases(draw: st.DrawFn, experts: int = 3, planes: int = 3, *, copies: bool = False) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_case(rng, experts=draw(st.integers(1, experts)), planes=draw(st.integers(1, planes)), copies=copies)


def least_buffer(case: Case) -> int:
    """Bytes below which some expert does not fit."""
    return int(np.bincount(case.items.expert_I, weights=case.times.bytes_I).max())


def keeps_chains(case: Case, order_I) -> bool:
    """A permutation in which every expert's planes ascend."""
    if sorted(order_I.tolist()) != list(range(len(case.items))):
        return False
    plane_of: dict[int, int] = {}
    for item in order_I.tolist():
        expert, plane = int(case.items.expert_I[item]), int(case.items.plane_I[item])
        if plane_of.get(expert, -1) >= plane:
            return False
        plane_of[expert] = plane
    return True


def run_by_events(case: Case, order_I, buffer_bytes: int | None) -> dict[str, list[tuple[int, int]]] | None:
    """(start, end) of every read, copy and computing, in the order given, by three machines that look for work whenever
    something ends; None where they get stuck."""
    items, times = case.items.taken(order_I), case.times.taken(order_I)
    count = len(items)
    loads = [i for i in range(count) if times.bytes_I[i]]
    spans = {name: [(0, 0)] * count for name in ("read", "copy", "compute")}
    length = {"read": times.read_ns_I, "copy": times.copy_ns_I, "compute": times.compute_ns_I}
    queue = {"read": list(loads), "copy": list(loads), "compute": list(range(count))}
    busy = dict.fromkeys(queue, False)
    was_read, arrived, computed = set(), set(range(count)) - set(loads), set()
    in_buffer: set[int] = set()
    agenda = [(0, 0, "", -1)]
    while agenda:
        now = agenda[0][0]
        while agenda and agenda[0][0] == now:
            _, _, machine, item = heapq.heappop(agenda)
            if machine:
                busy[machine] = False
                {"read": was_read, "copy": arrived, "compute": computed}[machine].add(item)
        finished = {
            int(e) for e in items.expert_I if all(i in computed for i in range(count) if items.expert_I[i] == e)
        }
        in_buffer = {i for i in in_buffer if int(items.expert_I[i]) not in finished}
        for machine, waiting in queue.items():
            if busy[machine] or not waiting:
                continue
            item = waiting[0]
            may = {"read": True, "copy": item in was_read, "compute": item in arrived}[machine]
            if machine == "read" and buffer_bytes is not None:
                may = sum(int(times.bytes_I[i]) for i in in_buffer) + int(times.bytes_I[item]) <= buffer_bytes
            if may:
                waiting.pop(0)
                busy[machine] = True
                end = now + int(length[machine][item])
                spans[machine][item] = (now, end)
                if machine == "read":
                    in_buffer.add(item)
                heapq.heappush(agenda, (end, item, machine, item))
    return spans if len(computed) == count else None
