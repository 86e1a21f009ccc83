"""The id types of traces and their sentinel, and the generators that seeds stand for."""

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["IdDType", "convert_ids", "generator", "id_dtype"]

IdDType = np.dtype[np.uint8 | np.uint16]
"""uint8 or uint16; the largest value of either marks an unset entry."""


def generator(seed: int) -> np.random.Generator:
    """The generator of `seed`. Raises UsageError for a seed that is not 0 or more."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give a whole number, 0 or more")
    return np.random.default_rng(int(seed))


def id_dtype(num_ids: int) -> IdDType:
    """uint8 for up to 255 ids, else uint16 (one value is the sentinel). Raises UsageError beyond 65535."""
    if num_ids > 65535:
        raise UsageError(f"{num_ids} expert ids do not fit; a trace holds at most 65535")
    return np.dtype(np.uint8) if num_ids <= 255 else np.dtype(np.uint16)


def convert_ids(ids: npt.NDArray[Any], dtype: IdDType) -> npt.NDArray[Any]:
    """`ids` (uint8 or uint16, sentinel = largest value) as `dtype` with that type's sentinel."""
    if ids.dtype == dtype:
        return ids
    converted = ids.astype(dtype)
    converted[ids == np.iinfo(ids.dtype).max] = np.iinfo(dtype).max
    return converted
