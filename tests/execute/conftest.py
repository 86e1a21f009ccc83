"""What the executor's tests share: routed tokens, plans of every kind, and ranks that are threads of this process.

Legend: L sites, T tokens, K top-k, E experts, P slots, R ranks.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from placer.core.model import ModelSpec
from placer.core.plan import Plan

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch


def random_routing(rng, layers, tokens, top_k, experts, *, empty_share=0.2):
    """expert_LTK int64 with distinct ids per token and -1 for the entries left out."""
    expert_LTK = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :top_k]
    expert_LTK[rng.random(expert_LTK.shape) < empty_share] = -1
    return expert_LTK


def make_plan(slot_expert_LP, *, experts, ranks, mode="per_rank", **fields):
    slot_expert_LP = np.asarray(slot_expert_LP, dtype=np.int64)
    return Plan(
        model="toy",
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=ranks,
        moe_layers=tuple(range(len(slot_expert_LP))),
        slot_expert_LP=slot_expert_LP,
        mode=mode,
        **fields,
    )


def random_slots(rng, experts, ranks, slots_per_rank, *, empty_ranks=()):
    """One row of a plan: every expert once, then replicas and empty slots at random; some ranks hold nothing."""
    row = np.full(ranks * slots_per_rank, -1)
    usable = np.array([p for p in range(len(row)) if p // slots_per_rank not in empty_ranks])
    places = rng.permutation(usable)
    row[places[:experts]] = rng.permutation(experts)
    for place in places[experts:]:
        if rng.random() < 0.6:
            row[place] = rng.integers(experts)
    return row


def toy_model(layers, experts, top_k, hidden=32, inner=24):
    return ModelSpec.uniform(
        "toy",
        num_experts=experts,
        top_k=top_k,
        num_hidden_layers=layers,
        hidden_size=hidden,
        moe_intermediate_size=inner,
    )


@functools.cache
def rows_are_independent(inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether this machine's BLAS rounds a row alike in products of different heights (multiples of 8)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    whole = torch.nn.functional.linear(x, weight)
    return all(
        torch.equal(torch.nn.functional.linear(x[at : at + rows], weight), whole[at : at + rows])
        for rows in (8, 16, 24, 40, 64, 128)
        for at in (0, 3, 8)
    )


class ThreadRanks:
    """Stands in for torch.distributed: `run` calls a function once per rank, each in a thread, and exchanges arrays."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._local = threading.local()
        self._meet = threading.Barrier(num_ranks, timeout=20)
        self._sent: list[Any] = [None] * num_ranks

    def get_world_size(self) -> int:
        return self.num_ranks

    def all_to_all_single(self, output, rows, output_splits=None, input_splits=None) -> None:
        rank = self._local.rank
        input_splits = input_splits or [len(rows) // self.num_ranks] * self.num_ranks
        assert sum(input_splits) == len(rows)
        self._sent[rank] = torch.split(rows, input_splits)
        self._meet.wait()
        parts = [self._sent[source][rank] for source in range(self.num_ranks)]
        if output_splits is not None:
            assert [len(part) for part in parts] == output_splits
        output.copy_(torch.cat(parts))
        self._meet.wait()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:  # noqa: BLE001 (handed to the test)
                errors.append(error)
                self._meet.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return results


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that contain `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.fixture
def helpers():
    return SimpleNamespace(
        ThreadRanks=ThreadRanks,
        make_plan=make_plan,
        processes_with=processes_with,
        random_routing=random_routing,
        random_slots=random_slots,
        rows_are_independent=rows_are_independent,
        toy_model=toy_model,
    )
