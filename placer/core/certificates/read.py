"""Reads multipliers out of a certificate: shape and sign are looked at before anything is believed."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from placer.core.errors import ViolationError

__all__ = ["FloatArray", "multiplier", "number", "top_eigenvalues_sum"]

FloatArray = npt.NDArray[np.float64]


def multiplier(
    arrays: Mapping[str, npt.NDArray[np.float64]], name: str, shape: tuple[int, ...], *, sign: bool = False
) -> FloatArray:
    """`arrays[name]` as float64 of `shape`, zeros where absent; with `sign` it must not be negative anywhere."""
    given = arrays.get(name)
    if given is None:
        return np.zeros(shape)
    if given.shape != shape:
        raise ViolationError(f"certificate array {name} is {given.shape}; the problem needs {shape}")
    array = given.astype(np.float64)
    if sign and (array < 0).any():
        raise ViolationError(
            f"certificate array {name} has {array.min():g}; a multiplier of an inequality is 0 or more"
        )
    return array


def number(numbers: Mapping[str, float], name: str) -> float:
    """`numbers[name]`, 0 where absent; must be finite and not negative."""
    value = float(numbers.get(name, 0.0))
    if not 0 <= value < np.inf:
        raise ViolationError(f"certificate number {name} is {value}; give a finite number, 0 or more")
    return value


def top_eigenvalues_sum(symmetric_EE: FloatArray, count: int) -> float:
    """Sum of the `count` largest eigenvalues on the space orthogonal to the all-ones vector."""
    experts = len(symmetric_EE)
    if count == 0:
        return 0.0
    centred = symmetric_EE - symmetric_EE.mean(axis=0) - symmetric_EE.mean(axis=1)[:, None] + symmetric_EE.mean()
    # the all-ones vector is an eigenvector of the centred matrix; push its eigenvalue below all others
    low = np.abs(centred).sum(axis=1).max() + 1.0
    values = np.linalg.eigvalsh(centred - low * np.ones((experts, experts)) / experts)
    return float(values[experts - count :].sum())
