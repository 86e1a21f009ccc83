from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import make_trace, same_arrays, traces

from placer.core.errors import MismatchError, UsageError
from placer.core.model import ModelSpec, Site
from traces.ids import convert_ids, generator, id_dtype
from traces.trace import RoutingTrace, Tag, concatenate


def test_is_frozen_and_read_only():
    trace = make_trace()
    with pytest.raises(FrozenInstanceError):
        trace.provenance = "other"
    with pytest.raises(ValueError, match="read-only"):
        trace.expert_LTK[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        trace.request_id_T[0] = 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_LTK", np.zeros((3, 40, 2), dtype=np.int64), "uint8 or uint16"),
        ("expert_LTK", np.zeros((3, 40), dtype=np.uint8), "uint8 or uint16"),
        ("expert_LTK", np.zeros((2, 40, 2), dtype=np.uint8), "3 routing sites"),
        ("expert_LTK", np.full((3, 40, 2), 8, dtype=np.uint8), "ids up to|end at 7"),
        ("weight_LTK", np.zeros((3, 40, 2), dtype=np.float32), "float16"),
        ("weight_LTK", np.zeros((3, 40, 1), dtype=np.float16), "float16"),
        ("weight_LTK", np.full((3, 40, 2), np.nan, dtype=np.float16), "finite"),
        ("weight_LTK", np.full((3, 40, 2), np.inf, dtype=np.float16), "finite"),
        ("bits_LTK", np.zeros((3, 40, 2), dtype=np.int8), "uint8"),
        ("request_id_T", np.zeros(39, dtype=np.int32), "request_id_T"),
        ("request_id_T", np.full(40, -1, dtype=np.int32), "count from 0"),
        ("source_rank_T", np.full(40, -1, dtype=np.int32), "count from 0"),
        ("phase_T", np.full(40, 2, dtype=np.uint8), "prefill"),
        ("arrival_ns_T", np.zeros(40, dtype=np.int32), "int64"),
        ("tags", {"x": Tag(np.zeros(39, dtype=np.uint8), ("a",))}, "40"),
    ],
)
def test_refuses_what_does_not_fit(field, value, message):
    with pytest.raises(UsageError, match=message):
        replace(make_trace(), **{field: value})


def test_refuses_an_id_type_whose_sentinel_is_a_legal_id():
    model = ModelSpec.uniform("wide", num_experts=256, top_k=1, num_hidden_layers=1)
    requests = np.zeros(4, dtype=np.int32)
    with pytest.raises(UsageError, match="use uint16"):
        RoutingTrace(model=model, expert_LTK=np.zeros((1, 4, 1), np.uint8), request_id_T=requests)
    RoutingTrace(model=model, expert_LTK=np.full((1, 4, 1), 255, np.uint16), request_id_T=requests)
    assert id_dtype(255) == np.uint8
    assert id_dtype(256) == np.uint16
    with pytest.raises(UsageError):
        id_dtype(65536)


def test_admits_unequal_layers_nulls_attention_experts_rounds_and_shared_pools():
    sites = (
        Site(layer=0, num_experts=4, num_null_experts=2),
        Site(layer=0, num_experts=4, num_null_experts=2, round=1),
        Site(layer=1, num_experts=2, module="attn"),
        Site(layer=2, num_experts=6, pool=1),
    )
    model = ModelSpec(name="odd", num_hidden_layers=3, sites=sites, top_k=2, hidden_size=8, moe_intermediate_size=8)
    expert_LTK = np.array([[[5, 0], [255, 255]], [[4, 3], [0, 1]], [[1, 255], [0, 255]], [[5, 0], [2, 1]]], np.uint8)
    trace = RoutingTrace(model=model, expert_LTK=expert_LTK, request_id_T=np.zeros(2, np.int32))
    assert trace.num_tokens == 2
    bad = expert_LTK.copy()
    bad[2, 1, 0] = 2
    with pytest.raises(UsageError, match=r"row 2 \(layer 1\), token 1 has expert id 2"):
        RoutingTrace(model=model, expert_LTK=bad, request_id_T=np.zeros(2, np.int32))


def test_tag_refuses_codes_without_a_name():
    with pytest.raises(UsageError, match="code 2"):
        Tag(np.array([0, 2], dtype=np.uint8), ("a", "b"))
    with pytest.raises(UsageError, match="uint8 or uint16"):
        Tag(np.array([0, 1]), ("a", "b"))


@given(traces(), st.floats(0.05, 0.95), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_split_is_by_request_complete_and_in_order(trace, fraction, seed):
    if trace.num_requests < 2:
        with pytest.raises(UsageError, match="at least 2"):
            trace.split_by_request(fraction, seed)
        return
    train, test = trace.split_by_request(fraction, seed)
    assert not set(train.request_id_T.tolist()) & set(test.request_id_T.tolist())
    assert train.num_requests >= 1
    assert test.num_requests >= 1
    assert train.num_requests + test.num_requests == trace.num_requests
    mask = np.isin(trace.request_id_T, train.request_id_T)
    assert same_arrays(train, trace.select_tokens(mask))
    assert same_arrays(test, trace.select_tokens(np.flatnonzero(~mask)))
    again, _ = trace.split_by_request(fraction, seed)
    assert again.sha256 == train.sha256


def test_split_draws_other_requests_with_another_seed():
    trace = make_trace(tokens=200, requests=60)
    assert len({trace.split_by_request(0.5, seed)[0].sha256 for seed in range(4)}) == 4
    with pytest.raises(UsageError, match="fraction"):
        trace.split_by_request(1.0)
    with pytest.raises(UsageError, match="seed"):
        trace.split_by_request(0.5, -1)


@given(traces())
@settings(max_examples=40, deadline=None)
def test_hash_is_of_content_only(trace):
    assert replace(trace, notes=("other",), provenance="other", known_sha256="").sha256 == trace.sha256
    flipped = trace.expert_LTK.copy()
    flipped[0, 0, 0] = (int(flipped[0, 0, 0]) + 1) % trace.model.sites[0].num_experts
    if flipped[0, 0, 0] != trace.expert_LTK[0, 0, 0]:
        assert replace(trace, expert_LTK=flipped, known_sha256="").sha256 != trace.sha256
    other = replace(trace.model, hidden_size=17)
    assert replace(trace, model=other, known_sha256="").sha256 != trace.sha256


def test_selections_forget_the_hash_they_came_from():
    trace = make_trace()
    whole = trace.sha256
    assert trace.select_tokens(slice(0, 10)).sha256 != whole
    assert trace.select_layers([0, 1]).sha256 != whole
    assert trace.select_tokens(slice(None)).sha256 == whole


def test_slice_of_tokens_and_layers_does_not_copy():
    trace = make_trace(weights=True)
    part = trace.select_tokens(slice(5, 20)).select_layers([1, 2])
    assert np.shares_memory(part.expert_LTK, trace.expert_LTK)
    assert np.array_equal(part.expert_LTK, trace.expert_LTK[1:, 5:20])
    assert part.model.moe_layers == (2, 4)
    picked = trace.select_layers([2, 0])
    assert picked.model.moe_layers == (4, 0)
    assert np.array_equal(picked.expert_LTK, trace.expert_LTK[[2, 0]])


@pytest.mark.parametrize("index", [np.ones(3, dtype=bool), [40], [-1]])
def test_refuses_tokens_that_are_not_there(index):
    with pytest.raises(UsageError):
        make_trace().select_tokens(index)


@pytest.mark.parametrize("rows", [[], [3], [-1]])
def test_refuses_layers_that_are_not_there(rows):
    with pytest.raises(UsageError):
        make_trace().select_layers(rows)


@given(traces(), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_concatenate_undoes_a_cut(trace, cut):
    parts = [trace.select_tokens(slice(0, cut)), trace.select_tokens(slice(cut, None))]
    joined = concatenate(parts, renumber=False)
    assert same_arrays(joined, trace)
    assert joined.sha256 == trace.sha256


def test_concatenate_keeps_requests_of_different_traces_apart():
    one, two = make_trace(1, tokens=10, requests=3), make_trace(2, tokens=12, requests=4, weights=True)
    joined = concatenate([one, two])
    assert joined.num_requests == one.num_requests + two.num_requests
    assert joined.weight_LTK is None
    assert any("weight_LTK dropped" in note for note in joined.notes)
    with pytest.raises(MismatchError):
        concatenate([one, make_trace(experts=9)])
    with pytest.raises(UsageError):
        concatenate([])


def test_concatenate_widens_ids_and_joins_tag_names():
    one, two = make_trace(1, tags=True), make_trace(2, wide=True, ragged=True, tags=True)
    renamed = replace(two, tags={"language": Tag(np.zeros(40, np.uint8), ("fr",)), "other": two.tags["task"]})
    joined = concatenate([one, renamed])
    assert joined.expert_LTK.dtype == np.uint16
    assert (joined.expert_LTK == joined.sentinel).sum() == (two.expert_LTK == two.sentinel).sum()
    assert list(joined.tags) == ["language"]
    labels = [joined.tags["language"].names[code] for code in joined.tags["language"].codes_T]
    assert labels == [one.tags["language"].names[code] for code in one.tags["language"].codes_T] + ["fr"] * 40


def test_convert_ids_keeps_the_unset_unset():
    narrow = np.array([0, 254, 255], dtype=np.uint8)
    wide = convert_ids(narrow, np.dtype(np.uint16))
    assert wide.tolist() == [0, 254, 65535]
    assert convert_ids(wide, np.dtype(np.uint8)).tolist() == narrow.tolist()


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_refuses_seeds_that_are_no_whole_numbers(seed):
    with pytest.raises(UsageError, match="seed"):
        generator(seed)
