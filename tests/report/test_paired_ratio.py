import numpy as np
import pytest

from placer.core.errors import UsageError
from placer.core.timeline import Timeline
from placer.report.paired import paired_ratio


def timeline(durations: list[int], **about: object) -> Timeline:
    count = len(durations)
    zeros = np.zeros(count, dtype=np.int64)
    return Timeline(
        about={"source": "measured", "mode": "per_rank", "num_ranks": 1, **about},
        iteration=np.arange(count, dtype=np.int32),
        layer=zeros.astype(np.int32),
        phase=np.full(count, 2, dtype=np.int8),
        rank=zeros.astype(np.int32),
        start_ns=np.cumsum([0, *durations[:-1]]),
        duration_ns=np.array(durations),
        sent_bytes=zeros,
        received_bytes=zeros,
        tokens=zeros,
    )


def test_joined_launches_keep_every_iteration_and_its_length() -> None:
    joined = Timeline.join([timeline([10, 20]), timeline([30])])
    assert joined.iteration_ns().tolist() == [10, 20, 30]
    assert joined.about["launch_iterations"] == [2, 1]
    assert joined.start_ns.tolist() == [0, 10, 30]


def test_the_ratio_is_paired_by_round_and_the_range_is_over_launches() -> None:
    slow = Timeline.join([timeline([100, 200, 300]), timeline([100, 100])])
    fast = Timeline.join([timeline([50, 100, 150]), timeline([25, 25])])
    ratio = paired_ratio(slow, fast)
    assert (ratio.low, ratio.high, ratio.median) == (2.0, 4.0, 3.0)
    assert (ratio.wins, ratio.rounds, ratio.launches) == (5, 5, 2)
    assert "3.000x" in str(ratio)


def test_drift_that_hits_both_alike_cancels() -> None:
    drift = [100, 150, 400]
    assert paired_ratio(timeline(drift), timeline([d // 2 for d in drift])).median == 2.0


def test_runs_that_were_not_measured_together_are_refused() -> None:
    with pytest.raises(UsageError, match="one run"):
        paired_ratio(timeline([1, 2]), timeline([1]))
    with pytest.raises(UsageError, match="trace_sha256"):
        paired_ratio(timeline([1], trace_sha256="a"), timeline([1], trace_sha256="b"))


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(UsageError, match="no parts"):
        Timeline.join([])
