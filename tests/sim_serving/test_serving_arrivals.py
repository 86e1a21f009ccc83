"""Arrivals have the rates and lengths asked for; a trace file is read as it is or refused by line and field."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import InputFileError, UsageError
from sim.serving import Arrivals, Lengths, Limits, Streams, Workload, make_workload, read_workload


def made(seed: int = 0, **rest: object) -> Workload:
    return make_workload(Arrivals(**rest), 1e5, np.random.default_rng(seed))


def dispersion(work: Workload, bin_ns: int) -> float:
    """Variance / mean of arrivals per bin: 1 for Poisson."""
    count = np.bincount(work.arrival_ns_Q // bin_ns)[:-1]
    return float(count.var() / count.mean())


def test_poisson_arrivals_have_their_rate_and_no_bursts() -> None:
    work = made(rate_per_s=20.0, requests=20_000)
    seconds = work.arrival_ns_Q[-1] / 1e9
    assert len(work) == 20_000
    assert 20_000 / seconds == pytest.approx(20.0, rel=4 / np.sqrt(20_000))
    assert dispersion(work, 10**9) == pytest.approx(1.0, abs=0.2)


def test_bursts_have_the_same_mean_rate_and_more_variance() -> None:
    work = made(kind="bursts", rate_per_s=20.0, requests=60_000, burst_factor=6.0, burst_s=4.0, calm_s=12.0)
    assert len(work) == 60_000
    assert 60_000 / (work.arrival_ns_Q[-1] / 1e9) == pytest.approx(20.0, rel=0.1)
    assert dispersion(work, 10**9) > 5


def test_without_a_number_requests_come_until_the_horizon() -> None:
    for kind in ("poisson", "bursts"):
        work = make_workload(Arrivals(kind=kind, requests=None, rate_per_s=50.0), 100.0, np.random.default_rng(3))
        assert 90 < work.arrival_ns_Q[-1] / 1e9 < 100
        assert 3000 < len(work) < 7500


@pytest.mark.parametrize("kind", ["fixed", "uniform", "lognormal"])
def test_lengths_have_their_mean(kind: str) -> None:
    drawn = Lengths(kind=kind, mean=300.0, sigma=0.7).draw(40_000, np.random.default_rng(1))
    assert drawn.min() >= 1
    assert drawn.mean() == pytest.approx(300, rel=0.02)


def test_same_seed_same_requests() -> None:
    for name in ("arrival_ns_Q", "input_Q", "output_Q"):
        assert np.array_equal(getattr(made(5), name), getattr(made(5), name))
        assert not np.array_equal(getattr(made(5), name), getattr(made(6), name))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Arrivals(rate_per_s=0.0), "arrivals.rate_per_s is 0.0; give a number above 0"),
        (lambda: Arrivals(rate_per_s=float("nan")), "arrivals.rate_per_s is nan"),
        (lambda: Arrivals(requests=0), "arrivals.requests is 0; give a whole number, 1 or more"),
        (lambda: Arrivals(kind="steady"), "arrivals.kind is 'steady'; use one of poisson, bursts"),
        (lambda: Lengths(mean=0.5), "lengths.mean is 0.5"),
        (lambda: Lengths(kind="zipf"), "lengths.kind is 'zipf'"),
        (lambda: Limits(blocks_per_rank=0), "limits.blocks_per_rank is 0; give a whole number, 1 or more"),
        (lambda: Limits(horizon_s=-1.0), "limits.horizon_s is -1.0"),
        (lambda: made(requests=None, rate_per_s=1e6), "makes over 10000000 requests"),
    ],
)
def test_values_that_make_no_sense_are_refused(make: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()  # type: ignore[operator]


GOOD = {"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def test_a_mooncake_trace_counts_from_its_first_request(tmp_path: Path) -> None:
    later = {"timestamp": 3027.5, "input_length": 1, "output_length": 2}
    work = read_workload(written(tmp_path, GOOD, "", later))
    assert work.arrival_ns_Q.tolist() == [0, 27_500_000]
    assert work.input_Q.tolist() == [6758, 1]
    assert work.output_Q.tolist() == [500, 2]
    assert work.prefix_Q == ((0, 1, 2), ())
    assert len(read_workload(written(tmp_path, GOOD, "not read"), 1)) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is a list; give an object"),
        ({**GOOD, "timestamp": 1}, "line 2: timestamp is 1, the line before has 3000; sort it"),
        ({**GOOD, "timestamp": "soon"}, "line 2: timestamp is 'soon'; give a number"),
        ({**GOOD, "timestamp": -3}, "line 2: timestamp is -3; give 0 to"),
        ({**GOOD, "timestamp": float("nan")}, "line 2: timestamp is nan"),
        ({**GOOD, "timestamp": True}, "line 2: timestamp is 'True'"),
        ({**GOOD, "input_length": 0}, "line 2: input_length is 0; give 1 to"),
        ({**GOOD, "output_length": 2.5}, "line 2: output_length is '2.5'; give a whole number"),
        ({"timestamp": 3000, "output_length": 1}, "line 2: has no input_length"),
        ({**GOOD, "hash_ids": ["a"]}, "line 2: hash_ids is"),
        ({**GOOD, "input_length": 10**30}, "line 2: input_length is 1000000"),
    ],
)
def test_bad_lines_are_refused_by_line_and_field(line: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as refused:
        read_workload(written(tmp_path, GOOD, line))
    assert says in str(refused.value)
    assert "requests.jsonl" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="holds no requests"):
        read_workload(written(tmp_path))
    with pytest.raises(InputFileError, match="cannot be read"):
        read_workload(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputFileError, match="is not text"):
        read_workload(tmp_path / "binary")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tokens_take_the_rows_of_their_request_and_phase_in_order(rows: list[tuple[int, int]], phases: bool) -> None:
    request_T = np.array([request for request, _ in rows], dtype=np.int32)
    phase_T = np.array([phase for _, phase in rows], dtype=np.uint8)
    streams = Streams.of(request_T, phase_T if phases else None)
    prompt, total = 7, 12
    for stream, request in enumerate(np.unique(request_T)):
        row_I, source_I = streams.rows(np.array([[stream, 3, 2, prompt, total - 2]]), total - 2)
        expected = []
        for position in range(2, total):
            phase = int(position >= prompt)
            own = np.flatnonzero((request_T == request) & ((phase_T == phase) | (not phases)))
            own = own if len(own) else np.flatnonzero(request_T == request)
            expected.append(int(own[(position - phase * prompt) % len(own)]))
        assert row_I.tolist() == expected
        assert set(source_I.tolist()) == {3}
