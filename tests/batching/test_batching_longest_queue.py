"""Read-ME's algorithm 1, mended: it ends, loses nobody, and is no worse than order of arrival but for a known case."""

import numpy as np
import pytest
from batching_cases import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.batching.longest_queue import fifo_batches, longest_queue_batches
from solvers.batching.routes import pack_routes, unique_experts


def unique(expert_I, batch_I):
    return int(unique_experts(pack_routes(expert_I[None, :, None].astype(np.uint8), 9), batch_I).sum())


def by_the_paper(expert_I, tokens_I, room_of_batch):
    """Algorithm 1 with lists, its two faults mended."""
    queues = {e: [i for i in range(len(expert_I)) if expert_I[i] == e] for e in range(9)}
    batch_of, batch, room = {}, 0, room_of_batch
    while any(queues.values()):
        longest = max(queues, key=lambda e: (sum(tokens_I[i] for i in queues[e]), -e))
        while queues[longest] and tokens_I[queues[longest][0]] <= room:
            item = queues[longest].pop(0)
            batch_of[item] = batch
            room -= tokens_I[item]
        if queues[longest] or not room:
            batch, room = batch + 1, room_of_batch
    return [batch_of[i] for i in range(len(expert_I))]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.integers(5, 12))
def test_it_is_the_paper_s_algorithm(seed, requests, experts, longest, room):
    rng = np.random.default_rng(seed)
    expert_I, tokens_I = rng.integers(0, experts, requests), rng.integers(1, longest + 1, requests)
    batch_I = longest_queue_batches(expert_I, tokens_I, room)
    assert batch_I.tolist() == by_the_paper(expert_I.tolist(), tokens_I.tolist(), room)
    assert np.bincount(batch_I, weights=tokens_I, minlength=1).max() <= room
    assert set(batch_I.tolist()) == set(range(batch_I.max(initial=-1) + 1)), "every request has a batch, none is empty"
    assert unique(expert_I, batch_I) <= len(set(expert_I.tolist())) + max(0, int(batch_I.max(initial=0)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=30), st.integers(6, 9))
def test_order_of_arrival(tokens, room):
    batch_I = fifo_batches(np.array(tokens, dtype=np.int64), room)
    wanted, batch, left = [], 0, room
    for size in tokens:
        if size > left:
            batch, left = batch + 1, room
        left -= size
        wanted.append(batch)
    assert batch_I.tolist() == wanted


@pytest.mark.parametrize("seed", range(50))
def test_fewer_experts_than_in_order_of_arrival_on_every_seed(seed):
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(9, 0.8))
    expert_I, ones_I = rng.choice(9, 300, p=popularity), np.ones(300, dtype=np.int64)
    aware, fifo = longest_queue_batches(expert_I, ones_I, 16), fifo_batches(ones_I, 16)
    assert aware.max() == fifo.max()
    assert unique(expert_I, aware) <= unique(expert_I, fifo)


def test_where_order_of_arrival_touches_fewer():
    """Arrivals that are packed already (3 + 1, 2 + 2): the longest queue first splits one of the pairs."""
    expert_I = np.array([0, 0, 0, 3, 1, 1, 2, 2])
    ones_I = np.ones(8, dtype=np.int64)
    assert unique(expert_I, fifo_batches(ones_I, 4)) == 4
    assert unique(expert_I, longest_queue_batches(expert_I, ones_I, 4)) == 5


def test_what_makes_no_sense_is_refused():
    ones = np.ones(2, dtype=np.int64)
    with pytest.raises(UsageError, match="1 to 7 tokens"):
        fifo_batches(np.array([1, 7]), 6)
    with pytest.raises(UsageError, match="0 to 3 tokens"):
        longest_queue_batches(np.array([0, 0]), np.array([0, 3]), 6)
    with pytest.raises(UsageError, match="expert_I"):
        longest_queue_batches(np.array([0, -1]), ones, 6)
