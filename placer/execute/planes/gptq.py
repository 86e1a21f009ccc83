"""One matrix at one bit-width: round to nearest, and GPTQ; and what both share with nested planes.

Legend: R rows (outputs), C columns (inputs), G groups of columns, K levels, Q = K + 1 (offset and scales).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.execute.planes.kernels import compensated_codes, level_weights

__all__ = ["MatrixCodes", "clipped_grid", "damped", "gptq", "inverse_factor", "output_error_K", "round_to_nearest"]

FloatArray = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.uint8]

DAMPING = 0.01
SMALLEST_RANGE, RANGE_STEPS = 0.3, 36
ONE_LEVEL = np.ones(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixCodes:
    """A matrix as codes: base codes and residual signs (R, C); offsets and scales (R, G, Q) that fit half precision.

    `sign_RC` holds the residual bits, the first residual's lowest.
    """

    code_RC: CodeArray
    sign_RC: CodeArray
    scale_RGQ: FloatArray
    group: int

    @property
    def levels(self) -> int:
        """K."""
        return self.scale_RGQ.shape[2] - 1

    def weight_KRC(self) -> FloatArray:
        """The weights at every level."""
        return level_weights(self.code_RC, self.sign_RC, self.scale_RGQ, self.group)


def half(values: FloatArray) -> FloatArray:
    """The values as half precision holds them."""
    return values.astype(np.float16).astype(np.float64)


def damped(hessian_CC: FloatArray) -> FloatArray:
    """The Hessian with a hundredth of its mean diagonal added to the diagonal; the identity if it is zero."""
    mean = float(np.trace(hessian_CC)) / len(hessian_CC)
    return hessian_CC + np.eye(len(hessian_CC)) * (DAMPING * mean if mean > 0 else 1.0)


def inverse_factor(hessian_CC: FloatArray) -> FloatArray:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U."""
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(hessian_CC)).T)


def output_error_K(weight_RC: FloatArray, found_KRC: FloatArray, hessian_CC: FloatArray) -> FloatArray:
    """tr((W - W^) H (W - W^)^T) of every level, (K,)."""
    off_KRC = weight_RC - found_KRC
    return np.einsum("krc,krc->k", off_KRC @ hessian_CC, off_KRC)


def clipped_grid(weight_RC: FloatArray, bits: int, group: int, importance_C: FloatArray) -> FloatArray:
    """Offset and scale of each row and group, (R, G, 2): of the ranges around the middle the one with least error.

    Ranges from the whole one down to 0.3 of it are tried; the error is rounding's, weighted by `importance_C`.
    """
    rows, columns = weight_RC.shape
    found_RG2 = np.empty((rows, -(-columns // group), 2))
    top = 2**bits - 1
    for g in range(found_RG2.shape[1]):
        part = weight_RC[:, g * group : (g + 1) * group]
        weigh = importance_C[g * group : (g + 1) * group]
        low, high = part.min(1), part.max(1)
        middle, reach = (low + high) / 2, (high - low) / 2
        least = np.full(rows, np.inf)
        for share in np.linspace(1, SMALLEST_RANGE, RANGE_STEPS):
            scale = half(2 * reach * share / top)
            offset = half(middle - reach * share)
            safe = np.where(scale > 0, scale, 1.0)
            code = np.clip(np.rint((part - offset[:, None]) / safe[:, None]), 0, top)
            error = (((part - offset[:, None] - scale[:, None] * code) ** 2) * weigh).sum(1)
            better = error < least
            least = np.where(better, error, least)
            found_RG2[better, g] = np.stack([offset, scale], 1)[better]
    return found_RG2


def round_to_nearest(weight_RC: FloatArray, bits: int, group: int) -> MatrixCodes:
    """Each weight to the nearest of 2^bits values between the smallest and the largest of its row and group."""
    rows, columns = weight_RC.shape
    groups, top = -(-columns // group), 2**bits - 1
    scale_RGQ = np.empty((rows, groups, 2))
    code_RC = np.empty((rows, columns), dtype=np.uint8)
    for g in range(groups):
        part = weight_RC[:, g * group : (g + 1) * group]
        low = part.min(1)
        scale_RGQ[:, g, 0], scale_RGQ[:, g, 1] = half(low), half((part.max(1) - low) / top)
        safe = np.where(scale_RGQ[:, g, 1:] > 0, scale_RGQ[:, g, 1:], 1.0)
        code = np.clip(np.rint((part - scale_RGQ[:, g, :1]) / safe), 0, top)
        code_RC[:, g * group : (g + 1) * group] = code.astype(np.uint8)
    return MatrixCodes(code_RC=code_RC, sign_RC=np.zeros_like(code_RC), scale_RGQ=scale_RGQ, group=group)


def gptq(weight_RC: FloatArray, factor_CC: FloatArray, bits: int, group: int) -> MatrixCodes:
    """GPTQ with groups whose ranges are searched beforehand; `factor_CC` is the Hessian's `inverse_factor`.

    Complexity: O(R C^2). Reference: Frantar et al. 2210.17323, algorithm 1 (columns in their order, static groups).
    """
    scale_RGQ = clipped_grid(weight_RC, bits, group, np.diag(factor_CC) ** -2)
    code_RC, sign_RC = compensated_codes(weight_RC, factor_CC, scale_RGQ, ONE_LEVEL, 2**bits - 1, group)
    return MatrixCodes(code_RC=code_RC, sign_RC=sign_RC, scale_RGQ=scale_RGQ, group=group)
