"""Random traces of every admitted shape, for the tests of this folder."""

from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from placer.core.errors import PlacerError
from placer.core.model import ModelSpec, Site
from traces.ids import id_dtype
from traces.trace import RoutingTrace, Tag

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def make_trace(
    seed=0,
    *,
    layers=3,
    experts=8,
    top_k=2,
    tokens=40,
    requests=5,
    nulls=0,
    ragged=False,
    repeats=False,
    weights=False,
    bits=False,
    sources=0,
    unequal=False,
    columns=False,
    tags=False,
    wide=False,
):
    """A trace without structure; every flag turns on one thing that the schema admits."""
    rng = np.random.default_rng(seed)
    counts = [max(top_k, experts - row) if unequal else experts for row in range(layers)]
    sites = tuple(Site(layer=2 * row, num_experts=count, num_null_experts=nulls) for row, count in enumerate(counts))
    model = ModelSpec(
        name="case", num_hidden_layers=2 * layers, sites=sites, top_k=top_k, hidden_size=16, moe_intermediate_size=8
    )
    dtype = np.dtype(np.uint16) if wide else id_dtype(model.num_ids)
    expert_LTK = np.empty((layers, tokens, top_k), dtype=dtype)
    for row, count in enumerate(counts):
        if repeats:
            expert_LTK[row] = rng.integers(0, count + nulls, (tokens, top_k))
        else:
            expert_LTK[row] = rng.random((tokens, count + nulls)).argsort(axis=1)[:, :top_k]
    if ragged:
        expert_LTK[rng.random(expert_LTK.shape) < 0.3] = np.iinfo(dtype).max
    fields = {}
    if weights:
        fields["weight_LTK"] = rng.random(expert_LTK.shape).astype(np.float16)
    if bits:
        fields["bits_LTK"] = rng.integers(2, 9, expert_LTK.shape).astype(np.uint8)
    if sources:
        fields["source_rank_T"] = rng.integers(0, sources, tokens).astype(np.int32)
    if columns:
        fields["position_T"] = rng.integers(0, 99, tokens).astype(np.int32)
        fields["token_id_T"] = rng.integers(0, 999, tokens).astype(np.int32)
        fields["phase_T"] = rng.integers(0, 2, tokens).astype(np.uint8)
        fields["step_T"] = rng.integers(0, 9, tokens).astype(np.int32)
        fields["arrival_ns_T"] = rng.integers(0, 2**40, tokens)
    if tags:
        fields["tags"] = {
            "language": Tag(rng.integers(0, 3, tokens).astype(np.uint8), ("de", "en", "zh")),
            "task": Tag(rng.integers(0, 2, tokens).astype(np.uint16), ("chat", "code")),
        }
    return RoutingTrace(
        model=model,
        expert_LTK=expert_LTK,
        request_id_T=np.sort(rng.integers(0, requests, tokens)).astype(np.int32),
        notes=("made for a test",),
        provenance="case",
        **fields,
    )


@contextmanager
def one_line_errors(kind=PlacerError, naming=""):
    """Lets the body succeed or raise an error of `kind`, whose text must be one line that names `naming`."""
    text = None
    try:
        yield
    except kind as error:
        text = str(error)
    if text is not None:
        assert text
        assert "\n" not in text
        assert naming in text


@st.composite
def traces(draw, max_tokens=60):
    """Any small trace."""
    top_k = draw(st.integers(1, 4))
    return make_trace(
        draw(st.integers(0, 2**32 - 1)),
        layers=draw(st.integers(1, 4)),
        experts=draw(st.integers(top_k, 12)),
        top_k=top_k,
        tokens=draw(st.integers(1, max_tokens)),
        requests=draw(st.integers(1, 7)),
        nulls=draw(st.integers(0, 2)),
        ragged=draw(st.booleans()),
        repeats=draw(st.booleans()),
        weights=draw(st.booleans()),
        bits=draw(st.booleans()),
        sources=draw(st.integers(0, 3)),
        unequal=draw(st.booleans()),
        columns=draw(st.booleans()),
        tags=draw(st.booleans()),
        wide=draw(st.booleans()),
    )


def same_arrays(one, other):
    """Whether two traces hold the same columns with the same contents."""
    first, second = one.arrays(), other.arrays()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]) for name in first
    )


def chosen(trace, row, token):
    """The placeable experts of a token in a site, in order, as plain numbers: the slow reading of the schema."""
    limit = trace.model.sites[row].num_experts
    return [int(expert) for expert in trace.expert_LTK[row, token] if expert != trace.sentinel and expert < limit]


def count_slowly(trace, window_of_token, fold_of_token, windows, folds):
    """Every count of a Profile by plain loops."""
    layers, experts, tokens = trace.model.num_sites, trace.model.num_experts, trace.num_tokens
    load_WLE = np.zeros((windows, layers, experts), dtype=np.int64)
    load_FLE = np.zeros((folds, layers, experts), dtype=np.int64)
    pairs_LEE = np.zeros((layers, experts, experts), dtype=np.int64)
    next_LEE = np.zeros((max(0, layers - 1), experts, experts), dtype=np.int64)
    sets = [{} for _ in range(layers)]
    for row in range(layers):
        for token in range(tokens):
            ids = chosen(trace, row, token)
            for expert in ids:
                load_WLE[window_of_token[token], row, expert] += 1
                load_FLE[fold_of_token[token], row, expert] += 1
            for one, other in combinations(ids, 2):
                if one != other:
                    pairs_LEE[row, one, other] += 1
                    pairs_LEE[row, other, one] += 1
            if row + 1 < layers:
                for one in ids:
                    for other in chosen(trace, row + 1, token):
                        next_LEE[row, one, other] += 1
            if ids:
                key = tuple(sorted(set(ids)))
                sets[row][key] = sets[row].get(key, 0) + 1
    return load_WLE, load_FLE, pairs_LEE, next_LEE, sets


def sets_as_table(sets):
    """{tuple of ids: weight} of an ExpertSets."""
    return {
        tuple(int(expert) for expert in row if expert >= 0): int(weight)
        for row, weight in zip(sets.expert_HK, sets.weight_H, strict=True)
    }
