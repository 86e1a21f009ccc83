"""Dispatch, experts and combine with ranks that are threads: equal to the reference for any plan and any routing."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.core.dispatch import assign_layer, layer_traffic
from placer.execute.dispatch import ROW_MULTIPLE, combine, dispatch, fabric, weighted_sum
from placer.execute.dispatch.rows import expert_rows, fan_out, pack, unpack
from placer.execute.experts import ExpertWeights, grouped_ffn, swiglu
from placer.execute.job import metadata_bytes
from placer.execute.reference import attention_stand_in, hidden_states, moe_layer

HIDDEN, INNER = 16, 8


def random_experts(rng, count, hidden=HIDDEN, inner=INNER, dtype=torch.float32):
    def matrix(rows, columns):
        return torch.from_numpy((rng.random((rows, columns)) - 0.5).astype(np.float32)).to(dtype)

    return [ExpertWeights(matrix(2 * inner, hidden), matrix(hidden, inner)) for _ in range(count)]


def run_layer(helpers, monkeypatch, case):
    """Outputs of one layer in the token order given, and each rank's metadata, with one thread per rank."""
    ranks = helpers.ThreadRanks(case["ranks"])
    per_rank = case["plan"].slots_per_rank
    local_slots = case["plan"].slot_expert_LP[0].reshape(case["ranks"], per_rank)

    def one(rank):
        own = np.flatnonzero(case["source_T"] == rank)
        x_TH, slot_TK, weight_TK = case["x_TH"][own], case["slot_TK"][own], case["weight_TK"][own]
        rows_XH, rows_P, metadata = dispatch(x_TH, slot_TK, weight_TK, mode=case["mode"], slots_per_rank=per_rank)
        held = [case["experts"][e] if e >= 0 else None for e in local_slots[rank]]
        return own, combine(grouped_ffn(rows_XH, rows_P, held), metadata), metadata

    with monkeypatch.context() as patch:
        patch.setattr(fabric, "dist", ranks)
        results = ranks.run(one)
    y_TH = torch.full_like(case["x_TH"], float("nan"))
    for own, own_y_TH, _ in results:
        y_TH[own] = own_y_TH
    return y_TH, [metadata for _, _, metadata in results]


def make_case(
    helpers, seed, *, ranks, experts, per_rank, tokens, top_k, mode, choice="visit_first", dtype=torch.float32
):
    rng = np.random.default_rng(seed)
    plan = helpers.make_plan(
        [helpers.random_slots(rng, experts, ranks, per_rank)], experts=experts, ranks=ranks, replica_choice=choice
    )
    expert_TK = helpers.random_routing(rng, 1, tokens, top_k, experts)[0]
    source_T = rng.integers(ranks, size=tokens)
    slot_TK, slots = assign_layer(plan, 0, expert_TK, source_T, np.arange(tokens))
    return {
        "ranks": ranks,
        "mode": mode,
        "plan": plan,
        "slots": slots,
        "source_T": source_T,
        "expert_TK": torch.from_numpy(expert_TK),
        "slot_TK": torch.from_numpy(slot_TK),
        "weight_TK": torch.from_numpy(rng.random((tokens, top_k)).astype(np.float32)),
        "x_TH": torch.from_numpy(hidden_states(seed, np.arange(tokens), HIDDEN)).to(dtype),
        "experts": random_experts(rng, experts, dtype=dtype),
    }


def reference(case):
    rank_TK = torch.where(case["slot_TK"] >= 0, case["slot_TK"] // case["plan"].slots_per_rank, -1)
    return moe_layer(
        case["x_TH"],
        case["expert_TK"],
        case["weight_TK"],
        case["experts"].__getitem__,
        rank_TK=rank_TK if case["mode"] == "per_rank" else None,
    )


def oracle(case):
    """The definition, token by token, in float64."""
    y_TH = np.zeros(case["x_TH"].shape)
    for t, (x, experts, weights) in enumerate(zip(case["x_TH"], case["expert_TK"], case["weight_TK"], strict=True)):
        for e, w in zip(experts.tolist(), weights.tolist(), strict=True):
            if e < 0:
                continue
            gate, up = np.split(case["experts"][e].gate_up_FH.double().numpy() @ x.double().numpy(), 2)
            inner = gate / (1 + np.exp(-gate)) * up
            y_TH[t] += w * (case["experts"][e].down_HI.double().numpy() @ inner)
    return y_TH


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    ranks=st.integers(1, 4),
    experts=st.integers(1, 8),
    spare=st.integers(0, 3),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    mode=st.sampled_from(["per_expert", "per_rank"]),
    choice=st.sampled_from(["visit_first", "nearest", "token_hash", "round_robin"]),
)
def test_any_plan_equals_the_reference_and_moves_what_the_core_counts(
    helpers, monkeypatch, seed, ranks, experts, spare, tokens, top_k, mode, choice
):
    case = make_case(
        helpers,
        seed,
        ranks=ranks,
        experts=experts,
        per_rank=-(-experts // ranks) + spare,
        tokens=tokens,
        top_k=min(top_k, experts),
        mode=mode,
        choice=choice,
    )
    y_TH, metadata = run_layer(helpers, monkeypatch, case)
    expected_TH = reference(case)
    if helpers.rows_are_independent(HIDDEN, 2 * INNER, torch.float32):
        assert torch.equal(y_TH, expected_TH)
    np.testing.assert_allclose(y_TH.numpy(), oracle(case), rtol=1e-5, atol=1e-6)

    traffic, _ = layer_traffic(
        case["slots"], mode, case["slot_TK"].numpy(), case["source_T"], np.zeros(tokens, dtype=np.int64), 1
    )
    sent_RR = sum(leg[0] for leg in traffic.legs_WRR)
    assert [m.sent for m in metadata] == sent_RR.sum(axis=1).tolist()
    assert [m.received for m in metadata] == sent_RR.sum(axis=0).tolist()
    assert [m.pairs for m in metadata] == traffic.tokens_WP[0].reshape(ranks, -1).sum(axis=1).tolist()


@pytest.mark.parametrize("mode", ["per_expert", "per_rank"])
def test_bfloat16_travels_and_sums_in_order(helpers, monkeypatch, mode):
    case = make_case(helpers, 3, ranks=4, experts=8, per_rank=3, tokens=100, top_k=3, mode=mode, dtype=torch.bfloat16)
    y_TH, _ = run_layer(helpers, monkeypatch, case)
    assert y_TH.dtype == torch.bfloat16
    if helpers.rows_are_independent(HIDDEN, 2 * INNER, torch.bfloat16):
        assert torch.equal(y_TH, reference(case))
    np.testing.assert_allclose(y_TH.float().numpy(), oracle(case), atol=0.03)


def test_a_wrong_weight_or_slot_is_seen(helpers, monkeypatch):
    """The comparison above can fail: one weight or one expert changed moves an output by far more than rounding."""
    case = make_case(helpers, 5, ranks=3, experts=6, per_rank=2, tokens=30, top_k=2, mode="per_rank")
    expected_TH = reference(case)
    token, column = torch.nonzero(case["slot_TK"] >= 0)[0].tolist()
    for name, value in (("weight_TK", case["weight_TK"][token, column] + 0.1), ("slot_TK", -1)):
        changed = {**case, name: case[name].clone()}
        changed[name][token, column] = value
        y_TH, _ = run_layer(helpers, monkeypatch, changed)
        assert not torch.allclose(y_TH[token], expected_TH[token], rtol=1e-3)


def test_one_copy_per_rank_against_one_per_expert(helpers, monkeypatch):
    """All experts of a token on one other rank: per_expert sends k copies, per_rank one."""
    plan = helpers.make_plan([[-1, -1, -1, 0, 1, 2]], experts=3, ranks=2)
    expert_TK = np.array([[0, 1, 2]] * 5)
    slot_TK, slots = assign_layer(plan, 0, expert_TK, np.zeros(5, dtype=np.int64), np.arange(5))
    rng = np.random.default_rng(0)
    case = {
        "ranks": 2,
        "plan": plan,
        "slots": slots,
        "source_T": np.zeros(5, dtype=np.int64),
        "expert_TK": torch.from_numpy(expert_TK),
        "slot_TK": torch.from_numpy(slot_TK),
        "weight_TK": torch.ones(5, 3),
        "x_TH": torch.from_numpy(hidden_states(0, np.arange(5), HIDDEN)),
        "experts": random_experts(rng, 3),
    }
    sent = {}
    for mode in ("per_expert", "per_rank"):
        _, metadata = run_layer(helpers, monkeypatch, {**case, "mode": mode})
        sent[mode] = metadata[0].sent
        assert metadata[1].pairs == 15
    assert sent == {"per_expert": 15, "per_rank": 5}


@given(slots=st.lists(st.integers(-1, 4), max_size=60))
def test_expert_rows_are_slot_by_slot_padded_and_stable(slots):
    slot_CK = torch.tensor(slots, dtype=torch.int64)[:, None]
    count_P = np.array([slots.count(p) for p in range(5)])
    x_CH = torch.arange(1.0, len(slots) + 1)[:, None]
    rows_XH, rows_P, row_CK = expert_rows(x_CH, slot_CK, count_P)
    assert all(rows % ROW_MULTIPLE == 0 and 0 <= rows - slots.count(p) < ROW_MULTIPLE for p, rows in enumerate(rows_P))
    starts = np.cumsum([0, *rows_P])
    assert len(rows_XH) == starts[-1] + 1
    for slot in range(5):
        mine = row_CK[slot_CK[:, 0] == slot, 0].tolist()
        assert mine == list(range(starts[slot], starts[slot] + len(mine)))
    taken = row_CK[slot_CK[:, 0] >= 0, 0]
    assert torch.equal(rows_XH[taken], x_CH[slot_CK[:, 0] >= 0])
    assert rows_XH.sum() == rows_XH[taken].sum()
    assert (row_CK[slot_CK[:, 0] < 0] == len(rows_XH) - 1).all()


@given(seed=st.integers(0, 99), rows=st.integers(0, 12), destinations=st.integers(1, 5))
def test_copies_fan_out_by_destination_and_find_their_way_back(seed, rows, destinations):
    touched_TD = torch.rand(rows, destinations, generator=torch.Generator().manual_seed(seed)) < 0.4
    pairs = [(d, t) for d in range(destinations) for t in range(rows) if touched_TD[t, d]]
    destination_C, row_C, back_TJ = fan_out(touched_TD, len(pairs), destinations)
    assert list(zip(destination_C.tolist(), row_C.tolist(), strict=True)) == pairs
    for t in range(rows):
        found = [copy for copy in back_TJ[t].tolist() if copy < len(pairs)]
        assert [pairs[copy] for copy in found] == [(d, t) for d in range(destinations) if touched_TD[t, d]]


@given(
    copies=st.integers(0, 5),
    top_k=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    named=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packing_a_copy_loses_nothing(copies, top_k, dtype, named, seed):
    generator = torch.Generator().manual_seed(seed)
    x_CH = torch.randn(copies, 6, generator=generator).to(dtype)
    slot_CK = torch.randint(-1, 300, (copies, top_k), generator=generator)
    weight_CK = torch.rand(copies, top_k, generator=generator)
    name_C = torch.randint(0, 1 << 30, (copies,), generator=generator) if named else None
    packed = pack(x_CH, slot_CK, weight_CK, name_C)
    mode = "coherent" if named else "per_rank"
    assert packed.shape == (copies, 6 * dtype.itemsize + metadata_bytes(mode, top_k))
    *found, name = unpack(packed, top_k, dtype, named=named)
    for one, given_ in zip(found, (x_CH, slot_CK, weight_CK), strict=True):
        assert torch.equal(one, given_)
    assert name is None if name_C is None else torch.equal(name, name_C)
    assert metadata_bytes("per_expert", top_k) == 0


def test_weighted_sum_adds_in_column_order():
    rows = torch.tensor([[1e8], [-1e8], [1.0], [0.0]])
    ones = torch.ones(1, 3)
    assert weighted_sum(rows, torch.tensor([[0, 1, 2]]), ones).item() == 1.0
    assert weighted_sum(rows, torch.tensor([[0, 2, 1]]), ones).item() == 0.0  # 1e8 + 1 rounds to 1e8 in float32
    assert weighted_sum(rows, torch.tensor([[2, 3, 3]]), None).item() == 1.0


def test_grouped_ffn_touches_only_experts_with_rows():
    rng = np.random.default_rng(0)
    experts = random_experts(rng, 2)
    x_XH = torch.from_numpy(hidden_states(0, np.arange(17), HIDDEN))
    out_XH = grouped_ffn(x_XH, [8, 0, 8], [experts[0], None, experts[1]])
    assert torch.equal(out_XH[:8], swiglu(x_XH[:8], experts[0]))
    assert torch.equal(out_XH[8:16], swiglu(x_XH[8:16], experts[1]))
    assert not out_XH[16].any()
    with pytest.raises(AssertionError, match="empty slot"):
        grouped_ffn(x_XH, [8, 8, 0], [experts[0], None, experts[1]])


def test_hidden_states_depend_on_seed_and_token_alone():
    whole = hidden_states(7, np.arange(2000), 48)
    np.testing.assert_array_equal(hidden_states(7, np.array([1999, 3]), 48), whole[[1999, 3]])
    assert not np.array_equal(hidden_states(8, np.arange(3), 48), whole[:3])
    assert abs(whole.mean()) < 0.01
    assert abs(whole.var() - 1) < 0.01
    assert len(np.unique(whole.astype(np.float64) @ np.arange(1, 49))) == 2000


def test_attention_stand_in_gives_rows_of_unit_mean_square():
    x_TH = torch.from_numpy(hidden_states(0, np.arange(9), 64)) * 5
    assert torch.allclose(attention_stand_in(x_TH).square().mean(dim=1), torch.ones(9), atol=1e-4)
