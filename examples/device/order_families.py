"""Random layers for order_study.py: how planes are sized, what is in memory, and what computing costs.

Legend: E experts, K planes, I items.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placer.core.cluster import LinkClass
from placer.core.device.flowshop import run_in_order
from placer.core.device.items import Items, ItemTimes, OrderRule, layer_items, order_items
from placer.core.device.ladder import LADDERS, BitLadder
from placer.core.device.spec import DeviceCompute, DeviceSpec

__all__ = [
    "FAMILIES",
    "Draw",
    "build",
    "draw",
    "makespan",
    "mutated",
    "paper_cost",
    "ratio",
    "routed_counts",
    "runtime_cost",
    "whole_experts",
]

BITS_SHARE = (0.3, 0.4, 0.3)
V1 = LADDERS["v1"]
COPIES = BitLadder(bits_K=V1.bits_K, nested=False)
DEVICE = DeviceSpec(
    name="study",
    memory_mib=1.0,
    disk=LinkClass(gbytes_per_s=1.0),
    compute=DeviceCompute(layer_us=100.0, base_us=30.0, residual_us=15.0, ffn_tokens=(1, 33), ffn_us=(20.0, 84.0)),
)
PLANE_BYTES = (28_800, 14_400, 14_400)
COPY_BYTES = (28_800, 41_600, 54_400)

FAMILIES = {
    "uniform": "planes of one size, nothing in memory, compute = B T (D2MoE's cost)",
    "resident": "the same, with some experts' base planes in memory",
    "sizes": "experts of different sizes, read and compute in proportion",
    "free": "any read time for any plane, compute = B T",
    "runtime": "planes of one size; an item with tokens unpacks its planes anew and runs the tokens at its level",
    "runtime resident": "the same, with some experts' base planes in memory",
}


@dataclass(frozen=True)
class Draw:
    """One layer of a family: whole numbers, so that it can be printed and changed entry by entry."""

    family: str
    count_EK: np.ndarray
    resident_E: np.ndarray
    read_EK: np.ndarray
    size_E: np.ndarray
    unit: int
    unpack: int

    def shown(self) -> dict[str, Any]:
        """What matters of it, for print and JSON."""
        data: dict[str, Any] = {"tokens at each level": self.count_EK.tolist(), "ns per token": self.unit}
        uniform = self.family in ("uniform", "resident") or self.family.startswith("runtime")
        data["read ns"] = int(self.read_EK[0, 0]) if uniform else _read_EK(self).tolist()
        if "resident" in self.family:
            data["base in memory"] = self.resident_E.astype(int).tolist()
        if self.family.startswith("runtime"):
            data["ns to unpack a plane"] = self.unpack
        if self.family == "sizes":
            data["size"] = self.size_E.tolist()
        return data


def draw(family: str, rng: np.random.Generator, experts: int, planes: int) -> Draw:
    """A random layer with at least one token."""
    count_EK = rng.integers(0, 9, (experts, planes)) * (rng.random((experts, planes)) < 0.6)
    count_EK[0, -1] += not count_EK.any()
    return Draw(
        family=family,
        count_EK=count_EK,
        resident_E=rng.random(experts) < 0.5,
        read_EK=rng.integers(1, 100, (experts, planes)),
        size_E=rng.integers(1, 10, experts),
        unit=int(rng.integers(1, 20)),
        unpack=int(rng.integers(0, 20)),
    )


def mutated(old: Draw, rng: np.random.Generator) -> Draw:
    """The layer with one number drawn anew."""
    fresh = draw(old.family, rng, *old.count_EK.shape)
    name = ("count_EK", "resident_E", "read_EK", "size_E", "unit", "unpack")[rng.integers(6)]
    value = getattr(fresh, name)
    if name in ("unit", "unpack"):
        return replace(old, **{name: value})
    table = getattr(old, name).copy()
    at = tuple(rng.integers(0, length) for length in table.shape)
    table[at] = rng.integers(0, 13) if name == "count_EK" else value[at]
    return replace(old, **{name: table}) if name != "count_EK" or table.any() else old


def _read_EK(one: Draw) -> np.ndarray:
    if one.family == "free":
        return one.read_EK
    size_E1 = one.size_E[:, None] if one.family == "sizes" else 1
    return np.full(one.count_EK.shape, one.read_EK[0, 0]) * size_E1


def build(one: Draw) -> tuple[Items, ItemTimes]:
    """Items and times of a drawn layer; bytes are the read times."""
    present_EK = np.zeros(one.count_EK.shape, dtype=np.bool_)
    present_EK[:, 0] = one.resident_E & ("resident" in one.family)
    ladder = replace(V1, bits_K=tuple(range(2, 2 + one.count_EK.shape[1])))
    items = layer_items(one.count_EK, present_EK, ladder)
    size_I = one.size_E[items.expert_I] if one.family == "sizes" else 1
    if one.family.startswith("runtime"):
        work_I = one.unpack * (items.plane_I + 1) + one.unit * items.tokens_I
        compute_I = np.where(items.tokens_I > 0, work_I, 0)
    else:
        compute_I = one.unit * items.heat_I * size_I
    read_I = np.where(items.present_I, 0, _read_EK(one)[items.expert_I, items.plane_I])
    times = ItemTimes(read_ns_I=read_I, copy_ns_I=np.zeros_like(read_I), compute_ns_I=compute_I, bytes_I=read_I)
    return items, times


def makespan(items: Items, times: ItemTimes, rule: OrderRule) -> int:
    """How long the layer takes in a rule's order with an unlimited buffer."""
    order_I = order_items(items, rule, times)
    return run_in_order(items.taken(order_I), times.taken(order_I)).makespan_ns


def ratio(one: Draw, rule: OrderRule) -> float:
    """A rule's time over the optimum."""
    items, times = build(one)
    best = makespan(items, times, "johnson")
    return makespan(items, times, rule) / best if best else 1.0


def routed_counts(rng: np.random.Generator, experts: int, tokens: int, top_k: int) -> np.ndarray:
    """Tokens at each level (E, K): top-k of popularities that fall like 1 / rank, ids shuffled, V1's share of bits."""
    popular_E = rng.permutation(1.0 / np.arange(1, experts + 1))
    count_EK = np.zeros((experts, len(BITS_SHARE)), dtype=np.int64)
    for _ in range(tokens):
        picks = rng.choice(experts, top_k, replace=False, p=popular_E / popular_E.sum())
        np.add.at(count_EK, (picks, rng.choice(len(BITS_SHARE), top_k, p=BITS_SHARE)), 1)
    return count_EK


def runtime_cost(
    count_EK: np.ndarray, present_EK: np.ndarray, share: float, *, nested: bool = True
) -> tuple[Items, ItemTimes]:
    """What a device of ours needs, with a disk on which the nested planes' computing is `share` of their reads."""
    items = layer_items(count_EK, present_EK, V1)
    times = ItemTimes.of(items, DEVICE, V1, PLANE_BYTES)
    gbytes_per_s = share * int(times.bytes_I.sum()) / int(times.compute_ns_I.sum())
    device = replace(DEVICE, disk=LinkClass(gbytes_per_s=gbytes_per_s))
    if nested:
        return items, ItemTimes.of(items, device, V1, PLANE_BYTES)
    items = layer_items(count_EK, present_EK, COPIES)
    return items, ItemTimes.of(items, device, COPIES, COPY_BYTES)


def paper_cost(count_EK: np.ndarray, present_EK: np.ndarray, share: float) -> tuple[Items, ItemTimes]:
    """D2MoE's: a plane computes every token that uses it, all of them `share` of the reads."""
    items = layer_items(count_EK, present_EK, V1)
    read_I = np.where(items.present_I, 0, np.asarray(PLANE_BYTES)[items.plane_I])
    compute_I = np.rint(items.heat_I * (share * read_I.sum() / items.heat_I.sum())).astype(np.int64)
    return items, ItemTimes(read_ns_I=read_I, copy_ns_I=np.zeros_like(read_I), compute_ns_I=compute_I, bytes_I=read_I)


def whole_experts(items: Items, times: ItemTimes) -> tuple[Items, ItemTimes]:
    """The layer with each expert's planes as one item: nothing is computed before all of them are there."""
    expert_E, first_E = np.unique(items.expert_I, return_index=True)
    sums = {
        name: np.add.reduceat(getattr(times, name), first_E)
        for name in ("read_ns_I", "copy_ns_I", "compute_ns_I", "bytes_I")
    }
    tokens_E = np.add.reduceat(items.tokens_I, first_E)
    merged = Items(
        expert_I=expert_E, plane_I=np.zeros_like(expert_E), tokens_I=tokens_E, heat_I=tokens_E,
        present_I=sums["bytes_I"] == 0,
    )  # fmt: skip
    return merged, ItemTimes(**sums)
