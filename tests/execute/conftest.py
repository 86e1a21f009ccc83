"""What the executor's tests share: routed tokens, plans of every kind, and ranks that are threads of this process.

Legend: L sites, T tokens, K top-k, E experts, P slots, R ranks.
"""

import collections
import functools
import importlib.util
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.core.schedule import Rounds

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    from placer.execute.dispatch import Fabric
    from placer.execute.dispatch.lanes import Ticket


def random_routing(rng, layers, tokens, top_k, experts, *, empty_share=0.2):
    """expert_LTK int64 with distinct ids per token and -1 for the entries left out."""
    expert_LTK = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :top_k]
    expert_LTK[rng.random(expert_LTK.shape) < empty_share] = -1
    return expert_LTK


def make_plan(slot_expert_LP, *, experts, ranks, mode="per_rank", ranks_per_node=None, **fields):
    slot_expert_LP = np.asarray(slot_expert_LP, dtype=np.int64)
    return Plan(
        model="toy",
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=ranks_per_node or ranks,
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
    """Stands in for torch.distributed: `run` calls a function once per rank, each in a thread, and exchanges arrays.

    A group is the tuple of its ranks, None all of them.
    """

    isend, irecv = "isend", "irecv"

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._local = threading.local()
        self._everyone = tuple(range(num_ranks))
        self._meets = {self._everyone: threading.Barrier(num_ranks, timeout=20)}
        self._sent: dict[Any, Any] = {}
        self._mail: dict[Any, Any] = collections.defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()

    def get_world_size(self) -> int:
        return self.num_ranks

    def get_rank(self, group=None) -> int:
        return self._local.rank if group is None else group.index(self._local.rank)

    def all_to_all_single(self, output, rows, output_splits=None, input_splits=None, group=None) -> None:
        members = group or self._everyone
        with self._lock:
            meet = self._meets.setdefault(members, threading.Barrier(len(members), timeout=20))
        rank = self._local.rank
        input_splits = input_splits or [len(rows) // len(members)] * len(members)
        assert sum(input_splits) == len(rows)
        parts = torch.split(rows, input_splits)
        self._sent.update({(members, rank, peer): part for peer, part in zip(members, parts, strict=True)})
        meet.wait()
        parts = [self._sent[members, source, rank] for source in members]
        if output_splits is not None:
            assert [len(part) for part in parts] == output_splits
        output.copy_(torch.cat(parts))
        meet.wait()

    def P2POp(self, operation, rows, peer=None, group=None, group_peer=None):
        if peer is None:
            return operation, rows, (group or self._everyone)[group_peer]
        self._local.in_rounds = True
        return operation, rows, peer

    def batch_isend_irecv(self, operations):
        rank = self._local.rank
        peers = {kind: [peer for operation, _, peer in operations if operation == kind] for kind in ("isend", "irecv")}
        if self._local.__dict__.pop("in_rounds", False):
            assert all(len(found) <= 1 for found in peers.values()), "a round has one receiver and one sender at most"
        with self._lock:
            inbox = {peer: self._mail[peer, rank] for peer in peers["irecv"]}
            outbox = {peer: self._mail[rank, peer] for peer in peers["isend"]}
        for operation, rows, peer in operations:
            if operation == "isend":
                outbox[peer].put(rows.clone())

        def receive(rows, peer):
            arrived = inbox[peer].get(timeout=20)
            assert arrived.shape == rows.shape
            rows.copy_(arrived)

        return [
            SimpleNamespace(wait=functools.partial(receive, rows, peer))
            for operation, rows, peer in operations
            if operation == "irecv"
        ]

    def fabric(self, ranks_per_node: int) -> Any:
        """This thread's rank in nodes of that size."""
        rank = self._local.rank
        first = rank - rank % ranks_per_node
        inside = tuple(range(first, first + ranks_per_node))
        across = tuple(range(rank % ranks_per_node, self.num_ranks, ranks_per_node))
        groups = [group if len(group) > 1 else None for group in (inside, across)]
        return Fabric(rank, self.num_ranks, ranks_per_node, *groups)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:  # noqa: BLE001 (handed to the test)
                errors.append(error)
                for meet in self._meets.values():
                    meet.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return results


class InlineLanes:
    """Lanes that run every job at once."""

    device = None if importlib.util.find_spec("torch") is None else torch.device("cpu")

    def __getitem__(self, inside: bool) -> "InlineLanes":
        return self

    def submit(self, job, after=None) -> Any:
        ticket = Ticket(begin=perf_counter_ns())
        ticket.result = job(None if after is None else after.join())
        ticket.end = perf_counter_ns()
        return ticket


def random_rounds(rng, ranks) -> Rounds:
    """Every pair in one to three pieces, each round a random matching of what is left."""
    pieces = []
    for a in range(ranks):
        for b in range(ranks):
            if a != b:
                parts = rng.dirichlet(np.ones(rng.integers(1, 4)))
                pieces += [(a, b, share) for share in parts]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    to_GR, share_GR = [], []
    while pieces:
        to_R, share_R, later = np.full(ranks, -1), np.zeros(ranks), []
        for a, b, share in pieces:
            if to_R[a] < 0 and b not in to_R:
                to_R[a], share_R[a] = b, share
            else:
                later.append((a, b, share))
        to_GR.append(to_R)
        share_GR.append(share_R)
        pieces = later
    shape = (len(to_GR), ranks)
    return Rounds(to_GR=np.array(to_GR, dtype=np.int64).reshape(shape), share_GR=np.array(share_GR).reshape(shape))


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
        InlineLanes=InlineLanes,
        ThreadRanks=ThreadRanks,
        make_plan=make_plan,
        processes_with=processes_with,
        random_rounds=random_rounds,
        random_routing=random_routing,
        random_slots=random_slots,
        rows_are_independent=rows_are_independent,
        toy_model=toy_model,
    )
