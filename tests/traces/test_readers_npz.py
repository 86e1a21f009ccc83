import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_cases import DATA, make_trace, same_arrays, traces

from placer.core.errors import InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.readers import read_any
from traces.readers.npy import array_from_bytes, open_members
from traces.readers.npz import read_npz

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_npz(trace):
    """The arrays of the npz layout, token-major."""
    arrays = {"expert_TLK": trace.expert_LTK.transpose(1, 0, 2)}
    if trace.weight_LTK is not None:
        arrays["weight_TLK"] = trace.weight_LTK.transpose(1, 0, 2)
    arrays |= {n: a for n, a in trace.arrays().items() if a.ndim == 1 and not n.startswith("tag_")}
    for name, tag in trace.tags.items():
        arrays[f"{name}_T"] = tag.codes_T
        arrays[f"{name}s"] = np.array(tag.names)
    return arrays


def unset_weights(trace):
    return None if trace.weight_LTK is None else np.where(trace.expert_LTK == trace.sentinel, 0, trace.weight_LTK)


@given(trace=traces(), packed=st.booleans(), signed=st.booleans(), layer_major=st.booleans())
@RELAXED
def test_round_trip(trace, packed, signed, layer_major, tmp_path):
    arrays = as_npz(trace)
    if signed:
        ids = arrays["expert_TLK"].astype(np.int64)
        arrays["expert_TLK"] = np.where(ids == trace.sentinel, -1, ids).astype(np.int32)
    if layer_major:
        arrays["expert_LTK"] = arrays.pop("expert_TLK").transpose(1, 0, 2)
    (np.savez_compressed if packed else np.savez)(tmp_path / "x.npz", **arrays)
    loaded = read_any(tmp_path / "x.npz", model=trace.model)
    used = trace.expert_LTK != trace.sentinel
    columns = used.any(axis=(0, 1)).nonzero()[0].max(initial=0) + 1
    if any("zero_" in note for note in loaded.notes):
        return  # random ids of a tiny model may look like padding; test_detect says what then happens
    expected = trace.expert_LTK[:, :, :columns].astype(int)
    expected[~used[:, :, :columns]] = loaded.sentinel
    assert np.array_equal(loaded.expert_LTK, expected)
    assert np.array_equal(loaded.request_id_T, trace.request_id_T)
    if trace.weight_LTK is not None:
        assert np.array_equal(loaded.weight_LTK, unset_weights(trace)[:, :, :columns])
    for name in ("position_T", "token_id_T", "phase_T", "step_T", "source_rank_T", "arrival_ns_T"):
        assert np.array_equal(getattr(loaded, name), getattr(trace, name))
    assert {n: (t.names, t.codes_T.tolist()) for n, t in loaded.tags.items()} == {
        n: (t.names, t.codes_T.tolist()) for n, t in trace.tags.items()
    }


def test_reading_in_pieces_is_reading_at_once(tmp_path):
    trace = make_trace(tokens=3000, weights=True)
    np.savez(tmp_path / "x.npz", **as_npz(trace))
    with open_members(tmp_path / "x.npz") as members:
        pieces = list(members["expert_TLK"].rows(most_bytes=1000))
        assert len(pieces) > 10
        assert np.array_equal(np.concatenate([part for _, part in pieces]), members["expert_TLK"].read())
        assert [start for start, _ in pieces] == np.cumsum([0, *(len(part) for _, part in pieces[:-1])]).tolist()


def test_fortran_order_is_read(tmp_path):
    trace = make_trace(tokens=50)
    arrays = as_npz(trace)
    np.savez(tmp_path / "x.npz", **{**arrays, "expert_TLK": np.asfortranarray(arrays["expert_TLK"])})
    assert same_arrays(read_npz(tmp_path / "x.npz", trace.model), trace)


def test_the_model_is_inferred_and_said_to_be(tmp_path):
    trace = make_trace(tokens=300, experts=9)
    np.savez(tmp_path / "x.npz", expert_TLK=trace.expert_LTK.transpose(1, 0, 2))
    loaded = read_npz(tmp_path / "x.npz")
    assert (loaded.model.num_experts, loaded.model.top_k, loaded.model.moe_layers) == (9, 2, (0, 1, 2))
    assert any("expert ids up to 8 -> 9 experts" in note and "--model" in note for note in loaded.notes)
    assert any("one request" in note for note in loaded.notes)
    assert loaded.num_requests == 1


def test_rows_of_all_hidden_layers_are_cut_to_the_models(tmp_path):
    trace = make_trace(tokens=300)
    full = np.zeros((300, 6, 2), dtype=np.uint8)
    full[:, [0, 2, 4]] = trace.expert_LTK.transpose(1, 0, 2)
    np.savez(tmp_path / "x.npz", expert_TLK=full, request_id_T=trace.request_id_T)
    loaded = read_npz(tmp_path / "x.npz", trace.model)
    assert same_arrays(loaded, trace)
    assert any("3 rows of layers without experts left out" in note for note in loaded.notes)
    guessed = read_npz(tmp_path / "x.npz")
    assert guessed.model.moe_layers == (0, 2, 4)
    assert any("dense_layer" in note and "1, 3, 5" in note for note in guessed.notes)


def test_wrong_model_is_refused(tmp_path):
    trace = make_trace(tokens=300)
    np.savez(tmp_path / "x.npz", **as_npz(trace))
    with pytest.raises(MismatchError, match="3 MoE layers, model 'four' has 4"):
        read_npz(tmp_path / "x.npz", ModelSpec.uniform("four", num_experts=8, top_k=2, num_hidden_layers=4))
    with pytest.raises(InputFileError, match="give logical ids and the right model"):
        read_npz(tmp_path / "x.npz", ModelSpec.uniform("few", num_experts=5, top_k=2, num_hidden_layers=3))


def test_texts_become_tags_and_request_numbers(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        expert_TLK=make_trace(tokens=6).expert_LTK.transpose(1, 0, 2),
        request_id_T=np.array(["b", "b", "a", "a", "c", "b"]),
        domain_T=np.array(["law", "law", "art", "art", "law", "art"]),
        year_T=np.array([2020, 2020, 2021, 2021, 2020, 2020]),
        about=np.array(["made", "up"]),
    )
    loaded = read_npz(tmp_path / "x.npz")
    assert loaded.request_id_T.tolist() == [0, 0, 1, 1, 2, 0]
    assert loaded.tags["domain"].names == ("art", "law")
    assert loaded.tags["domain"].codes_T.tolist() == [1, 1, 0, 0, 1, 0]
    assert loaded.tags["year"].names == ("2020", "2021")
    assert any("arrays left out: about" in note for note in loaded.notes)


def test_large_request_ids_are_renumbered(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        expert_TLK=make_trace(tokens=4).expert_LTK.transpose(1, 0, 2),
        request_id_T=np.array([2**60, 2**60, 3, -1]),
    )
    assert read_npz(tmp_path / "x.npz").request_id_T.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array expert_TLK"),
        ({"expert_TLK": np.zeros((3, 4), np.uint8)}, "shape"),
        ({"expert_TLK": np.zeros((0, 3, 2), np.uint8)}, "holds nothing"),
        ({"expert_TLK": np.zeros((3, 3, 0), np.uint8)}, "holds nothing"),
        ({"expert_TLK": np.full((9, 2, 2), 0.5)}, "give integers"),
        ({"expert_TLK": np.full((9, 2, 2), -2)}, "expert id -2"),
        ({"expert_TLK": np.full((9, 2, 2), 70000)}, "expert id 70000"),
        ({"expert_TLK": np.full((40, 2, 2), -1)}, "no layer holds routing"),
        ({"weight_TLK": np.zeros((40, 3, 3), np.float16)}, "weight_TLK"),
        ({"weight_TLK": np.zeros((39, 3, 2), np.float16)}, "weight_TLK"),
        ({"weight_TLK": np.full((40, 3, 2), np.nan)}, "finite"),
        ({"weight_TLK": np.full((40, 3, 2), 1e30)}, "finite"),
        ({"weight_TLK": np.full((40, 3, 2), "x")}, "weights are"),
        ({"request_id_T": np.zeros(39, np.int32)}, "request_id_T"),
        ({"request_id_T": np.zeros(40)}, "request ids are float64"),
        ({"position_T": np.zeros(40)}, "position_T"),
        ({"position_T": np.full(40, 2**40)}, "do not fit int32"),
        ({"phase_T": np.full(40, 3)}, "phase_T"),
        ({"phase_T": np.full(40, 300)}, "do not fit uint8"),
        ({"topic_T": np.full(40, 3), "topics": np.array(["a"])}, "code 3 and 1 names"),
        ({"topic_T": np.full(40, "a"), "topics": np.array(["a"])}, "integer codes"),
        ({"topic_T": np.zeros(40)}, "codes or texts"),
        ({"expert_TLK": np.array([[[None]]], dtype=object)}, "no objects"),
        ({"names": np.array([None], dtype=object)}, "no objects"),
    ],
)
def test_wrong_contents_are_named(arrays, message, tmp_path):
    good = as_npz(make_trace())
    if not arrays:
        good.pop("expert_TLK")
    np.savez(tmp_path / "x.npz", **{**good, **arrays})
    with pytest.raises(InputFileError, match=message):
        read_npz(tmp_path / "x.npz")


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def npy(header, data=b""):
    text = header.encode("latin1").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 8), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (281474976710655, 281474976710655), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-4,), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': 4, }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1,)*99, }",
        "{'descr': '|u1', 'shape': (4,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '|V4', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<U4000000', 'fortran_order': False, 'shape': (1,), }",
        "[1, 2]",
        "__import__('os').abort()",
        "((((((((((((((((((((((((((((((((((((((((((((((((((((((",
        "1is 2",
        "",
    ],
)
def test_wrong_array_headers_are_refused_before_memory_is_taken(header, tmp_path):
    archive(tmp_path / "x.npz", {"expert_TLK": npy(header, b"\x01\x02\x03\x04")})
    with pytest.raises(InputFileError, match=r"x\.npz"):
        read_npz(tmp_path / "x.npz")
    with pytest.raises(InputFileError):
        array_from_bytes(npy(header, b"\x01\x02\x03\x04"), "here")


def test_a_zip_bomb_is_refused(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (100000000, 1, 1), }"
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = npy(header)
    body = squeezed.compress(data) + squeezed.flush()
    path = tmp_path / "x.npz"
    archive(path, {"expert_TLK": data}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    # both directory entries claim that the few bytes unpack to 100 MB
    claimed = struct.pack("<I", len(data) + 100_000_000)
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = content.index(signature) + offset
        content[place : place + 4] = claimed
    path.write_bytes(content)
    assert len(body) < 1000
    with pytest.raises(InputFileError, match="more than the file can hold"):
        read_npz(path)


def test_pickles_and_foreign_zips_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    archive(tmp_path / "x.npz", {"expert_TLK": buffer.getvalue()})
    with pytest.raises(InputFileError, match="no objects"):
        read_npz(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(InputFileError, match="it has none"):
        read_npz(tmp_path / "y.npz")
    with pytest.raises(InputFileError):
        read_npz(tmp_path / "absent.npz")


@pytest.mark.data
def test_reads_the_gpt_oss_trace():
    path = DATA / "gptoss20b" / "mmlu.npz"
    if not path.exists():
        pytest.skip("the developers' traces are not here")
    loaded = read_any(path)
    with np.load(path) as arrays:
        assert np.array_equal(loaded.expert_LTK, arrays["expert_TLK"].transpose(1, 0, 2))
        assert np.array_equal(loaded.weight_LTK, arrays["weight_TLK"].transpose(1, 0, 2))
    assert loaded.model.num_experts == 32
    assert loaded.num_requests == 498
    assert loaded.tags["dataset"].names[0] == "mmlu_test"
    assert len(loaded.notes) == 1
