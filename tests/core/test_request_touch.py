"""Touches per request: by hand, token by token, and against the judge's own count of copies."""

import numpy as np
import pytest
from core_cases import Case, cases, make_cluster, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import MismatchError, UsageError
from placer.core.evaluate import evaluate
from placer.core.homes import first_tokens, request_tokens, request_touch


def test_by_hand() -> None:
    # ranks {0, 1} and {2, 3}; request 1 has the tokens 0 and 2
    plan = make_plan([[0, 1, 2, 3], [0, 2, 1, 3]], make_cluster(1, 2), experts=4)
    expert_LTK = np.array([[[0, 1], [0, 2], [3, 255]], [[0, 1], [0, 2], [255, 255]]], dtype=np.uint8)
    touch_LQR = request_touch(plan, expert_LTK, np.array([1, 0, 1]), 3)
    assert touch_LQR.dtype == np.int32
    assert touch_LQR.tolist() == [[[1, 1], [1, 1], [0, 0]], [[1, 0], [1, 1], [0, 0]]]


@settings(max_examples=40, deadline=None)
@given(cases(replicas=False), st.integers(0, 1000))
def test_homes_save_the_copies_that_the_touches_say(case: Case, seed: int) -> None:
    plan = make_plan(case.plan.slot_expert_LP, case.cluster, case.plan.num_experts, mode="per_rank")
    tokens = case.expert_LTK.shape[1]
    rng = np.random.default_rng(seed)
    index_T = rng.integers(0, 3, size=tokens)
    home_Q = rng.integers(0, plan.num_ranks, size=3)
    touch_LQR = request_touch(plan, case.expert_LTK, index_T, 3)
    judged = evaluate(plan, case.model, case.cluster, case.expert_LTK, home_Q[index_T].astype(np.int64))
    placed = int((case.expert_LTK < plan.num_experts).any(axis=2).sum())
    saved = (judged.ranks_touched - judged.copies_sent) * max(1, placed)
    assert touch_LQR.sum(axis=0)[np.arange(3), home_Q].sum() == pytest.approx(saved)
    assert touch_LQR.sum() == pytest.approx(judged.ranks_touched * max(1, placed))


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_touches_are_counted_token_by_token(case: Case, seed: int) -> None:
    index_T = np.random.default_rng(seed).integers(0, 4, size=case.expert_LTK.shape[1])
    whole_LQR = request_touch(case.plan, case.expert_LTK, index_T, 4)
    tokens_Q = request_tokens(index_T, 4)
    assert (whole_LQR >= 0).all()
    assert (whole_LQR <= tokens_Q[None, :, None]).all()
    hit_LT = (case.expert_LTK < case.plan.num_experts).any(axis=2)
    hit_LQ = np.stack([np.bincount(index_T, weights=row, minlength=4) for row in hit_LT])
    assert (whole_LQR.sum(axis=2) >= hit_LQ).all()
    # without replicas on the rank, a rank is touched by at most the tokens that chose one of its experts
    for layer, row in enumerate(case.plan.slot_expert_LP):
        for rank, held in enumerate(row.reshape(case.plan.num_ranks, -1)):
            chose_T = np.isin(case.expert_LTK[layer], held[held >= 0]).any(axis=1)
            assert (whole_LQR[layer, :, rank] <= np.bincount(index_T, weights=chose_T, minlength=4)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 6))
def test_first_tokens_are_the_first_of_each_request(requests: list[int], count: int) -> None:
    first_T = first_tokens(np.array(requests, dtype=np.int32), count)
    assert first_T.tolist() == [requests[:token].count(request) < count for token, request in enumerate(requests)]


def test_what_does_not_fit_is_refused() -> None:
    plan = make_plan([[0, 1, 2, 3]], make_cluster(1, 2), experts=4)
    ids = np.zeros((1, 2, 1), dtype=np.uint8)
    with pytest.raises(MismatchError, match="2 MoE layers, the plan 1"):
        request_touch(plan, np.zeros((2, 2, 1), dtype=np.uint8), np.array([0, 0]), 1)
    with pytest.raises(UsageError, match="one index for each of 2"):
        request_touch(plan, ids, np.array([0]), 1)
    with pytest.raises(UsageError, match="give 0 to 0"):
        request_tokens(np.array([0, 1]), 1)
    with pytest.raises(UsageError, match="count is -1"):
        first_tokens(np.array([0]), -1)
