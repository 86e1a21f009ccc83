import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import DATA, make_trace

from placer.core.model import ModelSpec
from traces.detect import detect, repair
from traces.readers.npz import read_npz


def clean(tokens=64, layers=4, experts=16, top_k=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((layers, tokens, experts)).argsort(axis=2)[:, :, :top_k].astype(np.uint8)


def mend(expert_LTK, weight_LTK=None, **rest):
    layer_ids = tuple(range(len(expert_LTK)))
    return repair(expert_LTK.copy(), None if weight_LTK is None else weight_LTK.copy(), layer_ids=layer_ids, **rest)


def codes(findings):
    return [finding.code for finding in findings]


@given(st.integers(0, 2**31), st.integers(40, 300), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_finds_nothing_in_plain_routing(seed, tokens, layers, top_k):
    expert_LTK = clean(tokens, layers, 16, top_k, seed)
    assert detect(expert_LTK) == ()
    result = mend(expert_LTK)
    assert result.findings == ()
    assert np.array_equal(result.expert_LTK, expert_LTK)


@pytest.mark.data
def test_finds_nothing_in_real_routing():
    path = DATA / "gptoss20b" / "mmlu.npz"
    if not path.exists():
        pytest.skip("the developers' traces are not here")
    assert detect(read_npz(path)) == ()


def test_layers_recorded_as_expert_zero_are_dropped_and_named():
    expert_LTK = clean(layers=5)
    expert_LTK[[0, 3]] = 0
    found = detect(expert_LTK, layer_ids=(3, 4, 5, 6, 7))
    assert found[0].code == "dense_layer"
    assert found[0].layers == (3, 6)
    assert not found[0].repaired
    result = repair(expert_LTK.copy(), None, layer_ids=(3, 4, 5, 6, 7))
    assert result.rows == (1, 2, 4)
    assert codes(result.findings) == ["dense_layer"]
    assert result.findings[0].repaired
    assert np.array_equal(result.expert_LTK, expert_LTK[[1, 2, 4]])


def test_blank_layers_are_dropped():
    expert_LTK = clean()
    expert_LTK[2] = 255
    result = mend(expert_LTK)
    assert result.rows == (0, 1, 3)
    assert codes(result.findings) == ["blank_layer"]


def test_a_top_one_layer_of_zeros_is_dense_only_where_it_is_long():
    expert_LTK = clean(top_k=1)
    expert_LTK[1] = 0
    assert mend(expert_LTK).rows == (0, 2, 3)
    short = expert_LTK[:, :8]
    assert mend(short).rows == (0, 1, 2, 3)


def test_repeated_layers_are_dropped():
    expert_LTK = clean()[[0, 1, 1, 1, 2, 0]]
    result = mend(expert_LTK)
    assert result.rows == (0, 1, 4, 5)
    assert codes(result.findings) == ["repeated_layer"]
    assert result.findings[0].layers == (2, 3)
    short = mend(expert_LTK[:, :8])
    assert short.rows == tuple(range(6))
    assert not short.findings[0].repaired


def test_layers_of_a_known_model_are_never_dropped():
    expert_LTK = clean()[[0, 1, 1, 2]]
    expert_LTK[3] = 255
    result = mend(expert_LTK, keep_layers=True)
    assert result.rows == (0, 1, 2, 3)
    assert sorted(codes(result.findings)) == ["blank_layer", "repeated_layer"]
    assert not any(finding.repaired for finding in result.findings)


@pytest.mark.parametrize(("start", "length"), [(0, 16), (20, 30), (44, 20)])
def test_dummy_tokens_are_dropped(start, length):
    expert_LTK = clean()
    expert_LTK[:, start : start + length] = expert_LTK[:, start][:, None]
    result = mend(expert_LTK)
    assert codes(result.findings) == ["warmup_rows"]
    finding = result.findings[0]
    assert (finding.rows, finding.first_token, finding.repaired) == (length, start, True)
    kept = [token for token in range(64) if not start <= token < start + length]
    assert result.tokens.tolist() == kept
    assert np.array_equal(result.expert_LTK, expert_LTK[:, kept])


def test_short_runs_and_runs_of_empty_tokens_stay():
    expert_LTK = clean()
    expert_LTK[:, 10:25] = expert_LTK[:, 10][:, None]
    assert detect(expert_LTK) == ()
    expert_LTK[:, 10:60] = 255
    assert detect(expert_LTK) == ()


def test_runs_in_few_and_narrow_layers_are_only_reported():
    expert_LTK = clean(layers=2, top_k=2)
    expert_LTK[:, 10:40] = expert_LTK[:, 10][:, None]
    result = mend(expert_LTK)
    assert codes(result.findings) == ["warmup_rows"]
    assert not result.findings[0].repaired
    assert result.expert_LTK.shape == expert_LTK.shape


def test_last_columns_of_zeros_are_dropped():
    expert_LTK = np.pad(clean(top_k=2), ((0, 0), (0, 0), (0, 6)))
    result = mend(expert_LTK)
    assert codes(result.findings) == ["zero_columns"]
    assert np.array_equal(result.expert_LTK, expert_LTK[:, :, :2])


def test_last_columns_that_are_unset_are_dropped():
    expert_LTK = np.pad(clean(top_k=2), ((0, 0), (0, 0), (0, 6)), constant_values=255)
    result = mend(expert_LTK)
    assert codes(result.findings) == ["unused_columns"]
    assert np.array_equal(result.expert_LTK, expert_LTK[:, :, :2])


def test_rows_filled_up_with_zeros_become_unset():
    expert_LTK = clean()
    expert_LTK[expert_LTK == 0] = 15
    expert_LTK[1, 5] = [5, 3, 0, 0]
    expert_LTK[2, 6] = [7, 0, 0, 0]
    expert_LTK[2, 7] = [4, 2, 1, 0]
    expert_LTK[3, 8] = 0
    expected = expert_LTK.copy()
    expected[1, 5, 2:] = expected[2, 6, 1:] = expected[3, 8] = 255
    result = mend(expert_LTK)
    assert "zero_padding" in codes(result.findings)
    padding = next(finding for finding in result.findings if finding.code == "zero_padding")
    assert (padding.rows, padding.layers) == (3, (1, 2, 3))
    assert np.array_equal(result.expert_LTK, expected)


def test_weights_tell_padding_from_expert_zero():
    expert_LTK = np.array([[[5, 3, 0], [5, 0, 0], [2, 4, 0], [7, 6, 1]]] * 1, dtype=np.uint8)
    weight_LTK = np.array([[[0.5, 0.5, 0.0], [0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]]], dtype=np.float16)
    result = mend(expert_LTK, weight_LTK)
    assert result.expert_LTK[0].tolist() == [[5, 3, 255], [5, 0, 255], [2, 4, 0], [7, 6, 1]]
    assert np.array_equal(result.weight_LTK, weight_LTK)


def test_weights_of_unset_entries_become_zero():
    expert_LTK = clean()
    expert_LTK[0, 0, 3] = 255
    weight_LTK = np.full(expert_LTK.shape, 0.25, dtype=np.float16)
    weight_LTK[0, 0, 3] = np.nan
    result = mend(expert_LTK, weight_LTK)
    assert result.weight_LTK[0, 0].tolist() == [0.25, 0.25, 0.25, 0.0]


def test_ids_that_a_model_does_not_have_are_reported():
    expert_LTK = clean()
    model = ModelSpec.uniform("small", num_experts=12, top_k=4, num_hidden_layers=4)
    found = detect(expert_LTK, model=model)
    assert codes(found) == ["physical_ids"]
    assert "physical ids" in found[0].message


def test_an_expert_named_twice_is_reported_and_kept():
    expert_LTK = clean()
    expert_LTK[1, 3] = [4, 9, 4, 2]
    expert_LTK[2, 4] = [1, 1, 1, 1]
    result = mend(expert_LTK)
    assert codes(result.findings) == ["duplicate_ids"]
    assert (result.findings[0].rows, result.findings[0].layers) == (2, (1, 2))
    assert np.array_equal(result.expert_LTK, expert_LTK)


def test_takes_a_trace_and_writes_notes():
    trace = make_trace(repeats=True, experts=3, top_k=3)
    found = detect(trace)
    assert "duplicate_ids" in codes(found)
    assert found[0].note.startswith(f"{found[0].code}: ")
    assert not found[0].note.endswith("(repaired)")


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_several_traps_at_once_are_all_undone(seed):
    rng = np.random.default_rng(seed)
    routed = clean(tokens=80, layers=4, top_k=4, seed=seed)
    dummies = np.repeat(clean(tokens=1, layers=4, top_k=4, seed=seed + 1), 20, axis=1)
    place = int(rng.integers(0, 80))
    tokens = np.concatenate([routed[:, :place], dummies, routed[:, place:]], axis=1)
    stack = np.stack([np.zeros_like(tokens[0]), tokens[0], tokens[1], tokens[1], tokens[2], tokens[3]])
    wide = np.pad(stack, ((0, 0), (0, 0), (0, 4)), constant_values=255)
    result = mend(wide)
    assert set(codes(result.findings)) == {"dense_layer", "repeated_layer", "warmup_rows", "unused_columns"}
    # the dummies may by chance equal the routing beside them, never fewer than 20 go
    assert result.rows == (1, 2, 4, 5)
    assert np.array_equal(result.expert_LTK, routed)
