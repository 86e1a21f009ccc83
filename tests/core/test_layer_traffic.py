"""layer_traffic in every dispatch mode against a count token by token, and what must be conserved.

Legend: T tokens, K top-k, W windows, R ranks.
"""

import numpy as np
import pytest
from core_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.dispatch import LayerTraffic, assign_layer, layer_traffic, source_ranks
from placer.core.evaluate import iterate_layers, window_index
from placer.core.modes import DISPATCH_MODES


def replay(case: Case, mode: str) -> tuple[list[LayerTraffic], list[np.ndarray], np.ndarray, int]:
    """Traffic of each layer, the location of each token after it, windows."""
    tokens = case.expert_LTK.shape[1]
    window_T, windows = window_index(tokens, case.batch_tokens)
    location_T, traffics, places = case.source_T, [], []
    for layer in range(len(case.expert_LTK)):
        home_T = location_T if mode == "coherent" else case.source_T
        slot_TK, slots = assign_layer(case.plan, layer, case.expert_LTK[layer], home_T, np.arange(tokens))
        traffic, location_T = layer_traffic(slots, mode, slot_TK, location_T, window_T, windows)
        traffics.append(traffic)
        places.append(location_T)
    return traffics, places, window_T, windows


def count_layer(case: Case, mode: str, layer: int, location_T: np.ndarray, window_T: np.ndarray, windows: int) -> dict:
    """The docstrings of layer_traffic and LayerTraffic, one token at a time."""
    ranks, per_node = case.plan.num_ranks, case.plan.ranks_per_node
    tokens = case.expert_LTK.shape[1]
    home_T = location_T if mode == "coherent" else case.source_T
    slot_TK, slots = assign_layer(case.plan, layer, case.expert_LTK[layer], home_T, np.arange(tokens))
    legs = [np.zeros((windows, ranks, ranks), dtype=int) for _ in range(2 if mode == "per_node" else 1)]
    returns = [np.zeros_like(leg) for leg in legs]
    tokens_WP = np.zeros((windows, len(slots.rank_P)), dtype=int)
    home_WR = np.zeros((windows, ranks), dtype=int)
    touched = nodes = pairs = placed = 0
    after = location_T.copy()
    for token in range(tokens):
        window, home = window_T[token], int(location_T[token])
        home_WR[window, home] += 1
        served = [int(p) for p in slot_TK[token] if p >= 0]
        visits = sorted({int(slots.rank_P[p]) for p in served})
        for slot in served:
            tokens_WP[window, slot] += 1
        touched += len(visits)
        nodes += len({rank // per_node for rank in visits})
        pairs += len(served)
        placed += bool(served)
        if mode == "allgather":
            for other in set(range(ranks)) - {home}:
                legs[0][window, home, other] += 1
                returns[0][window, other, home] += 1
        elif mode == "per_expert":
            for slot in served:
                if slots.rank_P[slot] != home:
                    legs[0][window, home, slots.rank_P[slot]] += 1
                    returns[0][window, slots.rank_P[slot], home] += 1
        elif mode == "per_rank":
            for rank in visits:
                if rank != home:
                    legs[0][window, home, rank] += 1
                    returns[0][window, rank, home] += 1
        elif mode == "coherent":
            if served:
                after[token] = slots.rank_P[served[0]]
            for rank in visits:
                if rank != home:
                    legs[0][window, home, rank] += 1
                if rank != after[token]:
                    returns[0][window, rank, after[token]] += 1
        else:
            for node in {rank // per_node for rank in visits}:
                entry = home if node == home // per_node else node * per_node + home % per_node
                if entry != home:
                    legs[0][window, home, entry] += 1
                    returns[1][window, entry, home] += 1
                for rank in visits:
                    if rank // per_node == node and rank != entry:
                        legs[1][window, entry, rank] += 1
                        returns[0][window, rank, entry] += 1
    totals = (touched, nodes, pairs, placed)
    return {
        "legs": legs, "returns": returns, "tokens": tokens_WP, "home": home_WR, "totals": totals, "after": after,
    }  # fmt: skip


@pytest.mark.parametrize("mode", DISPATCH_MODES)
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_traffic_is_what_counting_gives(mode: str, case: Case) -> None:
    traffics, places, window_T, windows = replay(case, mode)
    location_T = case.source_T
    for layer, traffic in enumerate(traffics):
        wanted = count_layer(case, mode, layer, location_T, window_T, windows)
        for name, found in (("legs", traffic.legs_WRR), ("returns", traffic.returns_WRR)):
            assert len(found) == len(wanted[name])
            for one, other in zip(found, wanted[name], strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{name} of layer {layer}")
        np.testing.assert_array_equal(traffic.tokens_WP, wanted["tokens"])
        np.testing.assert_array_equal(traffic.home_WR, wanted["home"])
        totals = (traffic.ranks_touched, traffic.nodes_touched, traffic.pairs, traffic.placed_tokens)
        assert totals == wanted["totals"]
        np.testing.assert_array_equal(places[layer], wanted["after"])
        location_T = wanted["after"]


@pytest.mark.parametrize("mode", DISPATCH_MODES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_tokens_and_copies_are_conserved(mode: str, case: Case) -> None:
    traffics, places, _, _ = replay(case, mode)
    tokens = case.expert_LTK.shape[1]
    for layer, traffic in enumerate(traffics):
        assert traffic.tokens_WP.sum() == traffic.pairs == (case.expert_LTK[layer] < case.plan.num_experts).sum()
        assert traffic.home_WR.sum() == tokens
        for leg in (*traffic.legs_WRR, *traffic.returns_WRR):
            assert (leg >= 0).all()
            assert (np.diagonal(leg, axis1=1, axis2=2) == 0).all(), "a rank sends nothing to itself"
        # what goes out comes back, except where tokens stay where they were
        if mode != "coherent":
            assert sum(leg.sum() for leg in traffic.legs_WRR) == sum(leg.sum() for leg in traffic.returns_WRR)
            np.testing.assert_array_equal(places[layer], case.source_T)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_modes_are_ordered_by_what_they_send(case: Case) -> None:
    """De-duplication never adds copies, and per_node sends no more over the network than per_rank."""
    by_mode = {mode: replay(case, mode)[0] for mode in DISPATCH_MODES}
    node_R = case.cluster.node_R
    away_RR = node_R[:, None] != node_R[None, :]
    for layer in range(len(case.expert_LTK)):
        copies = {mode: sum(leg.sum() for leg in traffics[layer].legs_WRR) for mode, traffics in by_mode.items()}
        assert copies["per_rank"] <= copies["per_expert"]
        assert copies["per_rank"] <= copies["allgather"]
        across = {m: sum((leg * away_RR).sum() for leg in by_mode[m][layer].legs_WRR) for m in ("per_rank", "per_node")}
        assert across["per_node"] <= across["per_rank"]
        assert (by_mode["per_node"][layer].legs_WRR[1] * away_RR).sum() == 0, "the second leg stays inside nodes"


def test_top_1_coherent_is_one_all_to_all() -> None:
    """ExFlow: with k = 1 nothing returns."""

    @settings(max_examples=30, deadline=None)
    @given(case=cases())
    def law(case: Case) -> None:
        one = Case(**{**vars(case), "expert_LTK": case.expert_LTK[:, :, :1]})
        for traffic in replay(one, "coherent")[0]:
            assert traffic.returns_WRR[0].sum() == 0

    law()


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_iterate_layers_carries_locations(case: Case) -> None:
    traffics, _, window_T, windows = replay(case, case.plan.mode)
    for one, other in zip(
        iterate_layers(case.plan, case.plan.mode, case.expert_LTK, case.source_T, window_T, windows),
        traffics,
        strict=True,
    ):
        for a, b in zip(one.legs_WRR, other.legs_WRR, strict=True):
            np.testing.assert_array_equal(a, b)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 6).map(lambda n: n * 1000), min_size=1, max_size=30), ranks=st.integers(1, 4))
def test_source_ranks_deal_requests_in_order_of_their_ids(ids: list[int], ranks: int) -> None:
    source_T = source_ranks(np.array(ids, dtype=np.int32), ranks)
    order = sorted(set(ids))
    if len(order) < ranks:
        assert source_T.tolist() == [token % ranks for token in range(len(ids))]
        return
    assert source_T.tolist() == [order.index(request) % ranks for request in ids]
