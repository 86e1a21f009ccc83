"""The learnt prediction of touches: leave-one-out by refitting, limits, and planted topics behind noisy prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.affinity import prefix_model
from solvers.affinity.homes import assign_homes, touches_at_home
from solvers.affinity.predict import touch_from_prefix
from solvers.affinity.prefix_model import RIDGES, fit_prefix_model


def random_requests(seed: int, requests: int, layers: int = 2, ranks: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    tokens_Q = rng.integers(3, 40, size=requests)
    seen_Q = np.minimum(tokens_Q, 5)
    seen_LQR = rng.binomial(seen_Q[None, :, None], rng.random((1, requests, ranks)), size=(layers, requests, ranks))
    rest_LQR = rng.binomial((tokens_Q - seen_Q)[None, :, None], 0.4, size=(layers, requests, ranks))
    return seen_LQR, seen_Q, (seen_LQR + rest_LQR).sum(axis=0), tokens_Q


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12))
def test_the_strength_has_the_least_error_when_each_request_is_left_out(seed: int, requests: int) -> None:
    seen_LQR, seen_Q, touch_QR, tokens_Q = random_requests(seed, requests)
    weight_Q = tokens_Q.astype(float)
    design = (seen_LQR / seen_Q[None, :, None]).transpose(1, 0, 2).reshape(requests, -1)
    errors = []
    for ridge in RIDGES:
        error = 0.0
        for out in range(requests):
            rest = np.arange(requests) != out
            # normal equations with an intercept that is not shrunk
            full = np.concatenate([np.ones((requests - 1, 1)), design[rest]], axis=1)
            penalty = np.diag([0.0] + [ridge * weight_Q.mean()] * design.shape[1])
            rate_QR = touch_QR[rest] / weight_Q[rest, None]
            left = full.T @ (weight_Q[rest, None] * full) + penalty
            slope = np.linalg.solve(left, full.T @ (weight_Q[rest, None] * rate_QR))
            missed = touch_QR[out] / weight_Q[out] - np.concatenate([[1.0], design[out]]) @ slope
            error += weight_Q[out] * float((missed**2).sum())
        errors.append(error)
    model = fit_prefix_model(seen_LQR, seen_Q, touch_QR, tokens_Q)
    assert errors[RIDGES.index(model.ridge)] == pytest.approx(min(errors), rel=1e-6)


def test_strong_shrinking_is_the_mean_and_requests_without_tokens_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_LQR, seen_Q, touch_QR, tokens_Q = random_requests(1, 8)
    mean_R = touch_QR.sum(axis=0) / tokens_Q.sum()
    nothing = fit_prefix_model(seen_LQR, seen_Q, touch_QR, tokens_Q).predict(seen_LQR * 0, seen_Q * 0, tokens_Q)
    np.testing.assert_allclose(nothing, mean_R * tokens_Q[:, None])
    monkeypatch.setattr(prefix_model, "RIDGES", (1e12,))
    shrunk = fit_prefix_model(seen_LQR, seen_Q, touch_QR, tokens_Q).predict(seen_LQR, seen_Q, tokens_Q)
    np.testing.assert_allclose(shrunk, mean_R * tokens_Q[:, None], rtol=1e-6)


def test_it_brings_more_home_than_the_prefix_itself_on_planted_topics() -> None:
    # a topic touches one rank a little more than the others; a prefix of 4 tokens in 20 layers hardly shows it alone
    rng = np.random.default_rng(0)
    layers, requests, ranks = 20, 120, 4
    topic_Q = rng.integers(0, ranks, size=requests)
    chance_QR = np.where(np.eye(ranks, dtype=bool)[topic_Q], 0.7, 0.4)
    # some layers do not know topics at all, with loud requests of their own
    loud_LQR = rng.random((layers, requests, ranks)) < 0.5
    chance_LQR = np.where((np.arange(layers) < 8)[:, None, None], chance_QR[None], loud_LQR)
    seen_LQR = rng.binomial(4, chance_LQR)
    rest_LQR = np.concatenate([rng.binomial(96, chance_LQR[:8]), rng.binomial(96, 0.5, size=(12, requests, ranks))])
    touch_QR = (seen_LQR + rest_LQR).sum(axis=0)
    tokens_Q, seen_Q, train = np.full(requests, 100), np.full(requests, 4), np.arange(requests) < 60
    model = fit_prefix_model(seen_LQR[:, train], seen_Q[train], touch_QR[train], tokens_Q[train])
    learnt = model.predict(seen_LQR[:, ~train], seen_Q[~train], tokens_Q[~train])
    plain = touch_from_prefix(seen_LQR[:, ~train].sum(axis=0), seen_Q[~train], tokens_Q[~train])
    home = [
        touches_at_home(touch_QR[~train], assign_homes(predicted, tokens_Q[~train], ranks, 0.1))
        for predicted in (learnt, plain)
    ]
    oracle = touches_at_home(touch_QR[~train], assign_homes(touch_QR[~train], tokens_Q[~train], ranks, 0.1))
    assert home[1] < home[0] <= oracle


def test_what_makes_no_sense_is_refused() -> None:
    seen_LQR, seen_Q, touch_QR, tokens_Q = random_requests(1, 8)
    with pytest.raises(UsageError, match="1 known requests"):
        fit_prefix_model(seen_LQR[:, :1], seen_Q[:1], touch_QR[:1], tokens_Q[:1])
    model = fit_prefix_model(seen_LQR, seen_Q, touch_QR, tokens_Q)
    with pytest.raises(UsageError, match="3 layers x ranks; the model knows 6"):
        model.predict(seen_LQR[:1], seen_Q, tokens_Q)
