import json
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from trace_cases import make_trace, one_line_errors, same_arrays, traces

from placer.core.errors import InputFileError, PlacerError, UsageError
from traces.store import load_trace, save_trace, save_trace_by_layer
from traces.tensorfile import TensorSpec, read_tensor_file, write_tensor_file

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(trace=traces())
@RELAXED
def test_round_trip(trace, tmp_path):
    path = tmp_path / "x.trace"
    save_trace(trace, path)
    loaded = load_trace(path, verify="hash")
    assert same_arrays(loaded, trace)
    assert loaded.sha256 == trace.sha256
    assert loaded.model == trace.model
    assert (loaded.notes, loaded.provenance) == (trace.notes, trace.provenance)
    assert {name: tag.names for name, tag in loaded.tags.items()} == {n: t.names for n, t in trace.tags.items()}
    first = path.read_bytes()
    save_trace(loaded, path)
    assert path.read_bytes() == first


def test_the_safetensors_library_reads_it(tmp_path):
    trace = make_trace(weights=True, columns=True, tags=True, wide=True)
    save_trace(trace, tmp_path / "x")
    arrays = load_file(tmp_path / "x")
    assert set(arrays) == set(trace.arrays())
    for name, array in trace.arrays().items():
        assert np.array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_loading_maps_the_file(tmp_path):
    save_trace(make_trace(columns=True), tmp_path / "x")
    trace = load_trace(tmp_path / "x", verify="none")
    for array in trace.arrays().values():
        base = array
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        assert isinstance(base if not isinstance(base, memoryview) else base.obj, mmap.mmap)


def test_a_file_of_terabytes_loads_without_memory(tmp_path):
    # a sparse file: 2^40 bytes of ids that nobody may read at once
    layers, tokens, top_k = 2, 2**36, 8
    model = make_trace(layers=2, top_k=2).model
    header = {
        "__metadata__": {
            "format": "placer-trace",
            "schema": "1",
            "sha256": "0" * 64,
            "model": json.dumps(model.to_dict()),
        },
        "request_id_T": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, 4 * tokens]},
        "expert_LTK": {
            "dtype": "U8",
            "shape": [layers, tokens, top_k],
            "data_offsets": [4 * tokens, 4 * tokens + layers * tokens * top_k],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + 4 * tokens + layers * tokens * top_k)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    file = read_tensor_file(path)
    assert file.arrays["expert_LTK"].shape == (layers, tokens, top_k)
    assert int(file.arrays["expert_LTK"][1, tokens - 1, 7]) == 0


@given(trace=traces())
@RELAXED
def test_layer_by_layer_writes_the_same_bytes(trace, tmp_path):
    save_trace(trace, tmp_path / "whole")
    cubes = tuple(name for name, array in trace.arrays().items() if array.ndim == 3)
    columns = {
        name: array
        for name, array in trace.arrays().items()
        if array.ndim == 1 and name != "request_id_T" and not name.startswith("tag_")
    }
    save_trace_by_layer(
        tmp_path / "streamed",
        model=trace.model,
        layers=({name: getattr(trace, name)[row] for name in cubes} for row in range(trace.model.num_sites)),
        num_tokens=trace.num_tokens,
        top_k=trace.expert_LTK.shape[2],
        dtype=trace.expert_LTK.dtype,
        request_id_T=trace.request_id_T,
        columns=columns,
        tags=trace.tags,
        cubes=cubes,
        provenance=trace.provenance,
        notes=trace.notes,
    )
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def stream(path, trace, layers):
    save_trace_by_layer(
        path,
        model=trace.model,
        layers=({"expert_LTK": layer} for layer in layers),
        num_tokens=trace.num_tokens,
        top_k=2,
        dtype=np.dtype(np.uint8),
        request_id_T=trace.request_id_T,
    )


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(lambda ids: ids[:2], id="too few"),
        pytest.param(lambda ids: [*ids, ids[0]], id="too many"),
        pytest.param(lambda ids: [ids[0], ids[1], ids[2] + np.uint8(8)], id="ids out of range"),
        pytest.param(lambda ids: [ids[0], ids[1], ids[2][:-1]], id="too short"),
        pytest.param(lambda ids: [ids[0], ids[1], ids[2].astype(np.uint16)], id="other type"),
    ],
)
def test_streaming_refuses_wrong_layers_and_leaves_nothing(layers, tmp_path):
    trace = make_trace()
    with pytest.raises(UsageError):
        stream(tmp_path / "x", trace, layers(trace.expert_LTK))
    assert list(tmp_path.iterdir()) == []


@given(trace=traces(), seed=st.integers(0, 9))
@RELAXED
def test_writes_a_part_of_a_trace(trace, seed, tmp_path):
    mask = np.random.default_rng(seed).random(trace.num_tokens) < 0.5
    save_trace(trace, tmp_path / "x", tokens=mask)
    assert same_arrays(load_trace(tmp_path / "x", verify="hash"), trace.select_tokens(mask))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save_trace(make_trace(1), tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(UsageError):
        stream(tmp_path / "x", make_trace(2), [])
    assert (tmp_path / "x").read_bytes() == before
    with pytest.raises(InputFileError):
        save_trace(make_trace(), tmp_path / "no" / "folder")


def test_truncation_at_every_byte_is_refused(tmp_path):
    save_trace(make_trace(tokens=6, weights=True, tags=True), tmp_path / "cut")
    data = (tmp_path / "cut").read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(tmp_path / "cut", length)
        with pytest.raises(InputFileError, match="cut"):
            load_trace(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"x")
    with pytest.raises(InputFileError, match="after the last array"):
        load_trace(tmp_path / "cut")


def test_every_flipped_data_bit_is_seen_by_the_hash(tmp_path):
    trace = make_trace(tokens=4, weights=True)
    save_trace(trace, tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, len(data)):
        data[place] ^= 1
        (tmp_path / "y").write_bytes(data)
        with pytest.raises(InputFileError):
            load_trace(tmp_path / "y", verify="hash")
        data[place] ^= 1


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_raises_input_file_error_or_nothing(tmp_path, data):
    path = tmp_path / "x"
    if not path.exists():
        save_trace(make_trace(tokens=6, weights=True, columns=True, tags=True, nulls=1), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "y").write_bytes(content)
    with one_line_errors(InputFileError, naming="y:"):
        load_trace(tmp_path / "y", verify=data.draw(st.sampled_from(["ids", "hash", "none"])))


def rewrite(path, change):
    """Applies `change(header)` to a file's header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_text(name, value):
    def change(header):
        header["__metadata__"][name] = value

    return change


def set_entry(name, field, value):
    def change(header):
        header[name][field] = value

    return change


def edit_model(**fields):
    def change(header):
        model = json.loads(header["__metadata__"]["model"])
        header["__metadata__"]["model"] = json.dumps({**model, **fields})

    return change


def edit_site(**fields):
    def change(header):
        model = json.loads(header["__metadata__"]["model"])
        model["sites"][0].update(fields)
        header["__metadata__"]["model"] = json.dumps(model)

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_text("format", "placer-profile"),
        set_text("schema", "2"),
        set_text("sha256", "xyz"),
        set_text("model", "{"),
        set_text("model", "[]"),
        set_text("model", "null"),
        set_text("notes", "{}"),
        set_text("notes", "[1]"),
        set_text("tags", "[]"),
        set_text("tags", "{}"),
        set_text("tags", '{"language": ["de"], "task": ["a", "b"]}'),
        set_text("tags", '{"language": [1, 2, 3], "task": ["a", "b"]}'),
        set_text("notes", "[" * 5000),
        edit_model(top_k=0),
        edit_model(top_k="2"),
        edit_model(hidden_size=None),
        edit_model(name=3),
        edit_model(weight_bytes="2"),
        edit_model(sites=[]),
        edit_model(sites=3),
        edit_model(unknown=3),
        edit_site(num_experts=10**12),
        edit_site(num_experts=2.5),
        edit_site(num_experts=1),
        edit_site(layer="0"),
        edit_site(layer=True),
        edit_site(num_null_experts=-1),
        edit_site(pool=1.5),
        set_entry("expert_LTK", "dtype", "I8"),
        set_entry("expert_LTK", "dtype", "Q8"),
        set_entry("expert_LTK", "dtype", ["U8"]),
        set_entry("expert_LTK", "shape", [10**12, 10**12]),
        set_entry("expert_LTK", "shape", [2**61, 8, 0]),
        set_entry("expert_LTK", "shape", [3, 6, -2]),
        set_entry("expert_LTK", "shape", "3"),
        set_entry("expert_LTK", "shape", [3, 12, 1]),
        set_entry("expert_LTK", "data_offsets", [0]),
        set_entry("expert_LTK", "data_offsets", [0, 10**15]),
        set_entry("request_id_T", "dtype", "F32"),
        lambda header: header.pop("expert_LTK"),
        lambda header: header.pop("request_id_T"),
        lambda header: header.update({"expert_LTK": 3}),
        lambda header: header.update({"__metadata__": 3}),
        lambda header: header.update({"__metadata__": {"format": 3}}),
    ],
)
def test_a_wrong_header_is_named(change, tmp_path):
    path = tmp_path / "x.trace"
    save_trace(make_trace(tokens=6, tags=True), path)
    load_trace(path)
    rewrite(path, change)
    with pytest.raises(InputFileError, match=r"x\.trace"):
        load_trace(path)


def test_a_header_that_claims_the_world_is_refused_at_once(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b'{"a": 1}')
    with pytest.raises(InputFileError, match="truncated"):
        load_trace(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b'{"a": 1}')
    with pytest.raises(InputFileError, match="not a safetensors file"):
        load_trace(path)


def test_foreign_and_missing_files(tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "weights")
    for name in ("weights", "absent"):
        with pytest.raises(InputFileError, match=name):
            load_trace(tmp_path / name)
    with pytest.raises(InputFileError):
        load_trace(tmp_path)
    with pytest.raises(UsageError, match="verify"):
        load_trace(tmp_path / "weights", verify="all")


def test_an_unknown_array_is_named(tmp_path):
    trace = make_trace(tokens=6)
    save_trace(trace, tmp_path / "x")
    file = read_tensor_file(tmp_path / "x")
    arrays = {**file.arrays, "extra": np.zeros(3)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_tensor_file(tmp_path / "y", specs, arrays.items(), lambda: file.metadata, file.metadata)
    with pytest.raises(InputFileError, match="'extra' is unknown"):
        load_trace(tmp_path / "y")


def test_unaligned_arrays_of_other_writers_are_copied(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(5, dtype=np.int64)}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "I64", "shape": [5], "data_offsets": [3, 43]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + arrays["a"].tobytes() + arrays["b"].tobytes())
    loaded = read_tensor_file(tmp_path / "x").arrays
    assert all(np.array_equal(loaded[name], arrays[name]) and loaded[name].flags.aligned for name in arrays)


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlacerError):
        load_trace(tmp_path / "x")


def test_errors_name_the_file_by_its_path(tmp_path):
    with pytest.raises(InputFileError, match=str(Path("absent.trace"))):
        load_trace(tmp_path / "absent.trace")
