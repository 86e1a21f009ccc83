import json
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_cases import make_trace, one_line_errors, traces

from placer.core.errors import InputFileError, PlacerError
from traces.counts import LoadCounts, load_counts_profile
from traces.profile_store import load_profile, save_profile
from traces.store import save_trace
from traces.summarize import summarize
from traces.tensorfile import TensorSpec, read_tensor_file, write_tensor_file

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARRAYS = ("load_WLE", "load_FLE", "coactivation_LEE", "transition_LEE", "load_SLE")


def same(one, other):
    for name in ARRAYS:
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        assert first is None or (first.dtype == second.dtype and np.array_equal(first, second))
    for left, right in zip(one.sets, other.sets, strict=True):
        assert left.expert_HK.dtype == right.expert_HK.dtype
        assert np.array_equal(left.expert_HK, right.expert_HK)
        assert np.array_equal(left.weight_H, right.weight_H)
        assert left.coverage == right.coverage
    for name in ("model", "trace_sha256", "num_tokens", "num_requests", "window_tokens"):
        assert getattr(one, name) == getattr(other, name)


@given(trace=traces(), most=st.integers(1, 60))
@RELAXED
def test_round_trip(trace, most, tmp_path):
    profile = summarize(trace, window_tokens=11, max_sets_per_layer=most)
    save_profile(profile, tmp_path / "x")
    same(load_profile(tmp_path / "x"), profile)
    first = (tmp_path / "x").read_bytes()
    save_profile(load_profile(tmp_path / "x"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == first


def test_counts_alone_round_trip(tmp_path):
    model = make_trace().model
    counts = LoadCounts(model=model, load_WLE=np.arange(48, dtype=np.int64).reshape(2, 3, 8))
    profile = load_counts_profile(counts)
    assert profile.load_FLE.shape == (1, 3, 8)
    assert np.array_equal(profile.load_LE, counts.load_LE)
    assert profile.num_tokens == -(-int(counts.load_LE.sum(axis=1).max()) // 2)
    assert profile.sets == ()
    assert profile.coactivation_LEE is None
    save_profile(profile, tmp_path / "x")
    same(load_profile(tmp_path / "x"), profile)


def test_truncation_at_every_byte_is_refused(tmp_path):
    save_profile(summarize(make_trace(tokens=5, layers=2, experts=3)), tmp_path / "cut")
    for length in reversed(range((tmp_path / "cut").stat().st_size)):
        os.truncate(tmp_path / "cut", length)
        with pytest.raises(InputFileError, match="cut"):
            load_profile(tmp_path / "cut")


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_raises_input_file_error_or_nothing(tmp_path, data):
    path = tmp_path / "x"
    if not path.exists():
        save_profile(summarize(make_trace(tokens=9, layers=2, experts=4, sources=2)), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "y").write_bytes(content)
    with one_line_errors(InputFileError, naming="y:"):
        load_profile(tmp_path / "y")


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlacerError):
        load_profile(tmp_path / "x")


def test_a_trace_is_no_profile(tmp_path):
    save_trace(make_trace(), tmp_path / "x")
    with pytest.raises(InputFileError, match="not a placer profile"):
        load_profile(tmp_path / "x")


def rewrite(path, name, change):
    """Writes the file again with one array or header text changed, past every check that a Profile makes."""
    file = read_tensor_file(path)
    arrays, texts = {n: a.copy() for n, a in file.arrays.items()}, dict(file.metadata)
    if name in arrays:
        arrays[name] = change(arrays[name])
    else:
        texts[name] = change(texts[name])
    specs = {n: TensorSpec(array.dtype, array.shape) for n, array in arrays.items()}
    write_tensor_file(path, specs, arrays.items(), lambda: texts, texts)


def nan_like(array):
    return np.full_like(array, np.nan)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("load_WLE", lambda array: array[:, :, :3]),
        ("load_WLE", lambda array: array[0]),
        ("load_WLE", lambda array: array.astype(np.int32)),
        ("load_WLE", np.negative),
        ("load_FLE", np.negative),
        ("load_FLE", lambda array: array[:, :2]),
        ("coactivation_LEE", np.negative),
        ("coactivation_LEE", lambda array: array[:, :3, :3]),
        ("transition_LEE", lambda array: array[:0]),
        ("transition_LEE", np.negative),
        ("load_SLE", lambda array: array[:, :, :1]),
        ("load_SLE", lambda array: array.astype(np.float64)),
        ("num_tokens", lambda text: "many"),
        ("num_tokens", lambda text: "9" * 30),
        ("window_tokens", lambda text: "-1"),
        ("model", lambda text: text.replace("num_experts", "num_expert")),
        ("schema", lambda text: "7"),
        ("set_expert_HK", lambda array: array + np.int16(8)),
        ("set_expert_HK", lambda array: array - np.int16(9)),
        ("set_expert_HK", lambda array: array.astype(np.int32)),
        ("set_weight_H", np.negative),
        ("set_weight_H", lambda array: array[1:]),
        ("set_stop_L", lambda array: array[1:]),
        ("set_coverage_L", lambda array: array + 1.5),
        ("set_coverage_L", nan_like),
    ],
)
def test_wrong_contents_are_named(name, change, tmp_path):
    path = tmp_path / "x.profile"
    save_profile(summarize(make_trace(sources=2)), path)
    rewrite(path, name, change)
    with pytest.raises(InputFileError, match=r"x\.profile") as caught:
        load_profile(path)
    assert name in str(caught.value) or name.startswith("set_")


def test_set_ends_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "x"
    save_profile(summarize(make_trace()), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])["set_stop_L"]["data_offsets"]
    for stops in ((5, 3, 9), (0, 0, 0), (0, 0, 10**12), (-4, 0, 3)):
        wrong = data[: 8 + size + begin] + struct.pack("<3q", *stops) + data[8 + size + end :]
        path.write_bytes(wrong)
        with pytest.raises(InputFileError, match=r"set_stop_L|sets"):
            load_profile(path)
