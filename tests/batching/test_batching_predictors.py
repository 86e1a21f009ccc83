"""Predictors against counting by hand, what is known of their accuracy, and the accuracy knob."""

from dataclasses import replace

import numpy as np
import pytest
from batching_cases import random_routes, seeds, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import BitLadder
from placer.core.errors import MismatchError, UsageError
from traces.device_work import decode_batches, device_work
from traces.predictors.fit import PREDICTORS, fit_predictor, predict
from traces.predictors.judge import corrupt, judge_prediction
from traces.predictors.repeat import repeat_token
from traces.predictors.work import level_shares, predicted_work
from traces.synthetic import synthesize

LADDER = BitLadder(bits_K=(2, 3, 4))


def case(seed=0, tokens=60, sites=3, experts=6, ragged=True):
    rng = np.random.default_rng(seed)
    expert_LTK = random_routes(rng, tokens, sites, experts)
    if ragged:
        expert_LTK[rng.random(expert_LTK.shape) < 0.1] = 255
    return trace_of(expert_LTK, experts, token_id_T=rng.integers(0, 9, tokens).astype(np.int32))


def best_by_hand(score, popularity, count):
    """The experts with the highest (score, popularity), lower ids first."""
    return sorted(range(len(score)), key=lambda e: (-score[e], -popularity[e], e))[:count]


def counts_by_hand(trace, site, wanted):
    """How often each expert is chosen by the tokens `wanted(token)` says."""
    count = [0] * trace.model.num_experts
    for token in range(trace.num_tokens):
        if wanted(token):
            for expert in trace.expert_LTK[site, token]:
                if expert != 255:
                    count[expert] += 1
    return count


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_tables_agree_with_counting_by_hand(seed):
    train = case(seed)
    test = case(seed + 1, tokens=20)
    test = replace(test, token_id_T=np.where(np.arange(20) < 4, 77, test.token_id_T).astype(np.int32))
    predicted = {kind: predict(fit_predictor(train, kind), test) for kind in PREDICTORS}
    for site in range(3):
        popular = counts_by_hand(train, site, lambda _: True)
        for token in range(20):
            baseline = best_by_hand(popular, popular, 2)
            assert predicted["popularity"][site, token].tolist() == baseline
            seen = counts_by_hand(train, site, lambda t, token=token: train.token_id_T[t] == test.token_id_T[token])
            assert predicted["token_id"][site, token].tolist() == best_by_hand(seen, popular, 2)
            score = [0] * 6
            for before in test.expert_LTK[site - 1, token] if site else ():
                if before != 255:
                    follow = counts_by_hand(
                        train, site, lambda t, site=site, before=before: before in train.expert_LTK[site - 1, t]
                    )
                    score = [a + b for a, b in zip(score, follow, strict=True)]
            assert predicted["transition"][site, token].tolist() == best_by_hand(score, popular, 2)


def test_a_token_id_that_was_never_seen_gets_the_popular_experts():
    train = case()
    unseen = replace(train, token_id_T=np.full(60, 1000, dtype=np.int32))
    assert np.array_equal(
        predict(fit_predictor(train, "token_id"), unseen), predict(fit_predictor(train, "popularity"), unseen)
    )


def routed_by_token_id(seed):
    """Routing that token ids decide in 9 of 10 tokens."""
    trace = synthesize(num_layers=4, num_experts=16, top_k=2, num_tokens=6000, num_requests=60, seed=seed)
    rng = np.random.default_rng(seed)
    token_id_T = rng.zipf(1.3, 6000).clip(max=500).astype(np.int32)
    table_LUK = random_routes(rng, 501, 4, 16)
    keep_T = rng.random(6000) < 0.9
    expert_LTK = np.where(keep_T[None, :, None], table_LUK[:, token_id_T], trace.expert_LTK)
    return replace(trace, expert_LTK=expert_LTK, token_id_T=token_id_T, known_sha256="")


@pytest.mark.parametrize("seed", range(3))
def test_predictors_find_what_decides_the_routing(seed):
    train, test = routed_by_token_id(seed).split_by_request(0.5, seed)
    pair = {kind: judge_prediction(predict(fit_predictor(train, kind), test), test).pair_L for kind in PREDICTORS}
    assert (pair["token_id"] > 0.8).all()
    assert (pair["token_id"] > pair["popularity"] + 0.2).all()
    train, test = synthesize(
        num_layers=4, num_experts=16, top_k=2, num_tokens=6000, num_requests=60, seed=seed, affinity=0.9
    ).split_by_request(0.5, seed)
    pair = {
        kind: judge_prediction(predict(fit_predictor(train, kind), test), test).pair_L
        for kind in ("popularity", "transition")
    }
    assert pair["transition"][0] == pair["popularity"][0]
    assert (pair["transition"][1:] > pair["popularity"][1:]).all()


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 1), st.sampled_from(["oracle", *PREDICTORS]))
def test_the_knob_sets_the_accuracy_exactly(seed, accuracy, source):
    trace = case(seed)
    predicted = trace.expert_LTK if source == "oracle" else predict(fit_predictor(trace, source), trace)
    changed = corrupt(predicted, trace, accuracy, np.random.default_rng(seed))
    for site in range(3):
        pairs = int((trace.expert_LTK[site] < 6).sum())
        found = judge_prediction(changed, trace).pair_L[site] * pairs
        assert found == pytest.approx(round(accuracy * pairs))
        for row in changed[site].tolist():
            real = [expert for expert in row if expert != 255]
            assert len(set(real)) == len(real)
            assert all(expert < 6 for expert in real)


def test_the_oracle_is_always_right_and_judged_so():
    trace = case()
    right = judge_prediction(trace.expert_LTK, trace, decode_batches(trace, 2))
    for share_L in (right.pair_L, right.recall_L, right.precision_L):
        assert (share_L == 1).all()
    blank = judge_prediction(np.full_like(trace.expert_LTK, 255), trace, decode_batches(trace, 2))
    assert (blank.pair_L == 0).all()
    assert (blank.recall_L == 0).all()
    assert (blank.precision_L == 1).all()


def test_recall_and_precision_by_hand():
    expert_LTK = np.array([[[0, 1], [2, 3], [0, 2]]], dtype=np.uint8)
    predicted = np.array([[[0, 4], [2, 0], [5, 255]]], dtype=np.uint8)
    found = judge_prediction(predicted, trace_of(expert_LTK, 6), [np.array([0, 1]), np.array([2])])
    assert found.pair_L[0] == 2 / 6
    # touched 0123 and 02, expected 024 and 5
    assert found.recall_L[0] == 2 / 6
    assert found.precision_L[0] == 2 / 4


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_predicted_work_counts_the_prediction_and_keeps_tokens(seed):
    trace = case(seed)
    bits_LTK = np.random.default_rng(seed).integers(2, 5, trace.expert_LTK.shape).astype(np.uint8)
    with_bits = replace(trace, bits_LTK=bits_LTK, known_sha256="")
    batches = decode_batches(trace, 3)
    predicted = predict(fit_predictor(trace, "transition"), trace)
    highest = predicted_work(device_work(trace, batches, LADDER), trace, batches, predicted, LADDER)
    for batch, index_T in enumerate(batches):
        for site in range(3):
            wanted = np.bincount(predicted[site, index_T][predicted[site, index_T] < 6], minlength=6)
            assert np.array_equal(highest.predicted_BLEK[batch, site, :, 2], wanted)
    assert not highest.predicted_BLEK[..., :2].any()
    work = device_work(with_bits, batches, LADDER)
    share_LEK = level_shares(with_bits, LADDER)
    assert np.allclose(share_LEK.sum(axis=-1), 1)
    spread = predicted_work(work, with_bits, batches, predicted, LADDER, share_LEK=share_LEK)
    assert np.array_equal(spread.predicted_BLEK.sum(axis=-1), highest.predicted_BLEK.sum(axis=-1))
    assert np.array_equal(spread.count_BLEK, work.count_BLEK)
    whole = predicted_work(
        device_work(with_bits, [np.arange(60)], LADDER), with_bits, [np.arange(60)], trace.expert_LTK, LADDER,
        share_LEK=share_LEK,
    )  # fmt: skip
    assert np.array_equal(whole.predicted_BLEK, whole.count_BLEK), "the shares of a trace are its own levels"


def test_what_does_not_belong_together_is_refused():
    trace = case()
    without = replace(trace, token_id_T=None, known_sha256="")
    with pytest.raises(UsageError, match="no token ids"):
        fit_predictor(without, "token_id")
    with pytest.raises(UsageError, match="no token ids"):
        predict(fit_predictor(trace, "token_id"), without)
    with pytest.raises(UsageError, match="predictor is 'crystal'"):
        fit_predictor(trace, "crystal")
    with pytest.raises(MismatchError, match="another model"):
        predict(fit_predictor(trace, "popularity"), case(experts=7))
    with pytest.raises(MismatchError, match="predict this trace"):
        judge_prediction(trace.expert_LTK[:, :3], trace)
    with pytest.raises(UsageError, match=r"accuracy is 1\.5"):
        corrupt(trace.expert_LTK, trace, 1.5, np.random.default_rng(0))
    batches = decode_batches(trace, 3)
    work = device_work(trace, batches, LADDER)
    with pytest.raises(MismatchError, match="1 batches"):
        predicted_work(work, trace, batches[:1], trace.expert_LTK, LADDER)
    bits = replace(trace, bits_LTK=np.full(trace.expert_LTK.shape, 2, dtype=np.uint8), known_sha256="")
    with pytest.raises(UsageError, match="either level or share_LEK"):
        predicted_work(work, bits, batches, trace.expert_LTK, LADDER)
    with pytest.raises(UsageError, match="no bit-widths"):
        level_shares(trace, LADDER)


def test_the_token_before_by_hand():
    expert_LTK = np.arange(12, dtype=np.uint8).reshape(1, 6, 2)
    trace = trace_of(expert_LTK, 12, request_id_T=[3, 0, 3, 0, 5, 3])
    assert repeat_token(trace)[0].tolist() == [[255, 255], [255, 255], [0, 1], [2, 3], [255, 255], [4, 5]]
