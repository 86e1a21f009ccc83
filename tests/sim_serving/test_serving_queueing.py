"""Closed-form queues: the same event loop reduced to one rank and one request at a time."""

import numpy as np
import pytest
from serving_cases import barrier, pool, run, workload

from placer.core.errors import UsageError
from sim.serving import Limits, Served, Workload, report
from sim.serving.report import Slo

SERVICE_NS = 1_000_000
ONE_AT_A_TIME = Limits(requests_per_rank=1, tokens_per_rank=1, blocks_per_rank=1, horizon_s=1e6)


def queue(load: float, count: int, *, exponential: bool) -> Served:
    rng = np.random.default_rng(11)
    ones = np.ones(count, dtype=np.int64)
    gaps = rng.exponential(SERVICE_NS / load, count)
    work = Workload(arrival_ns_Q=np.rint(np.cumsum(gaps)).astype(np.int64), input_Q=ones, output_Q=ones)
    times = np.rint(rng.exponential(SERVICE_NS, count)).astype(int).tolist() if exponential else [SERVICE_NS] * count
    return run(work, pool(1, lambda batch: times.pop(), ONE_AT_A_TIME))


@pytest.mark.parametrize("exponential", [True, False], ids=["M/M/1", "M/D/1"])
def test_mean_waiting_time_is_that_of_the_closed_form(exponential: bool) -> None:
    """Pollaczek-Khinchine: rho / (1 - rho) service times for exponential service, half of it for constant service."""
    load, count, batches = 0.6, 24_000, 24
    served = queue(load, count, exponential=exponential)
    wait = np.array([r.started_ns - r.arrival_ns for r in served.requests]) / SERVICE_NS
    means = wait[count // 10 :].reshape(batches, -1).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(batches)
    theory = load / (1 - load) * (1.0 if exponential else 0.5)
    assert abs(means.mean() - theory) < 3 * error
    assert error < 0.08 * theory


def test_littles_law_holds_over_a_finished_run() -> None:
    """Requests in the system, averaged over time, are the arrival rate times the mean time in the system."""
    served = queue(0.8, 2000, exponential=True)
    sojourn = sum(request.finish_ns - request.arrival_ns for request in served.requests)
    assert served.in_system.mean(served.end_ns) * served.end_ns == pytest.approx(sojourn, rel=1e-12)


def test_one_request_takes_the_sum_of_its_iterations() -> None:
    """A prompt of 10 tokens in chunks of 4, 4, 2 and then three tokens more; 7 ns and 100 ns a token by hand."""
    limits = Limits(tokens_per_rank=4, block_tokens=4, blocks_per_rank=4)
    served = run(workload((50, 10, 4)), pool(2, barrier(7, 100), limits))
    request = served.requests[0]
    prefill = (7 + 400) + (7 + 400) + (7 + 200)
    assert request.first_ns == 50 + prefill
    assert request.finish_ns == served.end_ns == 50 + prefill + 3 * 107
    told = report(served, Slo(ttft_ms=1e-3 * 2, tpot_ms=1e-6 * 107))
    assert told["latency"]["tpot_ms"]["p50"] == pytest.approx(107e-6)
    assert told["throughput"]["within_slo"] == 1.0
    assert report(served, Slo(ttft_ms=1e-3, tpot_ms=1.0))["throughput"]["within_slo"] == 0.0


def test_an_overloaded_queue_stops_at_the_horizon_and_says_so() -> None:
    limits = Limits(requests_per_rank=1, tokens_per_rank=1, blocks_per_rank=1, horizon_s=1.0)
    ones = np.ones(3000, dtype=np.int64)
    arrival_ns_Q = np.arange(3000, dtype=np.int64) * SERVICE_NS // 2
    served = run(
        Workload(arrival_ns_Q=arrival_ns_Q, input_Q=ones, output_Q=ones), pool(1, lambda b: SERVICE_NS, limits)
    )
    assert (served.stopped_by, served.overloaded, served.end_ns) == ("horizon", True, 10**9)
    assert "would never end" in served.message
    assert len(served.finished) == 1000


def test_a_horizon_before_the_end_of_a_light_load_is_no_overload() -> None:
    served = run(workload((0, 1, 3)), pool(1, lambda b: 10**9, Limits(horizon_s=1.5)))
    assert (served.stopped_by, served.overloaded, len(served.finished)) == ("horizon", False, 0)
    assert "longer horizon" in served.message


def test_a_policy_that_names_no_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="chose rank 5; there are 0 to 1"):
        run(workload((0, 1, 1)), pool(2, lambda b: 1, Limits(), policy=lambda request, queues: 5))
