"""Codes of nested planes, row by row: compensated rounding, coordinate descent, and search beyond it.

All levels of the ladder are kept at once. The value of a weight at level k is offset + scale_1 * code + the sum over
i = 2..k of +-scale_i; `sign` holds the K - 1 residual bits, the first residual's lowest. What is made small is the sum
over levels of importance * error, error the squared output error tr((W - W^_k) H (W - W^_k)^T). Legend: R rows, C
columns, G groups, K levels, Q = K + 1 (offset, base scale, residual scales), N nearest columns.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["compensated_codes", "descend", "kick", "level_weights"]

FloatArray = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.uint8]


@numba.njit(cache=True, inline="always")
def _residual(sign: int, k: int, scale_Q: Any) -> float:
    """What the residual plane of level k (from 1) adds."""
    return scale_Q[k + 1] if (sign >> (k - 1)) & 1 else -scale_Q[k + 1]


@numba.njit(cache=True)
def _values(code: int, sign: int, scale_Q: Any, out_K: Any) -> None:
    out_K[0] = scale_Q[0] + scale_Q[1] * code
    for k in range(1, len(out_K)):
        out_K[k] = out_K[k - 1] + _residual(sign, k, scale_Q)


@numba.njit(cache=True)
def _sums(scale_GQ: Any, importance_K: Any) -> Any:
    """For every group and signs (G, 2^(K-1), K + 2): importance * shift of every level, its sum, and that of squares.

    A level's shift is what offset and residuals add up to.
    """
    levels = len(importance_K)
    sums_GSX = np.zeros((len(scale_GQ), 1 << (levels - 1), levels + 2))
    for g in range(len(scale_GQ)):
        for sign in range(1 << (levels - 1)):
            shift = scale_GQ[g, 0]
            for k in range(levels):
                if k:
                    shift += _residual(sign, k, scale_GQ[g])
                sums_GSX[g, sign, k] = importance_K[k] * shift
                sums_GSX[g, sign, levels] += importance_K[k] * shift
                sums_GSX[g, sign, levels + 1] += importance_K[k] * shift**2
    return sums_GSX


@numba.njit(cache=True)
def _nearest(
    target_K: Any, scale_Q: Any, importance_K: Any, total: float, sums_SX: Any, top: int, code: int
) -> tuple[int, int]:
    """The code and signs whose values are nearest to the levels' targets; exact. A `code` from 0 is kept.

    `total` is the importance of all levels, `sums_SX` the group's `_sums`. For given signs the sum of squares is a
    parabola in the code, so rounding its vertex is the best.
    """
    levels, step = len(target_K), scale_Q[1]
    mean_target = 0.0
    for k in range(levels):
        mean_target += importance_K[k] * target_K[k]
    curve = total * step
    inverse = 1.0 / curve if curve != 0.0 else 0.0
    best_code, best_sign, best = 0, 0, np.inf
    for sign in range(len(sums_SX)):
        mean = mean_target - sums_SX[sign, levels]
        error = sums_SX[sign, levels + 1]
        for k in range(levels):
            error -= 2.0 * target_K[k] * sums_SX[sign, k]
        chosen = code
        if code < 0:
            chosen = int(min(max(math.floor(mean * inverse + 0.5), 0.0), float(top)))
        error += step * chosen * (curve * chosen - 2.0 * mean)
        if error < best:
            best_code, best_sign, best = chosen, sign, error
    return best_code, best_sign


@numba.njit(cache=True)
def level_weights(code_RC: CodeArray, sign_RC: CodeArray, scale_RGQ: FloatArray, group: int) -> FloatArray:
    """The weights at every level, (K, R, C)."""
    rows, columns = code_RC.shape
    weight_KRC = np.empty((scale_RGQ.shape[2] - 1, rows, columns))
    for r in range(rows):
        for c in range(columns):
            _values(code_RC[r, c], sign_RC[r, c], scale_RGQ[r, c // group], weight_KRC[:, r, c])
    return weight_KRC


@numba.njit(cache=True)
def compensated_codes(
    weight_RC: FloatArray, factor_CC: FloatArray, scale_RGQ: FloatArray, importance_K: FloatArray, top: int, group: int
) -> tuple[CodeArray, CodeArray]:
    """Codes and signs chosen column by column; each level's error is passed on to its own later columns.

    `factor_CC` is the upper Cholesky factor of the inverse Hessian. With one level this is GPTQ (Frantar et al.
    2210.17323, algorithm 1; a row is done before the next, so there is no block of columns to wait for).
    Complexity: O(R C K (C + 2^K)).
    """
    rows, columns = weight_RC.shape
    levels = len(importance_K)
    code_RC = np.empty((rows, columns), dtype=np.uint8)
    sign_RC = np.empty((rows, columns), dtype=np.uint8)
    left_KC = np.empty((levels, columns))
    target_K, value_K = np.empty(levels), np.empty(levels)
    total = importance_K.sum()
    for r in range(rows):
        sums_GSX = _sums(scale_RGQ[r], importance_K)
        for k in range(levels):
            left_KC[k] = weight_RC[r]
        for c in range(columns):
            scale_Q = scale_RGQ[r, c // group]
            target_K[:] = left_KC[:, c]
            code, sign = _nearest(target_K, scale_Q, importance_K, total, sums_GSX[c // group], top, -1)
            code_RC[r, c], sign_RC[r, c] = code, sign
            _values(code, sign, scale_Q, value_K)
            for k in range(levels):
                error = (target_K[k] - value_K[k]) / factor_CC[c, c]
                for later in range(c + 1, columns):
                    left_KC[k, later] -= error * factor_CC[c, later]
    return code_RC, sign_RC


@numba.njit(cache=True)
def _move(
    code_C: Any,
    sign_C: Any,
    gradient_KC: Any,
    hessian_CC: Any,
    scale_Q: Any,
    importance_K: Any,
    c: int,
    code: int,
    sign: int,
    before_K: Any,
    value_K: Any,
) -> float:
    """Gives column c another code and signs, keeps the gradient; returns how much the sum of errors changes."""
    _values(code_C[c], sign_C[c], scale_Q, before_K)
    _values(code, sign, scale_Q, value_K)
    change = 0.0
    for k in range(len(importance_K)):
        step = value_K[k] - before_K[k]
        if step != 0.0:
            change += importance_K[k] * step * (step * hessian_CC[c, c] - 2.0 * gradient_KC[k, c])
            for other in range(len(code_C)):
                gradient_KC[k, other] -= step * hessian_CC[c, other]
    code_C[c], sign_C[c] = code, sign
    return change


@numba.njit(cache=True)
def _settle(
    code_C: Any,
    sign_C: Any,
    gradient_KC: Any,
    hessian_CC: Any,
    scale_GQ: Any,
    importance_K: Any,
    total: float,
    sums_GSX: Any,
    top: int,
    group: int,
    column_N: Any,
    before_K: Any,
    value_K: Any,
    target_K: Any,
) -> float:
    """Each of these columns in turn takes the best code and signs given all others; returns the sum's change."""
    change = 0.0
    for c in column_N:
        scale_Q = scale_GQ[c // group]
        _values(code_C[c], sign_C[c], scale_Q, before_K)
        for k in range(len(target_K)):
            target_K[k] = before_K[k] + gradient_KC[k, c] / hessian_CC[c, c]
        code, sign = _nearest(target_K, scale_Q, importance_K, total, sums_GSX[c // group], top, -1)
        if code != code_C[c] or sign != sign_C[c]:
            change += _move(
                code_C, sign_C, gradient_KC, hessian_CC, scale_Q, importance_K, c, code, sign, before_K, value_K
            )
    return change


@numba.njit(cache=True)
def descend(
    code_RC: CodeArray,
    sign_RC: CodeArray,
    gradient_KRC: FloatArray,
    hessian_CC: FloatArray,
    scale_RGQ: FloatArray,
    importance_K: FloatArray,
    top: int,
    group: int,
    sweeps: int,
) -> None:
    """Changes one weight at a time to the best given all others, at most `sweeps` times over each row.

    `gradient_KRC` is (W - W^_k) H and is kept up to date. The sum of errors never grows.
    """
    levels, rows, columns = gradient_KRC.shape
    before_K, value_K, target_K = np.empty(levels), np.empty(levels), np.empty(levels)
    column_C = np.arange(columns)
    total = importance_K.sum()
    for r in range(rows):
        sums_GSX = _sums(scale_RGQ[r], importance_K)
        for _ in range(sweeps):
            change = _settle(
                code_RC[r],
                sign_RC[r],
                gradient_KRC[:, r],
                hessian_CC,
                scale_RGQ[r],
                importance_K,
                total,
                sums_GSX,
                top,
                group,
                column_C,
                before_K,
                value_K,
                target_K,
            )
            if change >= 0.0:
                break


@numba.njit(cache=True)
def kick(
    code_RC: CodeArray,
    sign_RC: CodeArray,
    gradient_KRC: FloatArray,
    hessian_CC: FloatArray,
    scale_RGQ: FloatArray,
    importance_K: FloatArray,
    top: int,
    group: int,
    near_CN: npt.NDArray[np.int64],
) -> None:
    """Pushes every weight out of its optimum, lets the columns nearest to it settle, and keeps what became better.

    Pushes: the code one up or down with the signs that suit the higher levels best, and each sign turned over.
    `near_CN` names the columns most correlated with each. The sum of errors never grows.
    Complexity: O(R C N K 2^K).
    """
    levels, rows, columns = gradient_KRC.shape
    before_K, value_K, target_K = np.empty(levels), np.empty(levels), np.empty(levels)
    gradient_KC = np.empty((levels, columns))
    higher_K = importance_K.copy()
    if levels > 1:
        higher_K[0] = 0.0
    total, higher_total = importance_K.sum(), higher_K.sum()
    for r in range(rows):
        scale_GQ = scale_RGQ[r]
        sums_GSX, higher_GSX = _sums(scale_GQ, importance_K), _sums(scale_GQ, higher_K)
        code_C, sign_C = code_RC[r].copy(), sign_RC[r].copy()
        gradient_KC[:] = gradient_KRC[:, r]
        for c in range(columns):
            scale_Q = scale_GQ[c // group]
            for push in range(levels + 1):
                code, sign = int(code_RC[r, c]), int(sign_RC[r, c])
                if push < 2:
                    code += 2 * push - 1
                    if code < 0 or code > top:
                        continue
                    _values(code_RC[r, c], sign, scale_Q, before_K)
                    for k in range(levels):
                        target_K[k] = before_K[k] + gradient_KC[k, c] / hessian_CC[c, c]
                    sign = _nearest(target_K, scale_Q, higher_K, higher_total, higher_GSX[c // group], top, code)[1]
                else:
                    sign ^= 1 << (push - 2)
                change = _move(
                    code_C, sign_C, gradient_KC, hessian_CC, scale_Q, importance_K, c, code, sign, before_K, value_K
                )
                change += _settle(
                    code_C,
                    sign_C,
                    gradient_KC,
                    hessian_CC,
                    scale_GQ,
                    importance_K,
                    total,
                    sums_GSX,
                    top,
                    group,
                    near_CN[c],
                    before_K,
                    value_K,
                    target_K,
                )
                if change < -1e-12:
                    code_RC[r], sign_RC[r] = code_C, sign_C
                    gradient_KRC[:, r] = gradient_KC
                else:
                    code_C[:], sign_C[:] = code_RC[r], sign_RC[r]
                    gradient_KC[:] = gradient_KRC[:, r]
