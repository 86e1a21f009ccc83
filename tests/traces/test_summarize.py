from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import chosen, count_slowly, make_trace, sets_as_table, traces

from placer.core.errors import UsageError
from traces.ids import convert_ids
from traces.sets import expert_sets, sample_tokens
from traces.store import load_trace, save_trace
from traces.summarize import fold_of_requests, num_windows, summarize
from traces.trace import concatenate

RELAXED = settings(max_examples=40, deadline=None)


def slow_windows(tokens, window_tokens):
    """Window of each token, by the rule's words."""
    whole = [token // window_tokens for token in range(tokens)]
    rest = tokens % window_tokens
    if rest and rest * 2 < window_tokens and tokens > window_tokens:
        whole = [min(window, tokens // window_tokens - 1) for window in whole]
    return whole


@given(traces(), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
@RELAXED
def test_equals_plain_loops(trace, window_tokens, folds, seed):
    profile = summarize(trace, window_tokens=window_tokens, folds=folds, seed=seed, threads=1)
    windows = slow_windows(trace.num_tokens, window_tokens)
    fold_T, count = fold_of_requests(trace.request_id_T, folds, seed)
    load_WLE, load_FLE, pairs_LEE, next_LEE, sets = count_slowly(trace, windows, fold_T, max(windows) + 1, count)
    assert np.array_equal(profile.load_WLE, load_WLE)
    assert np.array_equal(profile.load_FLE, load_FLE)
    assert np.array_equal(profile.coactivation_LEE, pairs_LEE)
    assert np.array_equal(profile.transition_LEE, next_LEE)
    assert [sets_as_table(item) for item in profile.sets] == sets
    assert all(item.coverage == 1.0 for item in profile.sets)
    assert (profile.num_tokens, profile.num_requests) == (trace.num_tokens, trace.num_requests)
    assert profile.trace_sha256 == trace.sha256


@given(traces())
@RELAXED
def test_source_ranks_are_counted_apart(trace):
    profile = summarize(trace, threads=1)
    if trace.source_rank_T is None:
        assert profile.load_SLE is None
        return
    assert np.array_equal(profile.load_SLE.sum(axis=0), profile.load_LE)
    for source in range(len(profile.load_SLE)):
        mine = trace.source_rank_T == source
        if mine.any():
            assert np.array_equal(profile.load_SLE[source], summarize(trace.select_tokens(mine)).load_LE)


@given(traces())
@RELAXED
def test_load_is_conserved(trace):
    profile = summarize(trace, window_tokens=7, folds=3)
    real = sum(int((trace.expert_LTK[row] < site.num_experts).sum()) for row, site in enumerate(trace.model.sites))
    assert int(profile.load_WLE.sum()) == int(profile.load_FLE.sum()) == real


@given(traces(), st.integers(0, 2**31))
@RELAXED
def test_renaming_experts_renames_the_counts(trace, seed):
    rng = np.random.default_rng(seed)
    experts = trace.model.num_experts
    renamed = trace.expert_LTK.copy()
    new_LE = np.tile(np.arange(experts), (trace.model.num_sites, 1))
    for row, site in enumerate(trace.model.sites):
        new_LE[row, : site.num_experts] = rng.permutation(site.num_experts)
        used = trace.expert_LTK[row] < site.num_experts
        renamed[row][used] = new_LE[row][trace.expert_LTK[row][used]]
    before = summarize(trace, window_tokens=9)
    after = summarize(replace(trace, expert_LTK=renamed, known_sha256=""), window_tokens=9)
    for row in range(trace.model.num_sites):
        new_E = new_LE[row]
        assert np.array_equal(after.load_WLE[:, row][:, new_E], before.load_WLE[:, row])
        assert np.array_equal(after.coactivation_LEE[row][np.ix_(new_E, new_E)], before.coactivation_LEE[row])
        assert sets_as_table(after.sets[row]) == {
            tuple(sorted(int(new_E[expert]) for expert in key)): weight
            for key, weight in sets_as_table(before.sets[row]).items()
        }
        if row + 1 < trace.model.num_sites:
            transition = after.transition_LEE[row][np.ix_(new_E, new_LE[row + 1])]
            assert np.array_equal(transition, before.transition_LEE[row])


@given(traces(), st.integers(0, 2**31))
@RELAXED
def test_order_of_a_row_and_width_of_the_ids_do_not_matter(trace, seed):
    rng = np.random.default_rng(seed)
    order = rng.random(trace.expert_LTK.shape).argsort(axis=2)
    shuffled = np.take_along_axis(trace.expert_LTK, order, axis=2)
    wide = convert_ids(shuffled, np.dtype(np.uint16))
    one, other = summarize(trace), summarize(replace(trace, expert_LTK=wide, weight_LTK=None, bits_LTK=None))
    assert np.array_equal(one.load_WLE, other.load_WLE)
    assert np.array_equal(one.coactivation_LEE, other.coactivation_LEE)
    assert np.array_equal(one.transition_LEE, other.transition_LEE)
    assert [sets_as_table(sets) for sets in one.sets] == [sets_as_table(sets) for sets in other.sets]


@given(traces(), st.floats(0.2, 0.8))
@RELAXED
def test_parts_add_up_to_the_whole(trace, fraction):
    if trace.num_requests < 2:
        return
    parts = trace.split_by_request(fraction)
    whole = summarize(concatenate(parts, renumber=False))
    train, test = (summarize(part) for part in parts)
    assert np.array_equal(train.load_LE + test.load_LE, whole.load_LE)
    assert np.array_equal(train.load_LE + test.load_LE, summarize(trace).load_LE)
    assert np.array_equal(train.coactivation_LEE + test.coactivation_LEE, whole.coactivation_LEE)
    assert np.array_equal(train.transition_LEE + test.transition_LEE, whole.transition_LEE)


@pytest.mark.parametrize(
    ("tokens", "window", "expected"),
    [(1, 10, 1), (4, 10, 1), (10, 10, 1), (14, 10, 1), (15, 10, 2), (20, 10, 2), (24, 10, 2), (25, 10, 3), (3, 1, 3)],
)
def test_a_short_last_window_joins_the_one_before(tokens, window, expected):
    assert num_windows(tokens, window) == expected == max(slow_windows(tokens, window)) + 1
    profile = summarize(make_trace(tokens=tokens), window_tokens=window)
    per_window = profile.load_WLE[:, 0].sum(axis=1) / 2
    assert per_window.sum() == tokens
    assert (per_window[:-1] == window).all()


def test_windows_and_chunks_that_do_not_align():
    trace = make_trace(tokens=40_000, requests=90)
    profile = summarize(trace, window_tokens=1000, threads=2)
    for window in (0, 15, 16, 17, 39):
        part = trace.expert_LTK[1, window * 1000 : window * 1000 + 1000]
        assert np.array_equal(profile.load_WLE[window, 1], np.bincount(part.ravel(), minlength=8))


def test_folds_hold_whole_requests_in_equal_shares():
    trace = make_trace(tokens=2000, requests=40)
    fold_T, count = fold_of_requests(trace.request_id_T, 8, seed=1)
    assert count == 8
    folds_of_request = {}
    for request, fold in zip(trace.request_id_T.tolist(), fold_T.tolist(), strict=True):
        folds_of_request.setdefault(request, set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of_request.values())
    sizes = np.bincount([next(iter(folds)) for folds in folds_of_request.values()])
    assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(fold_T, fold_of_requests(trace.request_id_T, 8, seed=2)[0])
    assert fold_of_requests(np.array([5, 5, 9], np.int32), 8, seed=0)[1] == 2


def test_same_result_for_any_number_of_threads():
    trace = make_trace(tokens=3000, requests=30, layers=4, experts=12, top_k=3, ragged=True)
    one, two = (summarize(trace, threads=threads, max_sets_per_layer=50, seed=3) for threads in (1, 3))
    for name in ("load_WLE", "load_FLE", "coactivation_LEE", "transition_LEE"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()
    for left, right in zip(one.sets, two.sets, strict=True):
        assert left.expert_HK.tobytes() == right.expert_HK.tobytes()
        assert left.weight_H.tobytes() == right.weight_H.tobytes()


@given(traces(), st.integers(1, 30), st.integers(0, 9))
@RELAXED
def test_sampled_sets_are_true_sets_with_a_true_coverage(trace, most, seed):
    exact = summarize(trace)
    sampled = summarize(trace, max_sets_per_layer=most, seed=seed)
    for row, (all_sets, sets) in enumerate(zip(exact.sets, sampled.sets, strict=True)):
        everything, some = sets_as_table(all_sets), sets_as_table(sets)
        if len({tuple(sorted(chosen(trace, row, token))) for token in range(trace.num_tokens)} - {()}) <= most:
            assert some == everything
            assert sets.coverage == 1.0
            continue
        assert len(some) <= most
        assert all(weight <= everything[key] for key, weight in some.items())
        used = sum(everything.values())
        assert used == sum(1 for token in range(trace.num_tokens) if (trace.expert_LTK[row, token]
            < trace.model.sites[row].num_experts).any())  # fmt: skip
        assert sets.coverage == pytest.approx(sum(some.values()) / used)


@given(traces())
@RELAXED
def test_set_rows_are_ascending_padded_and_in_lexicographic_order(trace):
    for sets in summarize(trace).sets:
        rows = [tuple(int(expert) for expert in row) for row in sets.expert_HK]
        assert rows == sorted(rows)
        assert len(set(rows)) == len(rows)
        for row in rows:
            ids = [expert for expert in row if expert >= 0]
            assert ids == sorted(set(ids))
            assert row == (*ids, *[-1] * (len(row) - len(ids)))
            assert ids
        assert (sets.weight_H > 0).all()


@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (512, 10), (384, 8), (3, 3), (1, 1), (1000, 1), (2, 2)])
@pytest.mark.parametrize("ragged", [False, True])
def test_sets_of_serving_sizes(experts, top_k, ragged):
    rng = np.random.default_rng(0)
    kinds = rng.random((60, experts)).argsort(axis=1)[:, :top_k].astype(np.uint16)
    if ragged:
        kinds[rng.random(kinds.shape) < 0.3] = 65535
    expert_TK = np.ascontiguousarray(kinds[rng.integers(0, 60, 500)])
    table = {}
    for row in expert_TK.tolist():
        key = tuple(sorted(expert for expert in row if expert != 65535))
        if key:
            table[key] = table.get(key, 0) + 1
    used = sum(table.values())
    sets = expert_sets(expert_TK, experts, max_sets=1000, sample_T=np.arange(500), used_tokens=used)
    assert sets_as_table(sets) == table
    assert sets.coverage == 1.0


@given(st.integers(1, 500), st.integers(1, 100), st.integers(0, 5))
@RELAXED
def test_sample_takes_one_token_of_every_stride(tokens, most, seed):
    sample = sample_tokens(tokens, most, seed)
    assert 0 < len(sample) <= most
    assert (np.diff(sample) > 0).all()
    assert sample[0] >= 0
    assert sample[-1] < tokens
    if tokens > most:
        stride = -(-tokens // most)
        assert (sample // stride == np.arange(len(sample))).all()
        assert len(sample) == -(-tokens // stride)


def test_counts_a_memory_mapped_trace(tmp_path):
    trace = make_trace(tokens=500, ragged=True)
    save_trace(trace, tmp_path / "x")
    one, other = summarize(trace), summarize(load_trace(tmp_path / "x"))
    assert one.trace_sha256 == other.trace_sha256
    assert np.array_equal(one.load_WLE, other.load_WLE)


def test_progress_comes_in_order_and_to_an_end():
    seen = []
    summarize(make_trace(layers=4), progress=lambda done, total: seen.append((done, total)), threads=2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("argument", ["window_tokens", "folds", "max_sets_per_layer"])
def test_refuses_sizes_below_one(argument):
    with pytest.raises(UsageError, match=argument):
        summarize(make_trace(), **{argument: 0})


def test_refuses_what_cannot_be_counted():
    with pytest.raises(UsageError, match="no tokens"):
        summarize(make_trace().select_tokens(slice(0, 0)))
    with pytest.raises(UsageError, match="seed"):
        summarize(make_trace(), seed=-1)
    big = make_trace(experts=40_000, top_k=1, layers=2)
    with pytest.raises(UsageError, match="GiB"):
        summarize(big)
    with pytest.raises(UsageError, match="give more than 1 window_tokens"):
        summarize(make_trace(tokens=200_000, experts=400, top_k=1, layers=9, repeats=True), window_tokens=1)
    far = replace(make_trace(), source_rank_T=np.full(40, 2**31 - 1, np.int32))
    with pytest.raises(UsageError, match="source ranks"):
        summarize(far)
