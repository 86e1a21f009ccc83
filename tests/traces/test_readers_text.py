import base64
import io
import json

import numpy as np
import pytest
from gguf_bytes import imatrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_cases import DATA, make_trace, traces

from placer.core.errors import InputFileError, MismatchError, PlacerError, UsageError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers import READERS, load_counts_profile, read_any
from traces.readers.jsonl import read_jsonl
from traces.readers.logical_count import read_logical_count
from traces.readers.routed_experts import read_routed_experts
from traces.store import save_trace

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MODEL = ModelSpec.uniform("m", num_experts=8, top_k=2, moe_layers=(1, 2), num_hidden_layers=4)


def token_line(trace, token, weights):
    rows = [[int(e) for e in row if e != trace.sentinel] for row in trace.expert_LTK[:, token]]
    line = {"request_id": int(trace.request_id_T[token]), "experts": rows}
    if weights:
        line["weights"] = [
            [float(w) for e, w in zip(ids, row, strict=True) if e != trace.sentinel]
            for ids, row in zip(trace.expert_LTK[:, token], trace.weight_LTK[:, token], strict=True)
        ]
    for name in ("position", "token_id", "phase", "step", "source_rank", "arrival_ns"):
        if getattr(trace, f"{name}_T") is not None:
            line[name] = int(getattr(trace, f"{name}_T")[token])
    for name, tag in trace.tags.items():
        line[name] = tag.names[tag.codes_T[token]]
    return line


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def row_sets(trace):
    """Ids per site and token, in order, whatever the number of columns and the unset ids between."""
    return [
        [[int(e) for e in row if e != trace.sentinel] for row in trace.expert_LTK[site]]
        for site in range(trace.model.num_sites)
    ]


@given(trace=traces(max_tokens=20))
@RELAXED
def test_jsonl_round_trip(trace, tmp_path):
    weights = trace.weight_LTK is not None
    write_lines(tmp_path / "x.jsonl", [token_line(trace, token, weights) for token in range(trace.num_tokens)])
    if (trace.expert_LTK == trace.sentinel).all():
        with pytest.raises(InputFileError, match="no layer holds routing"):
            read_any(tmp_path / "x.jsonl", model=trace.model)
        return
    loaded = read_any(tmp_path / "x.jsonl", model=trace.model)
    if any("zero_" in note for note in loaded.notes):
        return
    assert row_sets(loaded) == row_sets(trace)
    assert np.array_equal(loaded.request_id_T, trace.request_id_T)
    if weights:
        assert loaded.weight_LTK.sum() == pytest.approx(
            float(np.where(trace.expert_LTK == trace.sentinel, 0, trace.weight_LTK).sum()), rel=1e-2
        )
    for name in ("position_T", "token_id_T", "phase_T", "step_T", "source_rank_T", "arrival_ns_T"):
        assert np.array_equal(getattr(loaded, name), getattr(trace, name))
    for name, tag in trace.tags.items():
        labels = [tag.names[code] for code in tag.codes_T]
        assert [loaded.tags[name].names[code] for code in loaded.tags[name].codes_T] == labels


def test_jsonl_of_requests_equals_jsonl_of_tokens(tmp_path):
    trace = make_trace(tokens=30, ragged=True)
    lines = [token_line(trace, token, False) for token in range(30)]
    write_lines(tmp_path / "tokens", lines)
    requests = {}
    for line in lines:
        requests.setdefault(line["request_id"], []).append(line["experts"])
    write_lines(tmp_path / "requests", [{"request_id": request, "experts": rows} for request, rows in requests.items()])
    one, two = (read_jsonl(tmp_path / name, trace.model) for name in ("tokens", "requests"))
    assert row_sets(one) == row_sets(two)
    assert np.array_equal(one.request_id_T, two.request_id_T)


def test_jsonl_names_layers_phases_and_texts(tmp_path):
    write_lines(
        tmp_path / "x",
        [
            {"layers": [3, 7]},
            {"request_id": "b", "experts": [[[1, 2], [3]], [[4], []]], "phase": ["prefill", "decode"], "lang": "de"},
            {"request_id": "a", "experts": [[5, -1], [6, 7]], "phase": 1},
        ],
    )
    trace = read_any(tmp_path / "x")
    assert trace.model.moe_layers == (3, 7)
    assert row_sets(trace) == [[[1, 2], [4], [5]], [[3], [], [6, 7]]]
    assert trace.request_id_T.tolist() == [0, 0, 1]
    assert trace.phase_T.tolist() == [0, 1, 1]
    assert trace.tags["lang"].names == ("", "de")
    assert trace.tags["lang"].codes_T.tolist() == [1, 1, 0]


def test_jsonl_layers_must_be_the_models(tmp_path):
    write_lines(tmp_path / "x", [{"layers": [1, 3]}, *[{"experts": [[1, 2], [3, 4]]}] * 3])
    with pytest.raises(MismatchError, match="model 'm' has experts in"):
        read_jsonl(tmp_path / "x", MODEL)
    write_lines(tmp_path / "x", [{"layers": [0, 1, 2]}, *[{"experts": [[7, 7], [1, 2], [3, 4]]}] * 3])
    assert row_sets(read_jsonl(tmp_path / "x", MODEL)) == [[[1, 2]] * 3, [[3, 4]] * 3]
    write_lines(tmp_path / "x", [{"layers": [1, 1]}, {"experts": [[1], [2]]}])
    with pytest.raises(InputFileError, match="different layer numbers"):
        read_jsonl(tmp_path / "x", MODEL)


def test_jsonl_leaves_out_columns_that_lines_lack(tmp_path):
    lines = [{"experts": [[1, 2], [3, 4]], "position": 0, "weights": [[1, 0], [1, 0]]}, {"experts": [[2, 1], [0, 5]]}]
    write_lines(tmp_path / "x", lines)
    trace = read_jsonl(tmp_path / "x")
    assert trace.position_T is None
    assert trace.weight_LTK is None
    assert trace.num_requests == 2
    text = " ".join(trace.notes)
    assert "position_T left out" in text
    assert "weights left out" in text
    assert "every line counts as one request" in text


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "[]",
        "{}",
        '{"experts": 3}',
        '{"experts": []}',
        '{"experts": {"0": [1]}}',
        '{"experts": [1, 2]}',
        '{"experts": [[1.5, 2]]}',
        '{"experts": [["a"]]}',
        '{"experts": [[true]]}',
        '{"experts": [[null]]}',
        '{"experts": ["ab"]}',
        '{"experts": [[[[1]]]]}',
        '{"experts": [[1], [[2]]]}',
        '{"experts": [[[1]], [[1], [2]]]}',
        '{"experts": [[70000], [1]]}',
        '{"experts": [[-2], [1]]}',
        '{"experts": [[1e30], [1]]}',
        '{"experts": [[' + "9" * 400 + "]]}",
        '{"experts": [[1], [2], [3]]}',
        '{"experts": [[1], [2]], "weights": [[0.5], [NaN]]}',
        '{"experts": [[1], [2]], "weights": [[0.5], [0.5, 0.5]]}',
        '{"experts": [[1], [2]], "weights": 3}',
        '{"experts": [[1], [2]], "position": "x"}',
        '{"experts": [[1], [2]], "position": 1.5}',
        '{"experts": [[1], [2]], "position": [1, 2]}',
        '{"experts": [[1], [2]], "position": 99999999999}',
        '{"experts": [[1], [2]], "position": ' + "9" * 30 + "}",
        '{"experts": [[1], [2]], "phase": "sleep"}',
        '{"experts": [[1], [2]], "phase": 2}',
        '{"experts": [[1], [2]], "source_rank": -1}',
        '{"experts": [[1], [2]], "lang": ["de"]}',
        "[" * 100_000,
    ],
)
def test_jsonl_names_the_bad_line(line, tmp_path):
    good = '{"experts": [[1, 0], [2, 3]], "weights": [[0.5, 0.5], [0.5, 0.5]], "position": 0}'
    first = good if '"position"' in line or '"weights"' in line else '{"experts": [[1, 0], [2, 3]]}'
    first = first.replace(', "weights": [[0.5, 0.5], [0.5, 0.5]]', "") if '"weights"' not in line else first
    if '"phase"' in line or '"source_rank"' in line:
        first = first[:-1] + ', "phase": 0, "source_rank": 0}'
    if '"weights"' in line:
        first = first.replace(', "position": 0', "")
    (tmp_path / "x.jsonl").write_text(f"{first}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputFileError, match=r"x\.jsonl"):
        read_jsonl(tmp_path / "x.jsonl")


def test_jsonl_refuses_a_row_that_would_fill_the_memory(tmp_path):
    rows = [[1]] * 20_000
    rows[7] = [1] * 20_000
    write_lines(tmp_path / "x", [{"experts": rows}])
    with pytest.raises(InputFileError, match="very different lengths"):
        read_jsonl(tmp_path / "x")
    write_lines(tmp_path / "z", [*[{"experts": [[1]]}] * 3000, {"experts": [list(range(60_000))]}])
    with pytest.raises(InputFileError, match="very different lengths"):
        read_jsonl(tmp_path / "z")


# routed_experts


def raw32(ids):
    return base64.b64encode(np.ascontiguousarray(ids, dtype="<i4").tobytes()).decode()


def npy64(ids):
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return base64.b64encode(buffer.getvalue()).decode()


def reply_ids(tokens, seed=0, experts=8, dtype=np.int64):
    """(tokens, 4 layers, 2): layers 1 and 2 of MODEL are routed, the dense ones stay 0."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, 4, 2), dtype=dtype)
    ids[:, 1:3] = rng.random((tokens, 2, experts)).argsort(axis=2)[:, :, :2]
    return ids


def check(trace, parts):
    expected = np.concatenate(parts)[:, 1:3].transpose(1, 0, 2)
    assert np.array_equal(trace.expert_LTK, expected)
    assert trace.model.moe_layers == (1, 2)
    assert trace.request_id_T.tolist() == np.repeat(np.arange(len(parts)), [len(p) for p in parts]).tolist()


def test_sglang_generate_replies(tmp_path):
    parts = [reply_ids(40, 1), reply_ids(9, 2)]
    replies = [
        {
            "text": "a",
            "meta_info": {"routed_experts": raw32(part), "prompt_tokens": 6, "completion_tokens": len(part) - 5},
        }
        for part in parts
    ]
    for name, text in (
        ("lines", "\n".join(map(json.dumps, replies))),
        ("list", json.dumps(replies)),
        ("pretty", json.dumps(replies, indent=2)),
    ):
        (tmp_path / name).write_text(text)
        trace = read_any(tmp_path / name, model=MODEL)
        check(trace, parts)
        assert trace.phase_T.tolist() == [0] * 6 + [1] * 34 + [0] * 6 + [1] * 3
        assert trace.position_T.tolist() == [*range(40), *range(9)]
        assert any("2 rows of layers without experts left out" in note for note in trace.notes)


def test_positions_left_out_at_the_start_are_counted(tmp_path):
    part = reply_ids(10)
    reply = {"meta_info": {"routed_experts": raw32(part), "prompt_tokens": 12, "completion_tokens": 4}}
    (tmp_path / "x").write_text(json.dumps(reply))
    trace = read_routed_experts(tmp_path / "x", MODEL)
    assert trace.position_T.tolist() == list(range(5, 15))
    assert trace.phase_T.tolist() == [0] * 7 + [1] * 3


def test_sglang_openai_replies(tmp_path):
    part = reply_ids(12)
    (tmp_path / "x").write_text(json.dumps({"id": "c", "choices": [{}], "sglext": {"routed_experts": raw32(part)}}))
    trace = read_any(tmp_path / "x", source="sglang", model=MODEL)
    check(trace, [part])
    assert trace.phase_T is None


def test_vllm_replies_of_several_choices(tmp_path):
    parts = [reply_ids(40, seed, dtype=np.uint8) for seed in (1, 2)]
    reply = {"choices": [{"routed_experts": npy64(part)} for part in parts], "usage": {"prompt_tokens": 5}}
    (tmp_path / "x").write_text(json.dumps(reply))
    check(read_any(tmp_path / "x", source="vllm", model=MODEL), parts)
    guessed = read_any(tmp_path / "x")
    assert guessed.model.moe_layers == (1, 2)
    assert any("dense_layer" in note and "0, 3" in note for note in guessed.notes)


def test_vllm_id_255_is_an_expert(tmp_path):
    part = reply_ids(40, dtype=np.uint8)
    part[3, 1] = [255, 254]
    np.save(tmp_path / "x.npy", part)
    trace = read_any(tmp_path / "x.npy")
    assert trace.model.num_experts == 256
    assert trace.expert_LTK[0, 3].tolist() == [255, 254]


@pytest.mark.parametrize(
    "reply",
    [
        3,
        {},
        [],
        [3],
        {"meta_info": {}},
        {"meta_info": {"routed_experts": 3}},
        {"meta_info": {"routed_experts": "%%%"}},
        {"meta_info": {"routed_experts": "ü"}},
        {"meta_info": {"routed_experts": base64.b64encode(b"1234567").decode()}},
        {"meta_info": {"routed_experts": raw32(np.full((1, 4, 2), -5))}},
        {"meta_info": {"routed_experts": raw32(np.full((1, 4, 2), 9))}},
        {"meta_info": {"routed_experts": raw32(np.full((1, 4, 2), 2**31 - 1))}},
        {"choices": [{"routed_experts": npy64(np.zeros((3, 4)))}]},
        {"choices": [{"routed_experts": npy64(np.zeros((0, 4, 2), np.uint8))}]},
        {"choices": [{"routed_experts": npy64(np.zeros((3, 4, 2)))}]},
        {"choices": [{"routed_experts": base64.b64encode(b"\x93NUMPY\x01\x00").decode()}]},
        {"choices": 4, "usage": 5},
        [
            {"meta_info": {"routed_experts": npy64(reply_ids(3))}},
            {"meta_info": {"routed_experts": npy64(reply_ids(3)[:, :3])}},
        ],
    ],
)
def test_wrong_replies_are_named(reply, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(reply))
    with pytest.raises(InputFileError, match=r"x\.json"):
        read_routed_experts(tmp_path / "x.json", MODEL)


def test_a_broken_line_is_named_and_raw_ids_need_a_model(tmp_path):
    line = json.dumps({"meta_info": {"routed_experts": raw32(reply_ids(5))}})
    (tmp_path / "x").write_text(f"{line}\n{line[:-4]}\n")
    with pytest.raises(InputFileError, match="line 2"):
        read_routed_experts(tmp_path / "x", MODEL)
    (tmp_path / "x").write_text(line)
    with pytest.raises(UsageError, match="--model"):
        read_routed_experts(tmp_path / "x")
    three = ModelSpec.uniform("m", num_experts=8, top_k=2, moe_layers=(1,), num_hidden_layers=3)
    with pytest.raises(InputFileError, match="not a multiple"):
        read_routed_experts(tmp_path / "x", three)


# logical_count


def test_logical_count_drops_and_names_dense_layers(tmp_path):
    counts = np.arange(5 * 4).reshape(5, 4)
    counts[[0, 3]] = 0
    (tmp_path / "x").write_text(json.dumps({"logical_count": counts.tolist(), "rank": 0}))
    loaded = read_any(tmp_path / "x")
    assert isinstance(loaded, LoadCounts)
    assert loaded.model.moe_layers == (1, 2, 4)
    assert loaded.model.num_hidden_layers == 5
    assert np.array_equal(loaded.load_WLE, counts[None, [1, 2, 4]])
    assert any("layers 0, 3" in note for note in loaded.notes)
    assert any("rank" in note for note in loaded.notes)


def test_logical_count_of_several_steps_and_a_known_model(tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, (3, 4, 8))
    counts[:, [0, 3]] = 0
    counts[1] = 0
    (tmp_path / "x").write_text(json.dumps({"logical_count": counts.astype(float).tolist()}))
    loaded = read_logical_count(tmp_path / "x", MODEL)
    assert loaded.model is MODEL
    assert np.array_equal(loaded.load_WLE, counts[[0, 2]][:, 1:3])
    assert any("1 of 3 steps are empty" in note for note in loaded.notes)
    profile = load_counts_profile(loaded)
    assert np.array_equal(profile.load_WLE, loaded.load_WLE)
    assert profile.load_FLE.shape[0] == 1
    assert profile.trace_sha256 == loaded.sha256


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("text", InputFileError),
        (None, InputFileError),
        ([], InputFileError),
        ([1, 2], InputFileError),
        ([[1, 2], [3]], InputFileError),
        ([[-1, 2]], InputFileError),
        ([[1.5, 2]], InputFileError),
        ([[float("nan"), 2]], InputFileError),
        ([[float("inf"), 2]], InputFileError),
        ([[1e300, 2]], InputFileError),
        ([[10**40, 2]], InputFileError),
        ([["a"]], InputFileError),
        ([[True]], InputFileError),
        ([[0, 0], [0, 0]], InputFileError),
        ([[[[1]]]], InputFileError),
        ([[1] * 8] * 3, MismatchError),
        ([[1] * 9] * 4, MismatchError),
        ([[1] * 8] * 4, MismatchError),
    ],
)
def test_wrong_counts_are_refused(value, error, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"logical_count": value}))
    with pytest.raises(error, match=r"x\.json"):
        read_logical_count(tmp_path / "x.json", MODEL)


@pytest.mark.data
def test_reads_the_deepseek_counts():
    path = DATA / "deepseekv3_load" / "expert_workload.json"
    if not path.exists():
        pytest.skip("the developers' traces are not here")
    loaded = read_any(path)
    assert loaded.load_WLE.shape == (1, 58, 256)
    assert loaded.model.moe_layers == tuple(range(3, 61))


# read_any


def test_every_source_has_a_reader_and_unknown_ones_are_named(tmp_path):
    known = {"placer", "npz", "jsonl", "sglang", "vllm", "routed_experts", "logical_count", "imatrix", "ktransformers"}
    assert set(READERS) == known
    (tmp_path / "x").write_text("hello")
    with pytest.raises(InputFileError, match="none of"):
        read_any(tmp_path / "x")
    (tmp_path / "z").write_text('{"total_input_tokens": 3}')
    with pytest.raises(InputFileError, match="JSON without any of the fields"):
        read_any(tmp_path / "z")
    with pytest.raises(UsageError, match="use one of"):
        read_any(tmp_path / "x", source="csv")
    with pytest.raises(InputFileError, match="does not exist"):
        read_any(tmp_path / "y")
    with pytest.raises(InputFileError, match=r"no \.pt files"):
        read_any(tmp_path)


def test_reads_the_store_and_takes_another_model(tmp_path):
    trace = make_trace()
    save_trace(trace, tmp_path / "x")
    assert read_any(tmp_path / "x").sha256 == trace.sha256
    wide = ModelSpec.uniform("wide", num_experts=300, top_k=2, num_hidden_layers=3)
    renamed = read_any(tmp_path / "x", model=wide)
    assert renamed.model is wide
    assert renamed.expert_LTK.dtype == np.uint16
    assert np.array_equal(renamed.expert_LTK, trace.expert_LTK)
    with pytest.raises(MismatchError):
        read_any(tmp_path / "x", model=MODEL)
    with pytest.raises(InputFileError):
        read_any(tmp_path / "x", model=ModelSpec.uniform("few", num_experts=4, top_k=2, num_hidden_layers=3))


@pytest.mark.parametrize("source", [name for name in READERS if name != "sglang"])
def test_every_reader_reports_progress_to_the_end(source, tmp_path):
    trace = make_trace(tokens=40)
    path = tmp_path / "x"
    if source == "placer":
        save_trace(trace, path)
    elif source == "npz":
        with path.open("wb") as file:
            np.savez(file, expert_TLK=trace.expert_LTK.transpose(1, 0, 2))
    elif source == "jsonl":
        write_lines(path, [token_line(trace, token, False) for token in range(40)])
    elif source == "logical_count":
        path.write_text(json.dumps({"logical_count": [[1, 2], [3, 4]]}))
    elif source == "imatrix":
        path.write_bytes(imatrix({0: [1, 2], 1: [3, 4]}))
    elif source == "ktransformers":
        torch = pytest.importorskip("torch")
        torch.save({"logical_count": torch.tensor([[[1, 2], [3, 4]]])}, path)
    else:
        path.write_text(json.dumps({"choices": [{"routed_experts": npy64(reply_ids(9))}]}))
    seen = []
    read_any(path, source, None, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("reader", [read_jsonl, read_routed_experts, read_logical_count, read_any])
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@RELAXED
def test_garbage_is_refused(reader, data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlacerError):
        reader(tmp_path / "x")
