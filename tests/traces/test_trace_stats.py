import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from trace_cases import DATA, chosen, make_trace, traces

from placer.core.errors import UsageError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers import read_any
from traces.stats import affinity_ratio, contiguous_imbalance, load_statistics, skew, trace_statistics, window_drift
from traces.summarize import summarize
from traces.trace import RoutingTrace


@given(traces())
@settings(max_examples=60, deadline=None)
def test_figures_equal_plain_loops(trace):
    found = trace_statistics(trace, ranks=(1, 2, 3))
    rows = [chosen(trace, row, token) for row in range(trace.model.num_sites) for token in range(trace.num_tokens)]
    assert found["mean_k"] == pytest.approx(sum(map(len, rows)) / len(rows))
    assert found["empty_rows"] == pytest.approx(sum(not row for row in rows) / len(rows))
    skews = []
    for row, site in enumerate(trace.model.sites):
        loads = [0] * site.num_experts
        for token in range(trace.num_tokens):
            for expert in chosen(trace, row, token):
                loads[expert] += 1
        skews.append(max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0)
    assert found["skew"]["max"] == pytest.approx(max(skews))
    assert found["skew"]["min"] == pytest.approx(min(skews))
    assert found["imbalance"]["1"] == pytest.approx(1.0)
    json.dumps(found)


def test_affinity_ratio_by_hand():
    # expert e is always followed by e: every conditional share is 1, the largest marginal one 1/4
    ids = np.tile(np.arange(4, dtype=np.uint8), 10)
    model = ModelSpec.uniform("m", num_experts=4, top_k=1, num_hidden_layers=2)
    requests = np.zeros(40, np.int32)
    trace = RoutingTrace(model=model, expert_LTK=np.stack([ids, ids])[:, :, None], request_id_T=requests)
    assert affinity_ratio(summarize(trace)) == pytest.approx(4.0)
    # all pairs equally often: the expert before tells nothing
    first, second = np.divmod(np.arange(16, dtype=np.uint8), 4)
    even = RoutingTrace(model=model, expert_LTK=np.stack([first, second])[:, :, None], request_id_T=requests[:16])
    assert affinity_ratio(summarize(even)) == pytest.approx(1.0)
    assert trace_statistics(trace.select_layers([0]))["affinity_ratio"] is None


def test_skew_and_imbalance_by_hand():
    load_LE = np.array([[4, 2, 1, 1], [0, 0, 0, 0], [3, 3, 0, 0]])
    assert skew(load_LE, [4, 4, 2]).tolist() == [2.0, 1.0, 1.0]
    # first layer: ranks hold 6 and 2 of 8; third layer: one expert each
    assert contiguous_imbalance(load_LE, [4, 4, 2], 2) == pytest.approx((1.5 + 1.0) / 2)
    with pytest.raises(UsageError):
        contiguous_imbalance(load_LE, [4, 4, 2], 0)


def test_drift_by_hand():
    load_WLE = np.array([[[10, 0]], [[0, 10]], [[5, 5]]])
    drift, noise = window_drift(load_WLE)
    assert drift == pytest.approx((1.0 + 0.5) / 2)
    assert noise > 0
    assert window_drift(load_WLE[:1]) == (None, None)
    assert window_drift(np.zeros_like(load_WLE)) == (None, None)


def test_drift_of_a_still_source_is_its_noise():
    rng = np.random.default_rng(0)
    share_E = rng.dirichlet(np.ones(32))
    load_WLE = rng.multinomial(4000, share_E, size=(400, 2))
    drift, noise = window_drift(load_WLE)
    assert drift == pytest.approx(noise, rel=0.03)


def test_statistics_of_counts_and_of_a_ready_profile():
    trace = make_trace(tokens=300)
    profile = summarize(trace, window_tokens=50, folds=1)
    from_profile = trace_statistics(trace, profile=profile)
    assert from_profile == trace_statistics(trace, window_tokens=50)
    counts = LoadCounts(model=trace.model, load_WLE=profile.load_WLE)
    figures = load_statistics(counts)
    for name in ("skew", "imbalance", "drift"):
        assert figures[name] == from_profile[name]
    assert figures["selections"] == 300 * 3 * 2
    with pytest.raises(UsageError):
        replace(counts, load_WLE=-profile.load_WLE)


@pytest.mark.data
def test_real_routing_has_the_figures_that_were_measured():
    path = DATA / "gptoss20b" / "mmlu.npz"
    if not path.exists():
        pytest.skip("the developers' traces are not here")
    found = trace_statistics(read_any(path))
    assert found["affinity_ratio"] == pytest.approx(1.83, abs=0.05)
    assert found["drift"] == pytest.approx(0.20, abs=0.01)
    assert found["drift_noise"] == pytest.approx(0.03, abs=0.005)
    assert found["imbalance"]["8"] == pytest.approx(1.44, abs=0.05)
    assert found["skew"]["median"] == pytest.approx(2.52, abs=0.2)
