"""llama.cpp's imatrix and KTransformers' counts as load sources, and every way a GGUF file can be damaged."""

import struct

import numpy as np
import pytest
from gguf_bytes import gguf, imatrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_cases import one_line_errors

from placer.core.errors import InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts, load_counts_profile
from traces.readers import read_any
from traces.readers.gguf import read_gguf

LOAD = {1: [4, 0, 9, 2], 2: [1, 7, 3, 5]}
MODEL = ModelSpec.uniform("m", num_experts=4, top_k=2, moe_layers=(1, 2), num_hidden_layers=4)
ONE_FOLDER = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(tmp_path, content, name="imatrix.gguf"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("source", [None, "imatrix"])
@pytest.mark.parametrize("matrices", [("gate", "up", "down"), ("gate_up", "down"), ("up",)])
@pytest.mark.parametrize("model", [None, MODEL])
def test_expert_counts_are_the_load(source, matrices, model, tmp_path):
    counts = read_any(saved(tmp_path, imatrix(LOAD, matrices=matrices)), source, model)
    assert isinstance(counts, LoadCounts)
    assert counts.load_WLE.tolist() == [[LOAD[1], LOAD[2]]]
    assert counts.model.moe_layers == (1, 2)
    assert "wiki.txt" in counts.provenance
    assert load_counts_profile(counts).load_LE.tolist() == [LOAD[1], LOAD[2]]


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 64), (3, 8)])
def test_versions_and_alignments(version, alignment, tmp_path):
    values = {"general.alignment": alignment} if alignment != 32 else {}
    content = imatrix(LOAD, version=version, alignment=alignment, values=values)
    assert read_any(saved(tmp_path, content)).load_WLE.tolist() == [[LOAD[1], LOAD[2]]]


def test_values_and_tensors_come_back(tmp_path):
    values = {"a": True, "b": 7, "c": 0.5, "d": "text", "e": ["x", "yz"], "f": [1, 2, 3], "g": [0.25, 0.5]}
    tensors = {"t": np.arange(6.0).reshape(2, 3), "q": (8, (2, 32), bytes(68)), "u": np.arange(4.0)}
    found = read_gguf(saved(tmp_path, gguf(values, tensors)))
    assert found.values == values
    assert found.others == ("q",)
    assert sorted(found.tensors) == ["t", "u"]
    for name, array in found.tensors.items():
        assert np.array_equal(array, tensors[name])


def test_unlike_matrices_and_large_counts_are_noted(tmp_path):
    tensors = {"blk.2.ffn_down_exps.weight.counts": np.array([[2.0**25], [1], [1], [1]])}
    notes = " ".join(read_any(saved(tmp_path, imatrix(LOAD, tensors=tensors))).notes)
    assert "different counts in layers 2" in notes
    large = read_any(saved(tmp_path, imatrix({0: [2.0**24, 1]})))
    assert "2^24 and more are rounded" in " ".join(large.notes)


def legacy_dat():
    name = b"blk.0.ffn_gate_exps.weight"
    return struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii3f", 4, 3, 1, 2, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (legacy_dat(), "legacy .dat imatrix has no counts for each expert"),
        (b"", "legacy"),
        (gguf({"general.type": "model"}, {}), "type 'model'"),
        (gguf({}, {}), "type 'None'"),
        (imatrix({}), "no counts of expert tensors"),
        (imatrix({0: [1, 2], 1: [1, 2, 3]}), "layers count 2 to 3 experts"),
        (imatrix({0: [0.5, 1]}), "whole numbers"),
        (imatrix({0: [np.nan, 1]}), "whole numbers"),
        (imatrix({0: [-1, 1]}), "counts are 0 or more"),
        (imatrix({0: [0, 0]}), "every count is 0"),
        (imatrix(LOAD, version=1), "GGUF version 1"),
        (imatrix(LOAD)[:-40], "lies outside"),
        (imatrix(LOAD)[:60], "damaged GGUF file"),
        (imatrix(LOAD, values={"general.alignment": 0}), "general.alignment is 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "tensors do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "values do not fit"),
        (gguf({}, {"t": (0, (2**31, 2**31), b"")}), "lies outside"),
        (gguf({}, {"t": (0, (1,) * 5, bytes(4))}), "5 dimensions"),
    ],
)
def test_everything_else_is_refused_in_one_line(content, says, tmp_path):
    with pytest.raises(InputFileError, match=says) as caught:
        read_any(saved(tmp_path, content), "imatrix")
    assert "\n" not in str(caught.value)


def test_counts_of_another_model(tmp_path):
    path = saved(tmp_path, imatrix({5: [1, 2, 3, 4]}))
    with pytest.raises(MismatchError, match="counts layer 5"):
        read_any(path, model=MODEL)
    with pytest.raises(MismatchError, match="layer 0 has counts"):
        read_any(saved(tmp_path, imatrix({0: [1, 2, 3, 4]})), model=MODEL)


@ONE_FOLDER
@given(data=st.data())
def test_damaged_files(data, tmp_path):
    content = bytearray(imatrix(LOAD))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "drop", "high"]))
        if kind == "byte":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "high":
            content[place : place + 8] = b"\xff" * len(content[place : place + 8])
        elif kind == "cut" and place:
            del content[place:]
        else:
            del content[place : place + data.draw(st.integers(1, 9))]
        if not content:
            return
    with one_line_errors():
        assert isinstance(read_any(saved(tmp_path, bytes(content)), "imatrix"), LoadCounts)


def test_ktransformers_counts(tmp_path):
    torch = pytest.importorskip("torch")
    counts = np.zeros((2, 4, 4), dtype=np.int64)
    counts[:, 1], counts[:, 2] = LOAD[1], LOAD[2]
    torch.save({"logical_count": torch.from_numpy(counts)}, tmp_path / "counts.pt")
    found = read_any(tmp_path / "counts.pt", "ktransformers", MODEL)
    assert found.load_WLE.tolist() == [[LOAD[1], LOAD[2]]] * 2
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(InputFileError, match="no tensor logical_count"):
        read_any(tmp_path / "other.pt", "ktransformers")
    torch.save(torch.from_numpy(counts), tmp_path / "raw.pt")
    with pytest.raises(InputFileError, match="in place of a table"):
        read_any(tmp_path / "raw.pt", "ktransformers")
