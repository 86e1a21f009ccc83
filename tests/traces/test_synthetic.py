import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import same_arrays

from placer.core.errors import UsageError
from placer.core.model import ModelSpec
from traces.stats import trace_statistics
from traces.summarize import summarize
from traces.synthetic import dynamic_top_p, synthesize

SIZES = {"num_layers": 6, "num_experts": 32, "top_k": 4, "num_tokens": 20_000, "num_requests": 100, "seed": 1}


def figures(**knobs):
    return trace_statistics(synthesize(**{**SIZES, **knobs}))


def coactivation_lift(**knobs):
    """Mean over layers of the strongest pairs' share against independent choice."""
    profile = summarize(synthesize(**{**SIZES, **knobs}), max_sets_per_layer=1)
    lifts = []
    for pairs_EE, load_E in zip(profile.coactivation_LEE, profile.load_LE, strict=True):
        share_E = load_E / load_E.sum()
        expected_EE = np.outer(share_E, share_E)
        np.fill_diagonal(expected_EE, 0)
        lifts.append(0.5 * np.abs(pairs_EE / pairs_EE.sum() - expected_EE / expected_EE.sum()).sum())
    return float(np.mean(lifts))


@given(
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 80),
    st.integers(0, 5),
    st.integers(0, 3),
    st.none() | st.floats(0.05, 1.2),
)
@settings(max_examples=60, deadline=None)
def test_traces_of_any_size_are_legal_and_repeatable(layers, experts, top_k, tokens, seed, nulls, top_p):
    top_k, nulls = min(top_k, experts), 0 if top_p else nulls
    sizes = {
        "num_layers": layers, "num_experts": experts, "top_k": top_k, "num_tokens": tokens,
        "num_requests": min(tokens, 7), "seed": seed, "null_experts": nulls, "top_p": top_p, "source_ranks": 3,
    }  # fmt: skip
    trace = synthesize(**sizes)
    trace.check()
    assert (trace.num_tokens, trace.num_requests) == (tokens, min(tokens, 7))
    assert (np.diff(trace.request_id_T) >= 0).all()
    ordered = np.sort(trace.expert_LTK, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != trace.sentinel)
    assert not twice.any()
    if top_p is None:
        assert (trace.expert_LTK != trace.sentinel).all()
    else:
        assert (trace.expert_LTK[:, :, 0] != trace.sentinel).all()
    assert np.array_equal(trace.source_rank_T, trace.request_id_T % 3)
    again = synthesize(**sizes)
    assert same_arrays(trace, again)
    assert again.sha256 == trace.sha256
    if tokens > 20 and experts > 4:
        assert synthesize(**{**sizes, "seed": seed + 1}).sha256 != trace.sha256


def test_popularity_moves_the_skew():
    low, mid, high = (figures(popularity_sigma=sigma)["skew"]["median"] for sigma in (0.0, 0.7, 1.4))
    assert low < 1.5 < mid - 0.2 < high - 0.5


def test_affinity_moves_the_affinity_ratio_and_no_load():
    none, some, much = (figures(affinity=value) for value in (0.0, 0.5, 1.0))
    assert none["affinity_ratio"] + 0.2 < some["affinity_ratio"] < much["affinity_ratio"] - 0.2
    assert abs(none["skew"]["median"] - much["skew"]["median"]) < 0.1


def test_coactivation_moves_the_pairs():
    none, some, much = (coactivation_lift(coactivation=value, drift=0.0) for value in (0.0, 0.5, 1.0))
    assert none < 0.12
    assert none + 0.1 < some < much - 0.1


def test_drift_moves_the_windows_and_none_is_noise():
    none, some, much = (figures(drift=value) for value in (0.0, 0.2, 0.6))
    assert none["drift"] < 1.2 * none["drift_noise"]
    assert none["drift"] + 0.05 < some["drift"] < much["drift"] - 0.02


def test_defaults_are_like_real_routing():
    # gpt-oss-20b on MMLU: skew 1.9 / 2.5 / 3.8, affinity ratio 1.83, drift 0.20, imbalance at 8 ranks 1.44
    found = trace_statistics(synthesize(**{**SIZES, "num_layers": 24, "num_tokens": 60_000, "num_requests": 200}))
    assert 1.7 < found["skew"]["median"] < 3.0
    assert 1.4 < found["affinity_ratio"] < 2.4
    assert 0.12 < found["drift"] < 0.3
    assert 1.2 < found["imbalance"]["8"] < 1.7


def test_ids_say_nothing_about_hotness():
    correlations = []
    for seed in range(12):
        load_LE = summarize(synthesize(**{**SIZES, "seed": seed, "num_tokens": 4000}), max_sets_per_layer=1).load_LE
        correlations += [np.corrcoef(load_E.argsort().argsort(), np.arange(32))[0, 1] for load_E in load_LE]
    # 72 layers: the mean of independent correlations has a deviation of about 0.02
    assert abs(np.mean(correlations)) < 0.08


def test_null_experts_take_their_share_and_cost_nothing():
    trace = synthesize(**SIZES, null_experts=4, null_share=0.25)
    assert trace.model.num_ids == 36
    share = (trace.expert_LTK >= 32).mean()
    # a null expert that is already taken gives way to a real one: a little below the quarter
    assert 0.2 < share < 0.25
    assert summarize(trace, max_sets_per_layer=1).load_WLE.sum() == (trace.expert_LTK < 32).sum()
    assert trace_statistics(trace)["mean_k"] == pytest.approx(4 * (1 - share))


def test_top_p_varies_k_and_lower_layers_use_more():
    trace = synthesize(**{**SIZES, "num_tokens": 4000}, top_p=0.4)
    k_LT = (trace.expert_LTK != trace.sentinel).sum(axis=2)
    assert k_LT.min() >= 1
    assert len(np.unique(k_LT)) > 3
    assert k_LT[0].mean() > k_LT[-1].mean() + 0.1
    more = synthesize(**{**SIZES, "num_tokens": 4000}, top_p=0.7)
    assert (more.expert_LTK != more.sentinel).sum() > 1.5 * k_LT.sum()


def count_as_the_paper(row, threshold):
    """Sort, add up, stop with the first expert by which the sum exceeds the threshold; all if none does."""
    total = 0.0
    for place, value in enumerate(sorted(row, reverse=True), 1):
        total += value
        if total > threshold:
            return place
    return len(row)


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 1.3))
@settings(max_examples=100, deadline=None)
def test_dynamic_top_p_counts_as_the_paper(seed, experts, threshold):
    prob_TE = np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), size=9)
    # the same order of additions, so that rounding is the same
    assert dynamic_top_p(prob_TE, threshold).tolist() == [count_as_the_paper(row, threshold) for row in prob_TE]


def test_dynamic_top_p_takes_all_experts_where_nothing_exceeds_the_threshold():
    assert dynamic_top_p(np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), 1.0).tolist() == [3, 3]
    assert dynamic_top_p(np.array([[0.5, 0.3, 0.2]]), 0.5).tolist() == [2]


def test_takes_the_model_it_is_given():
    model = ModelSpec.uniform("named", num_experts=32, top_k=4, moe_layers=tuple(range(1, 7)), hidden_size=64)
    assert synthesize(**SIZES, model=model).model is model
    with pytest.raises(UsageError, match="asks for others"):
        synthesize(**{**SIZES, "num_experts": 31}, model=model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_layers": 0}, {"num_experts": 0}, {"top_k": 0}, {"top_k": 33}, {"num_tokens": 0}, {"num_requests": 0},
        {"num_requests": 20_001}, {"seed": -1}, {"popularity_sigma": -1}, {"popularity_sigma": float("nan")},
        {"affinity": 1.1}, {"coactivation": -0.1}, {"drift": -0.1}, {"drift": float("inf")}, {"null_experts": -1},
        {"null_share": 2}, {"top_p": 0}, {"top_p": 0.4, "null_experts": 1}, {"source_ranks": -1},
        {"num_experts": 70_000},
    ],
)  # fmt: skip
def test_refuses_knobs_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        synthesize(**{**SIZES, **wrong})
