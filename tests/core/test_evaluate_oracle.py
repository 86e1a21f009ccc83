"""evaluate against a count token by token, and evaluate_profile against evaluate.

Legend: L sites, T tokens, K top-k, W windows, R ranks.
"""

import dataclasses
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from core_cases import (
    UNSET,
    Case,
    cases,
    count_profile,
    legal_row,
    load_profile_of,
    make_cluster,
    make_model,
    make_plan,
    random_experts,
    reference_windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cost import closed_form_ns, gather_copies, leg_times
from placer.core.dispatch import assign_layer, layer_traffic
from placer.core.errors import MismatchError
from placer.core.evaluate import Evaluation, evaluate, par, window_index
from placer.core.evaluate_profile import evaluate_profile
from placer.core.modes import DISPATCH_MODES


def judge(case: Case, **changes) -> Evaluation:
    return evaluate(
        case.plan,
        case.model,
        case.cluster,
        case.expert_LTK,
        case.source_T,
        window_tokens=case.window_tokens,
        batch_tokens=case.batch_tokens,
        **changes,
    )


def rank_of_pairs(case: Case) -> list[list[list[int]]]:
    """[layer][token]: the ranks that serve its experts, with repeats; a token of `coherent` mode stays where it was."""
    result: list[list[list[int]]] = []
    home_T = case.source_T.copy()
    for layer in range(len(case.expert_LTK)):
        tokens = np.arange(case.expert_LTK.shape[1])
        slot_TK, slots = assign_layer(case.plan, layer, case.expert_LTK[layer], home_T, tokens)
        result.append([[int(slots.rank_P[p]) for p in row if p >= 0] for row in slot_TK])
        if case.plan.mode == "coherent":
            home_T = np.array([visits[0] if visits else home for visits, home in zip(result[-1], home_T, strict=True)])
    return result


def max_over_mean(loads: dict[int, int], ranks: int) -> float:
    total = sum(loads.values())
    return max(loads.values()) / (total / ranks) if total else 1.0


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_figures_are_what_counting_gives(case: Case) -> None:
    found = judge(case)
    ranks_LT = rank_of_pairs(case)
    ranks, per_node = case.plan.num_ranks, case.plan.ranks_per_node
    window_T = reference_windows(case.expert_LTK.shape[1], case.window_tokens)
    placed = [visits for layer in ranks_LT for visits in layer if visits]
    assert found.tokens == case.expert_LTK.shape[1]
    assert found.ranks_touched == pytest.approx(sum(len(set(v)) for v in placed) / max(1, len(placed)), abs=1e-12)
    nodes = sum(len({rank // per_node for rank in v}) for v in placed) / max(1, len(placed))
    assert found.nodes_touched == pytest.approx(nodes, abs=1e-12)
    pooled, windowed = [], []
    for layer in ranks_LT:
        total: dict[int, int] = defaultdict(int)
        by_window: dict[int, dict[int, int]] = {window: defaultdict(int) for window in window_T}
        for token, visits in enumerate(layer):
            for rank in visits:
                total[rank] += 1
                by_window[window_T[token]][rank] += 1
        pooled.append(max_over_mean(total, ranks))
        windowed += [max_over_mean(loads, ranks) for loads in by_window.values()]
    assert found.par == pytest.approx(np.mean(pooled), abs=1e-12)
    assert found.par_max == pytest.approx(max(pooled), abs=1e-12)
    assert found.par_window_mean == pytest.approx(np.mean(windowed), abs=1e-12)
    assert found.par_window_p99 == pytest.approx(np.quantile(windowed, 0.99), abs=1e-12)
    local = pairs = 0
    for before, after in pairwise(ranks_LT):
        for one, other in zip(before, after, strict=True):
            pairs += len(one) * len(other)
            local += sum(a == b for a in one for b in other)
    assert found.kept == pytest.approx(local / pairs if pairs else 1.0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_times_are_closed_forms_of_each_batch(case: Case) -> None:
    """Every batch by itself, as a trace of its own, for all modes at once."""
    found = judge(case, modes=DISPATCH_MODES)
    batch_T = np.array(reference_windows(case.expert_LTK.shape[1], case.batch_tokens))
    tokens = np.arange(len(batch_T))
    assert set(found.iteration_us) == set(DISPATCH_MODES)
    for mode in DISPATCH_MODES:
        totals, serving, everyone_T = [], [], case.source_T
        for layer, expert_TK in enumerate(case.expert_LTK):
            home_T = everyone_T if mode == "coherent" else case.source_T
            serving.append(assign_layer(case.plan, layer, expert_TK, home_T, tokens))
            _, everyone_T = layer_traffic(serving[-1][1], mode, serving[-1][0], everyone_T, tokens * 0, 1)
        for batch in range(batch_T.max() + 1):
            pick = np.flatnonzero(batch_T == batch)
            location_T, total = case.source_T[pick], 0
            for layer in range(len(case.expert_LTK)):
                slot_TK, slots = serving[layer]
                zero_T = np.zeros(len(pick), dtype=np.int64)
                traffic, location_T = layer_traffic(slots, mode, slot_TK[pick], location_T, zero_T, 1)
                phases = closed_form_ns(case.cluster, case.model, traffic)
                total += sum(int(duration_W[0]) for duration_W in phases.values())
            if mode == "coherent":
                # the all-gather starts where the tokens are at the end
                home_WR = np.bincount(location_T, minlength=case.plan.num_ranks)[None]
                total += int(leg_times(case.cluster, gather_copies(home_WR), case.model.token_bytes).slowest_W[0])
            totals.append(total)
        assert found.iteration_us[mode] == pytest.approx(np.mean(totals) / 1e3, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_copies_sent_are_those_of_the_plans_mode(case: Case) -> None:
    found = judge(case)
    ranks_LT = rank_of_pairs(case)
    placed = sum(bool(visits) for layer in ranks_LT for visits in layer)
    if case.plan.mode == "per_expert":
        copies = sum(r != s for layer in ranks_LT for v, s in zip(layer, case.source_T, strict=True) for r in v)
    elif case.plan.mode == "per_rank":
        copies = sum(r != s for layer in ranks_LT for v, s in zip(layer, case.source_T, strict=True) for r in set(v))
    elif case.plan.mode == "allgather":
        copies = len(ranks_LT) * len(case.source_T) * (case.plan.num_ranks - 1)
    else:
        return
    assert found.copies_sent == pytest.approx(copies / max(1, placed), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(case=cases(replicas=False))
def test_the_profile_alone_gives_the_same_figures_without_replicas(case: Case) -> None:
    exact, counted = judge(case), evaluate_profile(case.plan, count_profile(case))
    for field in dataclasses.fields(counted):
        assert getattr(counted, field.name) == pytest.approx(getattr(exact, field.name), abs=1e-12), field.name


def test_layers_with_fewer_routed_tokens_weigh_less_in_both() -> None:
    """Layer 0 routes 3 tokens to two ranks each, layer 1 one token to one rank: 7 visits of 4 tokens."""
    cluster = make_cluster(1, 2)
    plan = make_plan([[0, 1, 2, 3]] * 2, cluster, 4)
    expert_LTK = np.array([[[0, 2]] * 3, [[0, 1], [UNSET] * 2, [UNSET] * 2]], dtype=np.uint8)
    case = Case(plan, make_model(2, 4), cluster, expert_LTK, np.zeros(3, dtype=int), 8, 8)
    assert judge(case).ranks_touched == 7 / 4
    assert evaluate_profile(plan, count_profile(case)).ranks_touched == 7 / 4


def test_a_sampled_layer_weighs_as_many_tokens_as_it_has() -> None:
    """Layer 0: one sampled token of 4 touches two ranks; layer 1: all of 4 touch one. Mean 1.5, not 6 / 5."""
    cluster = make_cluster(1, 2)
    plan = make_plan([[0, 1, 2, 3]] * 2, cluster, 4)
    expert_LTK = np.array([[[0, 2]] * 4, [[0, 1]] * 4], dtype=np.uint8)
    profile = count_profile(Case(plan, make_model(2, 4), cluster, expert_LTK, np.zeros(4, dtype=int), 8, 8))
    sampled = dataclasses.replace(profile.sets[0], weight_H=np.array([1]), coverage=0.25)
    profile = dataclasses.replace(profile, sets=(sampled, profile.sets[1]))
    assert evaluate_profile(plan, profile).ranks_touched == 1.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 4), slots_per_rank=st.integers(2, 4))
def test_a_profile_of_counts_shares_loads_as_the_plan_says(seed: int, ranks: int, slots_per_rank: int) -> None:
    """Also where EPLB put an expert on a rank twice: each slot carries its share."""
    rng = np.random.default_rng(seed)
    experts = ranks * slots_per_rank - 1
    cluster, model = make_cluster(1, ranks), make_model(1, experts)
    row = np.append(np.arange(experts), rng.integers(experts))
    load_E = rng.integers(0, 100, experts)
    result = evaluate_profile(make_plan([row], cluster, experts), load_profile_of(load_E[None, None], model))
    load_R = np.zeros(ranks)
    for slot, expert in enumerate(row):
        load_R[slot // slots_per_rank] += load_E[expert] / np.count_nonzero(row == expert)
    assert result.par == pytest.approx(load_R.max() / load_R.mean() if load_R.sum() else 1.0, abs=1e-12)
    assert (result.ranks_touched, result.nodes_touched, result.kept) == (None, None, None)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_counting_estimates_stay_in_range_with_replicas(case: Case) -> None:
    result = evaluate_profile(case.plan, count_profile(case))
    most, close = min(case.plan.num_ranks, case.expert_LTK.shape[2]), 1e-9
    assert 0 <= result.nodes_touched <= result.ranks_touched + close <= most + 2 * close
    assert 1 - close <= result.par <= result.par_max + close <= case.plan.num_ranks + 2 * close
    assert -close <= result.kept <= 1 + close


def test_a_heavy_set_is_not_sent_to_one_replica_as_a_whole() -> None:
    """Both experts on both ranks, every token chooses both: tokens spread over the ranks, so PAR is near 1.

    The replay of 4,000 tokens leaves it below 1.08 by five standard deviations. Counts know one set only: a few draws
    for it are an estimate, but one draw for all its tokens would be PAR 2.
    """
    cluster = make_cluster(1, 2)
    plan = make_plan([[0, 1, 0, 1]], cluster, 2)
    expert_LTK = np.zeros((1, 4000, 2), dtype=np.uint8)
    expert_LTK[:, :, 1] = 1
    nowhere_near = np.arange(4000) % 2
    case = Case(plan, make_model(1, 2), cluster, expert_LTK, nowhere_near, 4000, 4000)
    assert judge(case).par < 1.08
    assert evaluate_profile(plan, count_profile(case)).par < 1.6


def test_no_tokens_at_all() -> None:
    cluster = make_cluster(1, 2)
    case = Case(make_plan([[0, 1]], cluster, 2), make_model(1, 2), cluster, np.zeros((1, 0, 1), np.uint8),
                np.zeros(0, dtype=np.int64), 4, 4)  # fmt: skip
    result = judge(case)
    assert (result.tokens, result.ranks_touched, result.par, result.kept) == (0, 0.0, 1.0, 1.0)


def test_a_layer_without_experts_is_balanced() -> None:
    assert par(np.zeros((3, 4))).tolist() == [1.0, 1.0, 1.0]
    assert par(np.array([3, 1, 0, 0])) == 3.0


@settings(deadline=None)
@given(tokens=st.integers(0, 60), window_tokens=st.integers(1, 20))
def test_windows_are_whole_but_for_the_last(tokens: int, window_tokens: int) -> None:
    window_T, windows = window_index(tokens, window_tokens)
    assert window_T.tolist() == reference_windows(tokens, window_tokens)[:tokens]
    assert windows == max([0, *reference_windows(tokens, window_tokens)]) + 1


def shapes() -> tuple:
    cluster = make_cluster(2, 2)
    rng = np.random.default_rng(0)
    plan = make_plan([legal_row(8, 4, 2, rng)] * 2, cluster, 8)
    return plan, make_model(2, 8), cluster, random_experts(rng, (2, 10, 2), 8, 0.0), rng.integers(0, 4, 10)


def test_a_trace_of_other_layers_is_refused() -> None:
    plan, model, cluster, expert_LTK, source_T = shapes()
    with pytest.raises(MismatchError, match="the trace has 1 MoE layers, the plan 2"):
        evaluate(plan, model, cluster, expert_LTK[:1], source_T)
    with pytest.raises(MismatchError, match="the plan has 2 MoE layers of 8 experts, the profile 1 of 8"):
        evaluate_profile(plan, load_profile_of(np.ones((1, 1, 8)), make_model(1, 8)))
    with pytest.raises(MismatchError, match="the plan has 2 MoE layers of 8 experts, the profile 2 of 6"):
        evaluate_profile(plan, load_profile_of(np.ones((1, 2, 6)), make_model(2, 6)))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (2, 3)])
def test_a_cluster_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    plan, model, _, expert_LTK, source_T = shapes()
    with pytest.raises(MismatchError, match="the plan is for 4 ranks, 2 a node"):
        evaluate(plan, model, make_cluster(*shape), expert_LTK, source_T)
