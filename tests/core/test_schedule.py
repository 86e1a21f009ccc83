"""Schedules as data: rounds, chunks and legs against brute force; refusals; JSON by itself and in a plan."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from core_cases import make_cluster, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import InputFileError, UsageError
from placer.core.plan import Plan
from placer.core.schedule import Rounds, Schedule, chunk_index, expand_leg


def shift_rounds(ranks: int, *, halves: bool = False) -> Rounds:
    """Round s: every rank sends to the one s further on; `halves`: half of the copies now, half in a second pass."""
    to_GR = (np.arange(ranks) + np.arange(1, ranks)[:, None]) % ranks
    to_GR = np.concatenate([to_GR, to_GR]) if halves else to_GR
    return Rounds(to_GR=to_GR, share_GR=np.full(to_GR.shape, 0.5 if halves else 1.0))


@st.composite
def rounds_of(draw: st.DrawFn, ranks: int) -> Rounds:
    """Shifts under random names, each pair's copies cut into random shares, the rounds in random order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    name = rng.permutation(ranks)
    to_GR, share_GR = [], []
    for shift in range(1, ranks):
        to_R = np.empty(ranks, dtype=np.int64)
        to_R[name] = name[(np.arange(ranks) + shift) % ranks]
        cuts = rng.dirichlet(np.ones(draw(st.integers(1, 3))), size=ranks)
        to_GR += [to_R] * cuts.shape[1]
        share_GR += list(cuts.T)
    order = rng.permutation(len(to_GR))
    return Rounds(to_GR=np.array(to_GR)[order], share_GR=np.array(share_GR)[order])


@st.composite
def copies(draw: st.DrawFn, ranks: int, windows: int = 2) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    copies_WRR = rng.integers(0, draw(st.sampled_from([2, 9, 1000])), (windows, ranks, ranks))
    return copies_WRR * ~np.eye(ranks, dtype=bool)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 6))
def test_rounds_carry_every_copy_once_to_where_it_goes(data: st.DataObject, ranks: int) -> None:
    rounds, copies_WRR = data.draw(rounds_of(ranks)), data.draw(copies(ranks))
    legs = expand_leg(copies_WRR, "rounds", 1, rounds)
    assert len(legs) == len(rounds.to_GR)
    np.testing.assert_array_equal(sum(legs), copies_WRR)
    for leg, to_R in zip(legs, rounds.to_GR, strict=True):
        assert (leg >= 0).all()
        for window, sender, receiver in np.argwhere(leg):
            assert to_R[sender] == receiver, (window, sender)
    done_GWRR = rounds.bounds(copies_WRR)
    assert (np.diff(done_GWRR, axis=0) >= 0).all()
    assert np.abs(done_GWRR - rounds.cumulative_GRR[:, None] * copies_WRR).max() <= 1 + 1e-3


@settings(max_examples=50, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 6))
def test_the_way_back_is_the_way_there_turned_round(data: st.DataObject, ranks: int) -> None:
    """A token returns in the round in which it went, so both ways have the same legs but for direction."""
    rounds, copies_WRR = data.draw(rounds_of(ranks)), data.draw(copies(ranks))
    there = expand_leg(copies_WRR, "rounds", 1, rounds)
    back = expand_leg(copies_WRR.transpose(0, 2, 1), "rounds", 1, rounds.transposed())
    for out, home in zip(there, back, strict=True):
        np.testing.assert_array_equal(home, out.transpose(0, 2, 1))
    again = rounds.transposed().transposed()
    np.testing.assert_array_equal(again.share_GR, rounds.share_GR)
    np.testing.assert_array_equal(again.to_GR, rounds.to_GR)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), nodes=st.integers(1, 3), per_node=st.integers(1, 3))
def test_2dh_copy_by_copy(data: st.DataObject, nodes: int, per_node: int) -> None:
    ranks = nodes * per_node
    copies_WRR = data.draw(copies(ranks)) % 5
    inside, across = np.zeros_like(copies_WRR), np.zeros_like(copies_WRR)
    for window, sender, receiver in np.argwhere(copies_WRR):
        amount = copies_WRR[window, sender, receiver]
        relay = sender // per_node * per_node + receiver % per_node
        if relay != sender:
            inside[window, sender, relay] += amount
        if relay != receiver:
            across[window, relay, receiver] += amount
    for got, expected in zip(expand_leg(copies_WRR, "2dh", per_node), (inside, across), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_linear_is_the_exchange_itself() -> None:
    copies_WRR = np.arange(18).reshape(2, 3, 3)
    (leg,) = expand_leg(copies_WRR, "linear", 1)
    assert leg is copies_WRR


@settings(max_examples=60, deadline=None)
@given(
    degree=st.integers(1, 7),
    ranks=st.integers(1, 4),
    windows=st.integers(1, 3),
    tokens=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunks_by_counting(degree: int, ranks: int, windows: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    location_T, window_T = rng.integers(0, ranks, tokens), np.sort(rng.integers(0, windows, tokens))
    chunk_T = chunk_index(location_T, window_T, ranks, degree)
    for window in range(windows):
        for rank in range(ranks):
            mine = np.flatnonzero((location_T == rank) & (window_T == window))
            assert chunk_T[mine].tolist() == [i * degree // len(mine) for i in range(len(mine))]
            if len(mine):
                sizes = np.bincount(chunk_T[mine], minlength=degree)
                assert len(sizes) == degree
                assert sizes.max() - sizes.min() <= 1


def good(**changes: object) -> Schedule:
    fields = {
        "algorithm_L": ("linear", "rounds", "2dh"),
        "degree_L": (1, 2, 64),
        "rounds_L": (None, shift_rounds(4), None),
    }
    return Schedule(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"degree_L": (1, 2)}, "3 algorithms, 2 degrees and 3 rounds"),
        ({"algorithm_L": ("linear", "rounds", "ring")}, "algorithm_L[2] is 'ring'; use one of linear, 2dh, rounds"),
        ({"degree_L": (1, 2, 65)}, "degree_L[2] is 65; give 1 to 64"),
        ({"degree_L": (0, 2, 1)}, "degree_L[0] is 0"),
        ({"degree_L": (True, 2, 1)}, "degree_L[0] is True"),
        ({"degree_L": (1, 2.0, 1)}, "degree_L[1] is 2.0"),
        ({"rounds_L": (None, None, None)}, "rounds_L[1] does not fit algorithm 'rounds'"),
        ({"rounds_L": (shift_rounds(4), shift_rounds(4), None)}, "rounds_L[0] does not fit algorithm 'linear'"),
    ],
)
def test_schedule_refuses(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        good(**changes)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("to_GR", "share_GR", "text"),
    [
        ([1, 0], [1, 1], "both are (G, R)"),
        ([[1, 0]], [[1.0]], "rounds.to_GR is (1, 2), share_GR (1, 1)"),
        ([[1, 2]], [[1, 1]], "has rank 2; there are 2"),
        ([[1, -2]], [[1, 1]], "and -1 for none"),
        ([[1, 0]], [[1, -0.5]], "share_GR has -0.5"),
        ([[1, 1]], [[1, 1]], "round 0: a rank receives twice or sends to itself"),
        ([[0, 1]], [[1, 1]], "round 0: a rank receives twice or sends to itself"),
        ([[1, 0]], [[1, 0.4]], "pair 1 -> 0 do not add up to 1"),
        ([[1, -1]], [[1, 1]], "pair 1 -> 0 do not add up to 1"),
        ([[1, 0], [1, 0]], [[1, 1], [1, 0]], "pair 0 -> 1 do not add up to 1"),
    ],
)
def test_rounds_refuse(to_GR: list[object], share_GR: list[object], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Rounds(to_GR=np.array(to_GR), share_GR=np.array(share_GR, dtype=float))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schedule_must_fit_mode_layers_and_ranks() -> None:
    good().refuse_misfit("per_rank", 3, 4)
    Schedule.uniform(2, degree=3).refuse_misfit("per_node", 2, 4)
    for mode, layers, ranks, text in (
        ("per_rank", 2, 4, "is for 3 layers, there are 2"),
        ("per_node", 3, 4, "mode per_node has no 2dh or rounds"),
        ("allgather", 3, 4, "mode allgather has no 2dh or rounds"),
        ("per_rank", 3, 5, "rounds_L[1] is for 4 ranks, there are 5"),
    ):
        with pytest.raises(UsageError) as caught:
            good().refuse_misfit(mode, layers, ranks)
        assert text in str(caught.value)
    with pytest.raises(UsageError, match="allgather is not pipelined"):
        Schedule.uniform(2, degree=2).refuse_misfit("allgather", 2, 4)


def same(a: Schedule, b: Schedule) -> bool:
    plain = (a.algorithm_L, a.degree_L) == (b.algorithm_L, b.degree_L)
    return plain and all(
        (x is None and y is None)
        or (np.array_equal(x.to_GR, y.to_GR) and np.allclose(x.share_GR, y.share_GR, atol=1e-9, rtol=0))
        for x, y in zip(a.rounds_L, b.rounds_L, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data(), ranks=st.integers(2, 6))
def test_schedule_round_trip(data: st.DataObject, ranks: int) -> None:
    schedule = good(rounds_L=(None, data.draw(rounds_of(ranks)), None))
    text = json.dumps(schedule.to_dict())
    read = Schedule.from_dict(json.loads(text))
    assert same(read, schedule)
    assert json.dumps(read.to_dict()) == text
    copies_WRR = data.draw(copies(ranks))
    for before, after in zip(
        expand_leg(copies_WRR, "rounds", 1, schedule.rounds_L[1]),
        expand_leg(copies_WRR, "rounds", 1, read.rounds_L[1]),
        strict=True,
    ):
        assert np.abs(before - after).max() <= 1, "shares are written to nine digits"


def plan_with(**changes: object) -> Plan:
    return make_plan(np.tile(np.arange(8), (3, 1)), make_cluster(2, 2), 8, **changes)


def test_plan_with_schedules_round_trip(tmp_path: Path) -> None:
    plan = plan_with(prefill=good(), decode=Schedule.uniform(3))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.to_json() == plan.to_json()
    assert read.sha256 == plan.sha256
    assert same(read.schedule("prefill"), good())
    assert same(read.schedule("decode"), Schedule.uniform(3))
    assert same(plan_with(prefill=good()).schedule("decode"), Schedule.uniform(3))


def test_a_plan_without_schedules_keeps_its_bytes() -> None:
    plan = plan_with()
    assert "prefill" not in plan.to_json()
    assert "decode" not in plan.to_json()
    with_both = plan_with(prefill=good(), decode=good())
    lines = with_both.to_json().splitlines()
    kept = [line for line in lines if not line.startswith((' "prefill"', ' "decode"'))]
    assert "\n".join(kept).replace("],\n}", "]\n}").replace(" ],\n}", " ]\n}") + "\n" == plan.to_json()
    assert len(lines) == len(kept) + 2, "a schedule is one line"
    assert dataclasses.replace(with_both, prefill=None, decode=None).sha256 == plan.sha256


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"algorithm_L": ["linear", "ring", "2dh"]}, "'ring'"),
        ({"degree_L": [1, 2]}, "2 degrees"),
        ({"degree_L": [1, "2", 1]}, "degree_L[1] is '2'"),
        ({"rounds_L": [None, {"to_GR": [[1, 0]]}, None]}, "share_GR"),
        ({"rounds_L": [None, {"to_GR": [[1, 0]], "share_GR": [[1, 1]]}, None]}, "is for 2 ranks, there are 4"),
        ({"rounds_L": [None, 3, None]}, "damaged plan"),
        ({"overlap": 2}, "unknown field 'overlap'"),
        ({"degree_L": None}, "damaged plan"),
    ],
)
def test_a_damaged_schedule_is_refused_by_the_plan(tmp_path: Path, change: dict[str, object], text: str) -> None:
    path = tmp_path / "plan.json"
    data = json.loads(plan_with(prefill=good()).to_json())
    data["prefill"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(InputFileError) as caught:
        Plan.load(path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_refuses_a_schedule_for_others() -> None:
    with pytest.raises(UsageError, match="is for 2 layers, there are 3"):
        plan_with(decode=Schedule.uniform(2))
    with pytest.raises(UsageError, match="mode allgather is not pipelined"):
        plan_with(mode="allgather", prefill=Schedule.uniform(3, degree=2))
