"""Whole layers in every mode, algorithm and degree, with ranks that are threads: right, and as the core counts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.core.dispatch import assign_layer, layer_traffic
from placer.core.modes import DISPATCH_MODES
from placer.core.schedule import SCHEDULED_MODES, chunk_index, expand_leg
from placer.execute.dispatch import SHIPMENTS, Carriage, fabric, run_layer
from placer.execute.dispatch.coherent import Coherent
from placer.execute.dispatch.layer import COMBINE, DISPATCH, EXPERTS, chunk_bounds
from placer.execute.experts import ExpertWeights, grouped_ffn
from placer.execute.reference import attention_stand_in, hidden_states, moe_layer

HIDDEN, INNER = 16, 8
WAYS = [
    (mode, algorithm)
    for mode in DISPATCH_MODES
    for algorithm in ("linear", "2dh", "rounds")
    if algorithm == "linear" or mode in SCHEDULED_MODES
]
NODES = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 4), (8, 2)]


def make_case(helpers, seed, ranks, per_node, tokens, top_k, mode, choice, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(top_k, 10))
    per_rank = -(-experts // ranks) + int(rng.integers(3))
    empty = (ranks - 1,) if ranks > 1 and (ranks - 1) * per_rank >= experts else ()
    row = helpers.random_slots(rng, experts, ranks, per_rank, empty_ranks=empty)
    plan = helpers.make_plan([row], experts=experts, ranks=ranks, ranks_per_node=per_node, replica_choice=choice)
    expert_TK = helpers.random_routing(rng, 1, tokens, top_k, experts)[0]
    source_T = rng.choice(rng.permutation(ranks)[: int(rng.integers(1, ranks + 1))], size=tokens)
    slot_TK, slots = assign_layer(plan, 0, expert_TK, source_T, np.arange(tokens))
    expert_weights = [
        ExpertWeights(*(torch.from_numpy((rng.random(shape) - 0.5).astype(np.float32)).to(dtype) for shape in shapes))
        for shapes in [((2 * INNER, HIDDEN), (HIDDEN, INNER))] * experts
    ]
    return {
        "mode": mode,
        "ranks": ranks,
        "per_node": per_node,
        "plan": plan,
        "slots": slots,
        "source_T": source_T,
        "expert_TK": np.where(slot_TK >= 0, expert_TK, -1),
        "slot_TK": slot_TK,
        "weight_TK": torch.from_numpy(rng.random((tokens, top_k)).astype(np.float32)),
        "x_TH": torch.from_numpy(hidden_states(seed, np.arange(tokens), HIDDEN)).to(dtype),
        "experts": expert_weights,
        "rounds": helpers.random_rounds(rng, ranks),
    }


def run_case(helpers, monkeypatch, case, algorithm, degree):
    """Sums and residual streams in the token order given, where each token ends, and the spans of each rank."""
    threads = helpers.ThreadRanks(case["ranks"])
    per_rank = case["plan"].slots_per_rank
    held_RP = case["plan"].slot_expert_LP[0].reshape(case["ranks"], per_rank)
    rounds = case["rounds"] if algorithm == "rounds" else None
    carriage = Carriage(algorithm, rounds, rounds and rounds.transposed())
    slot_TK = torch.from_numpy(case["slot_TK"])

    def one(rank):
        place = threads.fabric(case["per_node"])
        own_T = np.flatnonzero(case["source_T"] == rank)
        shipments = []
        for a, b in pairwise(chunk_bounds(len(own_T), degree)):
            at = torch.from_numpy(own_T[a:b])
            inputs = (place, carriage, case["x_TH"][at], slot_TK[at], case["weight_TK"][at], per_rank)
            if case["mode"] == "coherent":
                shipments.append(Coherent(*inputs, name_T=at, norm=attention_stand_in))
            else:
                shipments.append(SHIPMENTS[case["mode"]](*inputs))
        held = [case["experts"][e] if e >= 0 else None for e in held_RP[rank]]
        sums, spans = run_layer(
            shipments, lambda rows, rows_P: grouped_ffn(rows, rows_P, held), helpers.InlineLanes(), 0
        )
        if case["mode"] != "coherent":
            return own_T, torch.cat(sums), case["x_TH"][own_T], spans
        names = torch.cat([shipment.name_M for shipment in shipments]).numpy()
        return names, torch.cat(sums), torch.cat([shipment.residual_MH for shipment in shipments]), spans

    with monkeypatch.context() as patch:
        patch.setattr(fabric, "dist", threads)
        results = threads.run(one)
    sum_TH, residual_TH = (torch.full_like(case["x_TH"], float("nan")) for _ in range(2))
    after_T = np.full(len(sum_TH), -1)
    for rank, (at, sums, residuals, _) in enumerate(results):
        sum_TH[at], residual_TH[at], after_T[at] = sums, residuals, rank
    return sum_TH, residual_TH, after_T, [spans for *_, spans in results]


def reference(case):
    rank_TK = torch.from_numpy(np.where(case["slot_TK"] >= 0, case["slot_TK"] // case["plan"].slots_per_rank, -1))
    return moe_layer(
        attention_stand_in(case["x_TH"]) if case["mode"] == "coherent" else case["x_TH"],
        torch.from_numpy(case["expert_TK"]),
        case["weight_TK"],
        case["experts"].__getitem__,
        rank_TK=None if case["mode"] == "per_expert" else rank_TK,
        ranks_per_node=case["per_node"] if case["mode"] == "per_node" else None,
    )


def expected_spans(case, algorithm, degree):
    """[(phase, sent_R, received_R, tokens_R)] of one layer, from the core's traffic and its rewriting into legs."""
    tokens, ranks = len(case["source_T"]), case["ranks"]
    chunk_T = chunk_index(case["source_T"], np.zeros(tokens, dtype=np.int64), ranks, degree)
    traffic, after_T = layer_traffic(case["slots"], case["mode"], case["slot_TK"], case["source_T"], chunk_T, degree)
    rounds = case["rounds"] if algorithm == "rounds" else None
    two_level = degree > 1 and ranks > case["per_node"] and (algorithm == "2dh" or case["mode"] == "per_node")
    ways = {}
    for phase, legs, order in (
        (DISPATCH, traffic.legs_WRR, rounds),
        (COMBINE, traffic.returns_WRR, rounds and rounds.transposed()),
    ):
        parts = [part for leg in legs for part in expand_leg(leg, algorithm, case["per_node"], order)]
        groups = parts if two_level else [sum(parts, np.zeros_like(legs[0]))]
        ways[phase] = [
            (phase, group[c].sum(axis=1).tolist(), group[c].sum(axis=0).tolist(), group[c].sum(axis=1).tolist())
            for c in range(degree)
            for group in groups
        ]
    none = [0] * ranks
    pairs_DR = traffic.tokens_WP.reshape(degree, ranks, -1).sum(axis=2)
    experts = [(EXPERTS, none, none, pairs_R.tolist()) for pairs_R in pairs_DR]
    return [*ways[DISPATCH], *experts, *ways[COMBINE]], after_T


def check(helpers, monkeypatch, case, algorithm, degree, tolerance):
    sum_TH, residual_TH, after_T, spans_R = run_case(helpers, monkeypatch, case, algorithm, degree)
    right_TH = reference(case)
    if helpers.rows_are_independent(HIDDEN, 2 * INNER, case["x_TH"].dtype):
        assert torch.equal(sum_TH, right_TH)
    torch.testing.assert_close(sum_TH, right_TH, rtol=tolerance, atol=tolerance)
    assert torch.equal(residual_TH, case["x_TH"])
    expected, expected_after_T = expected_spans(case, algorithm, degree)
    np.testing.assert_array_equal(after_T, expected_after_T)
    for index, (phase, sent_R, received_R, tokens_R) in enumerate(expected):
        found = [(s[index].phase, s[index].sent, s[index].received, s[index].tokens) for s in spans_R]
        assert found == [(phase, *counts) for counts in zip(sent_R, received_R, tokens_R, strict=True)]
    assert all(len(spans) == len(expected) for spans in spans_R)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    nodes=st.sampled_from(NODES),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    degree=st.integers(1, 4),
    choice=st.sampled_from(["visit_first", "nearest", "round_robin"]),
)
@pytest.mark.parametrize(("mode", "algorithm"), WAYS)
def test_any_plan_is_right_and_moves_what_the_core_counts(
    helpers, monkeypatch, mode, algorithm, seed, nodes, tokens, top_k, degree, choice
):
    case = make_case(helpers, seed, *nodes, tokens, top_k, mode, choice)
    check(helpers, monkeypatch, case, algorithm, 1 if mode == "allgather" else degree, 1e-5)


@pytest.mark.parametrize(("mode", "algorithm"), WAYS)
def test_bfloat16_travels_and_sums_in_order(helpers, monkeypatch, mode, algorithm):
    case = make_case(helpers, 3, 4, 2, 60, 3, mode, "visit_first", torch.bfloat16)
    check(helpers, monkeypatch, case, algorithm, 1 if mode == "allgather" else 2, 0.03)


@given(tokens=st.integers(0, 70), degree=st.integers(1, 64))
def test_chunks_are_cut_where_the_core_cuts(tokens, degree):
    chunk_T = chunk_index(np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=np.int64), 1, degree)
    assert np.diff(chunk_bounds(tokens, degree)).tolist() == np.bincount(chunk_T, minlength=degree).tolist()


def test_coherent_of_top_1_needs_no_way_back(helpers, monkeypatch):
    """ExFlow's case: each token answers itself where it stays, so combine moves nothing."""
    case = make_case(helpers, 1, 4, 2, 40, 1, "coherent", "visit_first")
    *_, spans_R = run_case(helpers, monkeypatch, case, "linear", 1)
    assert sum(span.sent for spans in spans_R for span in spans if span.phase == DISPATCH) > 0
    assert all(span.sent == span.received == 0 for spans in spans_R for span in spans if span.phase == COMBINE)
