"""The planes of a quantised model in one safetensors file: written plane by plane, indexed without reading the bytes.

Legend: L routing sites, E experts, K planes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import BitLadder, MatrixShape
from placer.core.device.planes import PlaneIndex, plane_key
from placer.core.errors import InputFileError, UsageError
from traces.tensorfile import TensorFile, TensorSpec, read_tensor_file, write_tensor_file

__all__ = ["PLANES_FORMAT", "PlaneFileHeader", "load_plane_index", "save_planes", "verify_planes"]

PLANES_FORMAT = "placer-planes"
SCHEMA = "1"
MEND = "write it anew with `placer device quantize`"
CRC_DIGITS, ERROR_DIGITS = 8, 12

Piece = tuple[int, int, int, npt.NDArray[np.uint8]]
"""Site, expert, plane (all from 0) and the plane's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneFileHeader:
    """What is known of a plane file before its planes are: the fields of PlaneIndex of the same names."""

    model: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    ladder: BitLadder
    shapes: tuple[MatrixShape, ...]
    about: dict[str, Any]


def save_planes(
    path: Path,
    header: PlaneFileHeader,
    pieces: Iterable[Piece],
    error_LEK: Callable[[], npt.NDArray[np.float64]] | None = None,
) -> PlaneIndex:
    """Writes every plane, whole or not at all, holding one in memory at a time; returns the index.

    `pieces` yields each plane once, in any order; `error_LEK()` is called after the last. Raises UsageError where
    pieces and header disagree, InputFileError where `path` cannot be written or the disk fills.
    """
    sizes = header.ladder.plane_bytes_K(header.shapes)
    shape_LEK = (len(header.moe_layers), header.num_experts, header.ladder.levels)
    names = {key: plane_key(header.moe_layers[key[0]], *key[1:]) for key in np.ndindex(shape_LEK)}
    specs = {name: TensorSpec(np.dtype(np.uint8), (sizes[key[2]],)) for key, name in names.items()}
    crc32_LEK = np.zeros(shape_LEK, dtype=np.uint32)

    def named() -> Iterable[tuple[str, npt.NDArray[Any]]]:
        for site, expert, plane, raw in pieces:
            if (site, expert, plane) not in names:
                raise UsageError(f"plane {plane} of site {site} expert {expert} is not one of {shape_LEK}")
            crc32_LEK[site, expert, plane] = zlib.crc32(raw.data)
            yield names[site, expert, plane], raw

    plain = {
        "format": PLANES_FORMAT,
        "schema": SCHEMA,
        "model": header.model,
        "num_hidden_layers": str(header.num_hidden_layers),
        "moe_layers": json.dumps(list(header.moe_layers)),
        "num_experts": str(header.num_experts),
        "ladder": json.dumps(header.ladder.to_dict()),
        "shapes": json.dumps([list(shape) for shape in header.shapes]),
        "about": json.dumps(header.about, sort_keys=True),
    }
    reserve = {**plain, "crc32": "0" * CRC_DIGITS * crc32_LEK.size}
    if error_LEK is not None:
        reserve["error"] = "0" * ERROR_DIGITS * crc32_LEK.size

    def metadata() -> dict[str, str]:
        found = {**plain, "crc32": "".join(f"{crc:0{CRC_DIGITS}x}" for crc in crc32_LEK.flat)}
        if error_LEK is not None:
            found["error"] = "".join(f"{error:{ERROR_DIGITS}.5e}" for error in error_LEK().flat)
        return found

    write_tensor_file(path, specs, named(), metadata, reserve)
    return load_plane_index(path)


def load_plane_index(path: Path) -> PlaneIndex:
    """Where the planes are; reads the header alone. Raises InputFileError naming what is missing or does not fit."""
    path = Path(path)
    file = read_tensor_file(path)
    found = file.metadata
    if found.get("format") != PLANES_FORMAT:
        raise InputFileError(f"{path}: holds no expert planes (no format: {PLANES_FORMAT}); {MEND}")
    if found.get("schema") != SCHEMA:
        raise InputFileError(f"{path}: schema {found.get('schema')!r}; this placer reads schema {SCHEMA}")
    try:
        layers = tuple(int(layer) for layer in json.loads(found["moe_layers"]))
        experts, hidden_layers = int(found["num_experts"]), int(found["num_hidden_layers"])
        ladder = BitLadder.from_dict(json.loads(found["ladder"]), where=f"{path}: ladder")
        shapes = tuple((int(rows), int(columns)) for rows, columns in json.loads(found["shapes"]))
        shape_LEK = (len(layers), experts, ladder.levels)
        crc32_LEK = _fixed_width(found["crc32"], CRC_DIGITS, shape_LEK, lambda text: int(text, 16)).astype(np.uint32)
        error_LEK = _fixed_width(found["error"], ERROR_DIGITS, shape_LEK, float) if "error" in found else None
        about = dict(json.loads(found.get("about", "{}")))
        offset_LEK = _offsets(path, file, layers, shape_LEK, ladder.plane_bytes_K(shapes))
        return PlaneIndex(
            path=path,
            model=found["model"],
            num_hidden_layers=hidden_layers,
            moe_layers=layers,
            num_experts=experts,
            ladder=ladder,
            shapes=shapes,
            offset_LEK=offset_LEK,
            crc32_LEK=crc32_LEK,
            error_LEK=error_LEK,
            sha256=hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest(),
            about=about,
        )
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise InputFileError(f"{path}: damaged header of a plane file ({error}); {MEND}") from error


def verify_planes(index: PlaneIndex) -> None:
    """Reads every plane and compares its checksum. Raises InputFileError naming the first that differs."""
    arrays = read_tensor_file(index.path).arrays
    for site, expert, plane in np.ndindex(index.shape_LEK):
        layer = index.moe_layers[site]
        if zlib.crc32(arrays[plane_key(layer, expert, plane)].data) != index.crc32_LEK[site, expert, plane]:
            where = f"layer {layer} expert {expert} plane {plane}"
            raise InputFileError(
                f"{index.path}: {where} has another checksum than when written; the file is damaged, copy it again"
            )


def _offsets(
    path: Path, file: TensorFile, layers: tuple[int, ...], shape_LEK: tuple[int, int, int], sizes: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    offset_LEK = np.zeros(shape_LEK, dtype=np.int64)
    for site, expert, plane in np.ndindex(shape_LEK):
        name = plane_key(layers[site], expert, plane)
        array = file.arrays.get(name)
        if array is None:
            raise InputFileError(f"{path}: lacks plane {plane} of layer {layers[site]} expert {expert}; {MEND}")
        if array.dtype != np.uint8 or array.shape != (sizes[plane],):
            raise InputFileError(
                f"{path}: {name} is {array.dtype} {array.shape}; a plane of {sizes[plane]} bytes belongs there; {MEND}"
            )
        offset_LEK[site, expert, plane] = file.first_byte[name]
    return offset_LEK


def _fixed_width(text: str, digits: int, shape: tuple[int, ...], read: Callable[[str], float]) -> npt.NDArray[Any]:
    count = int(np.prod(shape))
    if len(text) != digits * count:
        raise ValueError(f"a table has {len(text)} characters; {digits * count} belong there")
    return np.array([read(text[at : at + digits]) for at in range(0, len(text), digits)]).reshape(shape)
