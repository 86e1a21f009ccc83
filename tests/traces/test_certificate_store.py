"""Certificates on disk: what is saved is what is read, and damage is an InputFileError or leaves a readable file."""

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reader_fuzz import damaged
from trace_cases import make_trace, one_line_errors

from placer.core.certificates import Certificate
from placer.core.errors import InputFileError
from traces.certificate_store import KNOWN, StoredCertificate, load_certificate, save_certificate
from traces.profile_store import save_profile
from traces.summarize import summarize
from traces.tensorfile import TensorSpec, read_tensor_file, write_tensor_file

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
finite = st.floats(-1e9, 1e9)


@st.composite
def certificates(draw: Any) -> StoredCertificate:
    kind = draw(st.sampled_from(sorted(KNOWN)))
    names = draw(st.lists(st.sampled_from(sorted(KNOWN[kind])), unique=True)) if KNOWN[kind] else []
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    arrays = {name: rng.normal(size=rng.integers(0, 4, KNOWN[kind][name])) for name in names}
    return StoredCertificate(
        certificate=Certificate(
            kind=kind,
            objective_name=draw(st.text(max_size=8)),
            bound=draw(finite),
            proof=draw(st.text(max_size=8)),
            arrays=arrays,
            numbers=draw(st.dictionaries(st.sampled_from(["price", "node_weight"]), finite)),
        ),
        max_par=draw(st.none() | st.floats(1, 9)),
        trace_sha256="ab" * 32,
    )


def example() -> StoredCertificate:
    arrays = {
        "rank_u_LE": np.arange(6.0).reshape(2, 3),
        "load_q_LE": np.zeros((2, 3)),
        "rank_slope_HK": np.ones((5, 2)),
    }
    certificate = Certificate(
        kind="touched",
        objective_name="ranks_touched",
        bound=1.5,
        proof="rows and box",
        arrays=arrays,
        numbers={"price": 2.5},
    )
    return StoredCertificate(certificate=certificate, max_par=1.1, trace_sha256="ab" * 32)


@given(stored=certificates())
@RELAXED
def test_round_trip(stored: StoredCertificate, tmp_path: Any) -> None:
    save_certificate(stored, tmp_path / "x")
    read = load_certificate(tmp_path / "x")
    one, other = stored.certificate, read.certificate
    for name in ("kind", "objective_name", "bound", "proof", "numbers"):
        assert getattr(one, name) == getattr(other, name)
    assert sorted(one.arrays) == sorted(other.arrays)
    for name, array in one.arrays.items():
        assert np.array_equal(array, other.arrays[name])
    assert (read.max_par, read.trace_sha256) == (stored.max_par, stored.trace_sha256)
    first = (tmp_path / "x").read_bytes()
    save_certificate(read, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == first


def test_truncation_at_every_byte_is_refused(tmp_path: Any) -> None:
    save_certificate(example(), tmp_path / "cut")
    for length in reversed(range((tmp_path / "cut").stat().st_size)):
        os.truncate(tmp_path / "cut", length)
        with pytest.raises(InputFileError, match="cut"):
            load_certificate(tmp_path / "cut")


@given(data=st.data())
@FUZZ
def test_damage_raises_input_file_error_or_nothing(data: Any, tmp_path: Any) -> None:
    if not (tmp_path / "x").exists():
        save_certificate(example(), tmp_path / "x")
    (tmp_path / "y").write_bytes(damaged(data, (tmp_path / "x").read_bytes()))
    with one_line_errors(InputFileError, naming="y:"):
        load_certificate(tmp_path / "y")


@given(data=st.binary(max_size=300))
@RELAXED
def test_garbage_is_refused(data: bytes, tmp_path: Any) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputFileError):
        load_certificate(tmp_path / "x")


def test_a_profile_is_no_certificate_and_a_missing_file_none(tmp_path: Any) -> None:
    save_profile(summarize(make_trace()), tmp_path / "x")
    with pytest.raises(InputFileError, match="not a placer certificate"):
        load_certificate(tmp_path / "x")
    with pytest.raises(InputFileError, match="nowhere"):
        load_certificate(tmp_path / "nowhere")


def rewrite(path: Any, texts: dict[str, str | None], arrays: dict[str, np.ndarray]) -> None:
    """Writes the file again with header texts (None: dropped) and arrays changed."""
    file = read_tensor_file(path)
    all_arrays = {**{name: array.copy() for name, array in file.arrays.items()}, **arrays}
    all_texts = {name: text for name, text in {**file.metadata, **texts}.items() if text is not None}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in all_arrays.items()}
    write_tensor_file(path, specs, all_arrays.items(), lambda: all_texts, all_texts)


@pytest.mark.parametrize(
    ("texts", "arrays", "says"),
    [
        ({"schema": "2"}, {}, "certificate schema '2'; this placer reads 1"),
        ({"bound": None}, {}, "header field bound is missing"),
        ({"extra": "x"}, {}, "header field 'extra' is unknown"),
        ({"kind": "magic"}, {}, "kind is 'magic'; this placer knows par, kept, touched"),
        ({"kind": "kept"}, {}, "is unknown to certificates of kind kept"),
        ({"numbers": "[1]"}, {}, "numbers is '[1]', not a table"),
        ({"numbers": "{"}, {}, "numbers is '{', not JSON"),
        ({"numbers": '{"price": "x"}'}, {}, "numbers has 'price': 'x', no number"),
        ({"numbers": '{"price": NaN}'}, {}, "numbers has 'price': 'nan', no number"),
        ({"bound": "true"}, {}, "bound is 'true', not a number"),
        ({"bound": "1e999"}, {}, "bound is '1e999', not a number"),
        ({"max_par": "0.5"}, {}, "max_par is '0.5', not a load cap"),
        ({"max_par": '"x"'}, {}, "not a load cap"),
        ({}, {"more_LE": np.zeros((1, 1))}, "array 'more_LE' is unknown"),
        ({}, {"rank_u_LE": np.zeros(3)}, "rank_u_LE is float64 (3,), not float64 with 2 axes"),
        ({}, {"rank_u_LE": np.zeros((2, 3), dtype=np.float32)}, "rank_u_LE is float32"),
        ({}, {"rank_u_LE": np.full((2, 3), np.nan)}, "rank_u_LE has a value that is no number"),
    ],
)
def test_every_field_is_looked_at(
    texts: dict[str, str | None], arrays: dict[str, np.ndarray], says: str, tmp_path: Any
) -> None:
    save_certificate(example(), tmp_path / "x")
    rewrite(tmp_path / "x", texts, arrays)
    with pytest.raises(InputFileError) as caught:
        load_certificate(tmp_path / "x")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")


def test_every_kind_can_be_stored_and_set_beside_a_plan() -> None:
    from typing import get_args

    from placer.core.certificates.certificate import CertificateKind
    from placer.pipeline.proving import KINDS
    from traces.certificate_store import KNOWN

    assert set(KNOWN) == set(KINDS) == set(get_args(CertificateKind))
