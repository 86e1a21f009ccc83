"""Timeline: its two sums by hand, round trip, same bytes, and damaged files.

Legend: I spans.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.core.errors import InputFileError, UsageError
from placer.core.timeline import COLUMNS, PHASES, Timeline

QUIET = [HealthCheck.function_scoped_fixture]
TYPES = {"iteration": np.int32, "layer": np.int32, "phase": np.int8, "rank": np.int32}
SPANS = [
    # iteration, layer, phase, rank, start, duration, sent, received, tokens
    (0, 0, 1, 0, 0, 10, 100, 50, 2),
    (0, 0, 1, 1, 0, 30, 50, 100, 1),
    (0, 0, 2, 0, 10, 5, 0, 0, 3),
    (0, 1, 1, 0, 40, 7, 0, 0, 0),
    (0, -1, 4, 1, 50, 50, 8, 8, 1),
    (1, 0, 1, 0, 100, 20, 0, 0, 0),
    (1, 0, 3, 1, 115, 25, 0, 0, 0),
]
ABOUT = {"source": "simulated", "mode": "per_rank", "num_ranks": 2}


def make_timeline(spans: list[tuple[int, ...]] = SPANS, **about: Any) -> Timeline:
    columns = np.array(spans, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    fields = {name: columns[i].astype(TYPES.get(name, np.int64)) for i, name in enumerate(COLUMNS)}
    return Timeline(about=ABOUT | about, **fields)


def changed(index: int, **values: int) -> list[tuple[int, ...]]:
    spans = [list(span) for span in SPANS]
    for name, value in values.items():
        spans[index][COLUMNS.index(name)] = value
    return [tuple(span) for span in spans]


def test_iterations_last_from_first_start_to_last_end() -> None:
    timeline = make_timeline()
    assert timeline.num_iterations == 2
    assert timeline.iteration_ns().tolist() == [100, 40]


def test_phases_add_the_slowest_rank_of_each_layer() -> None:
    found = {name: ns_I.tolist() for name, ns_I in make_timeline().phase_ns().items()}
    assert found == {"dispatch": [30 + 7, 20], "experts": [5, 0], "combine": [0, 25], "gather": [50, 0]}


def test_no_spans() -> None:
    timeline = make_timeline([])
    assert (timeline.num_iterations, timeline.iteration_ns().tolist(), timeline.phase_ns()) == (0, [], {})


def test_what_is_saved_is_loaded_and_saved_alike(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    make_timeline(plan_sha256="abc").save(path)
    first = path.read_bytes()
    loaded = Timeline.load(path)
    assert loaded.about == ABOUT | {"plan_sha256": "abc"}
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(make_timeline(), name))
        assert getattr(loaded, name).dtype == getattr(make_timeline(), name).dtype
    loaded.save(path)
    assert path.read_bytes() == first
    assert json.loads(first)["format"] == "placer-timeline"


SPAN = st.tuples(
    st.integers(0, 3), st.integers(-1, 5), st.integers(0, len(PHASES) - 1), st.integers(0, 3),
    st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 10**6),
)  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=QUIET)
@given(spans=st.lists(SPAN, max_size=20))
def test_any_spans_survive_the_file(spans: list[tuple[int, ...]], tmp_path: Path) -> None:
    order = sorted({span[0] for span in spans})
    timeline = make_timeline([(order.index(span[0]), *span[1:]) for span in spans], num_ranks=4)
    path = tmp_path / "t.json"
    timeline.save(path)
    again = Timeline.load(path)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(again, name), getattr(timeline, name))
    np.testing.assert_array_equal(again.iteration_ns(), timeline.iteration_ns())
    assert (timeline.iteration_ns() >= 0).all()


@pytest.mark.parametrize(
    ("spans", "about", "text"),
    [
        (changed(0, start_ns=-1), {}, "starts before 0"),
        (changed(0, duration_ns=-1), {}, "lasts less than 0"),
        (changed(0, start_ns=2**62, duration_ns=2**62), {}, "2**63"),
        (changed(0, phase=7), {}, "timeline.phase has 1 to 7"),
        (changed(0, phase=-1), {}, "timeline.phase has -1"),
        (changed(0, rank=2), {}, "timeline.rank has 0 to 2"),
        (changed(0, rank=-1), {}, "timeline.rank has -1"),
        (changed(0, layer=-2), {}, "timeline.layer has -2"),
        (changed(0, layer=2**31 - 1), {}, "timeline.layer has"),
        (changed(0, iteration=3), {}, "timeline.iteration has gaps"),
        (changed(0, iteration=-1), {}, "timeline.iteration has gaps"),
        (changed(0, iteration=2**31 - 1), {}, "timeline.iteration has gaps"),
        (changed(0, tokens=-1), {}, "timeline.tokens has -1"),
        (changed(0, sent_bytes=-5), {}, "timeline.sent_bytes has -5"),
        (changed(0, received_bytes=-5), {}, "timeline.received_bytes has -5"),
        (SPANS, {"num_ranks": 0}, "num_ranks'] is 0"),
        (SPANS, {"num_ranks": "2"}, "num_ranks'] is '2'"),
        (SPANS, {"num_ranks": True}, "num_ranks'] is True"),
    ],
)
def test_impossible_spans_are_refused(spans: list[tuple[int, ...]], about: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_timeline(spans, **about)
    assert text in str(caught.value)


def test_columns_of_different_lengths_and_missing_facts_are_refused() -> None:
    fields = {name: getattr(make_timeline(), name) for name in COLUMNS}
    with pytest.raises(UsageError, match=r"timeline\.rank has shape \(6,\)"):
        Timeline(about=ABOUT, **fields | {"rank": fields["rank"][1:]})
    for name in ABOUT:
        about = {key: value for key, value in ABOUT.items() if key != name}
        with pytest.raises(UsageError, match=name):
            Timeline(about=about, **fields)


def rewrite(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads(make_timeline().to_json())
    path = tmp_path / "t.json"
    path.write_text(json.dumps(change(data) or data))
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format="placer-plan"), "is not a placer Timeline"),
        (lambda d: d.update(version=9), "Timeline version 9"),
        (lambda d: d.pop("about"), "'about'"),
        (lambda d: d.pop("columns"), "'columns'"),
        (lambda d: d.update(columns=[]), "damaged Timeline"),
        (lambda d: d.update(about="x"), "damaged Timeline"),
        (lambda d: d["about"].pop("mode"), "'mode'"),
        (lambda d: d["columns"].pop("rank"), "'rank'"),
        (lambda d: d["columns"].update(rank=3), "rank is not a list of whole numbers"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, 1.5), "start_ns is not a list of whole numbers"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, "3"), "start_ns is not"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, True), "start_ns is not"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, None), "start_ns is not"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, float("nan")), "start_ns is not"),
        (lambda d: d["columns"].update(start_ns=[[1]] * 7), "start_ns is not"),
        (lambda d: d["columns"]["start_ns"].pop(), "damaged Timeline"),
        (lambda d: d["columns"]["start_ns"].__setitem__(0, 2**70), "damaged Timeline"),
        (lambda d: d["columns"]["phase"].__setitem__(0, 300), "damaged Timeline"),
        (lambda d: d["columns"]["rank"].__setitem__(0, 7), "timeline.rank has 0 to 7"),
        (lambda d: [d], "is not a placer Timeline"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[dict[str, Any]], Any], text: str, tmp_path: Path) -> None:
    path = rewrite(tmp_path, lambda d: r if isinstance(r := change(d), list) and r and r[0] is d else None)
    with pytest.raises(InputFileError) as caught:
        Timeline.load(path)
    assert text in str(caught.value)
    assert "t.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_timeline_at_all(tmp_path: Path) -> None:
    for content in (b"", b"\x00\xff", b"{", b"[]", b"null", b"[" * 100_000, b"\x80\x04K\x01."):
        path = tmp_path / "t.json"
        path.write_bytes(content)
        with pytest.raises(InputFileError, match="is not"):
            Timeline.load(path)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputFileError, match="cannot be read"):
            Timeline.load(path)


def survives(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    try:
        timeline = Timeline.load(path)
    except InputFileError:
        return
    assert (timeline.iteration_ns() >= 0).all()
    assert all((ns_I >= 0).all() for ns_I in timeline.phase_ns().values())
    assert json.loads(timeline.to_json())["columns"]["rank"] == timeline.rank.tolist()


@settings(max_examples=80, deadline=None, suppress_health_check=QUIET)
@given(cut=st.integers(0, 10**6))
def test_truncation(cut: int, tmp_path: Path) -> None:
    whole = make_timeline().to_json().encode()
    survives(whole[: cut % len(whole)], tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
def test_bit_flips(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(make_timeline().to_json().encode())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    survives(bytes(content), tmp_path)


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
@given(
    name=st.sampled_from(COLUMNS),
    place=st.integers(0, len(SPANS) - 1),
    value=st.integers(-(2**70), 2**70) | st.integers(-3, 9) | st.floats() | st.text(max_size=2) | st.none(),
)
def test_any_value_anywhere(name: str, place: int, value: Any, tmp_path: Path) -> None:
    data = json.loads(make_timeline().to_json())
    data["columns"][name][place] = value
    survives(json.dumps(data).encode(), tmp_path)
