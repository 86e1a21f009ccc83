"""A Certificate in one safetensors file: its multipliers, what they bound, and which trace they were made for.

Reading is strict about form alone: what the multipliers prove is for placer.core.certificates.verify to say.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.certificates.certificate import CertificateKind
from placer.core.errors import InputFileError
from traces.tensorfile import TensorFile, TensorSpec, read_tensor_file, write_tensor_file

__all__ = ["CERTIFICATE_FORMAT", "StoredCertificate", "load_certificate", "save_certificate"]

CERTIFICATE_FORMAT = "placer-certificate"
SCHEMA = "1"
MEND = "write it anew with `placer solve --certificate`"
FIELDS = ("format", "schema", "kind", "objective_name", "bound", "proof", "numbers", "max_par", "trace_sha256")
LEVEL_AXES = {
    "slope_HK": 2,
    "slope_HQ": 2,
    "u_LE": 2,
    "v_LE": 2,
    "split_LEE": 3,
    "spectrum_LEE": 3,
    "triangle_N4": 2,
    "tau_N": 1,
    "biclique_N5": 2,
}
KNOWN: dict[str, dict[str, int]] = {
    "par": {},
    "kept": {
        f"{level}_{name}": LEVEL_AXES[name]
        for level in ("rank", "node")
        for name in ("u_LE", "v_LE", "split_LEE", "tau_N", "biclique_N5")
    }
    | {"mu_LE": 2, "nu_LE": 2},
    "touched": {
        f"{level}_{name}": LEVEL_AXES[name]
        for level in ("rank", "node")
        for name in ("slope_HK", "slope_HQ", "u_LE", "spectrum_LEE", "triangle_N4", "tau_N")
    }
    | {"load_q_LE": 2},
    "blocks": {"block_price_LME": 3, "block_threshold_LM": 2},
}
"""Arrays of each kind and their number of axes, as placer.core.certificates has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCertificate:
    """A certificate, the load cap under which it holds (None: for every plan), and the trace it was made for."""

    certificate: Certificate
    max_par: float | None
    trace_sha256: str


def save_certificate(stored: StoredCertificate, path: Path) -> None:
    """Writes `stored` to `path`, whole or not at all. Raises InputFileError."""
    certificate = stored.certificate
    arrays = {name: np.asarray(array, dtype=np.float64) for name, array in sorted(certificate.arrays.items())}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    texts = {
        "format": CERTIFICATE_FORMAT,
        "schema": SCHEMA,
        "kind": certificate.kind,
        "objective_name": certificate.objective_name,
        "bound": json.dumps(float(certificate.bound)),
        "proof": certificate.proof,
        "numbers": json.dumps({name: float(value) for name, value in certificate.numbers.items()}, sort_keys=True),
        "max_par": json.dumps(None if stored.max_par is None else float(stored.max_par)),
        "trace_sha256": stored.trace_sha256,
    }
    write_tensor_file(Path(path), specs, arrays.items(), lambda: texts, texts)


def load_certificate(path: Path) -> StoredCertificate:
    """The certificate in `path`. Raises InputFileError naming the file, the field and the mend."""
    path = Path(path)
    file = read_tensor_file(path)
    texts = file.metadata
    if texts.get("format") != CERTIFICATE_FORMAT:
        raise InputFileError(f"{path}: is not a placer certificate (format {texts.get('format')!r}); {MEND}")
    if texts.get("schema") != SCHEMA:
        raise InputFileError(f"{path}: certificate schema {texts.get('schema')!r}; this placer reads {SCHEMA}")
    for name in FIELDS:
        if name not in texts:
            raise InputFileError(f"{path}: header field {name} is missing; {MEND}")
    for name in texts:
        if name not in FIELDS:
            raise InputFileError(f"{path}: header field {name!r} is unknown to schema {SCHEMA}; {MEND}")
    kind = texts["kind"]
    if kind not in get_args(CertificateKind):
        known = ", ".join(get_args(CertificateKind))
        raise InputFileError(f"{path}: header field kind is {kind!r}; this placer knows {known}")
    numbers = _parsed(path, file, "numbers")
    if not isinstance(numbers, dict):
        raise InputFileError(f"{path}: header field numbers is {texts['numbers'][:60]!r}, not a table; {MEND}")
    for name, value in numbers.items():
        if not _is_number(value):
            raise InputFileError(f"{path}: header field numbers has {name!r}: {str(value)[:60]!r}, no number; {MEND}")
    bound, max_par = _parsed(path, file, "bound"), _parsed(path, file, "max_par")
    if not _is_number(bound):
        raise InputFileError(f"{path}: header field bound is {texts['bound'][:60]!r}, not a number; {MEND}")
    if max_par is not None and not (_is_number(max_par) and max_par >= 1):
        raise InputFileError(f"{path}: header field max_par is {texts['max_par'][:60]!r}, not a load cap; {MEND}")
    return StoredCertificate(
        certificate=Certificate(
            kind=kind,  # type: ignore[arg-type]  # one of the literals, by the test above
            objective_name=texts["objective_name"],
            bound=float(bound),
            proof=texts["proof"],
            arrays=_arrays(path, file, KNOWN[kind]),
            numbers={name: float(value) for name, value in numbers.items()},
        ),
        max_par=None if max_par is None else float(max_par),
        trace_sha256=texts["trace_sha256"],
    )


def _arrays(path: Path, file: TensorFile, known: dict[str, int]) -> dict[str, npt.NDArray[np.float64]]:
    for name, array in file.arrays.items():
        if name not in known:
            kind = file.metadata["kind"]
            raise InputFileError(f"{path}: array {name!r} is unknown to certificates of kind {kind}; {MEND}")
        if array.dtype != np.float64 or array.ndim != known[name]:
            raise InputFileError(
                f"{path}: {name} is {array.dtype} {array.shape}, not float64 with {known[name]} axes; {MEND}"
            )
        if not np.isfinite(array).all():
            raise InputFileError(f"{path}: {name} has a value that is no number; {MEND}")
    return dict(file.arrays)


def _parsed(path: Path, file: TensorFile, name: str) -> Any:
    try:
        return json.loads(file.metadata[name])
    except (ValueError, RecursionError) as error:
        text = file.metadata[name][:60]
        raise InputFileError(f"{path}: header field {name} is {text!r}, not JSON; {MEND}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
