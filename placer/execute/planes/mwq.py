"""Matryoshka weight quantisation of one matrix: a base plane, binary residual planes, and every prefix good in itself.

D2MoE (2504.15299, section 4.1) makes the planes one after another and drops the correction from column to column inside
a residual. Here all levels are made together: each passes its error on to its own later columns (GPTQ), then codes and
scales are refined in turn, and each level counts for more the further it is behind GPTQ alone at its width. The bytes
and the rule of use are D2MoE's. Legend: R rows (outputs), C columns (inputs), G groups of columns, K levels, Q = K + 1
(offset, base scale, residual scales), N nearest columns.
"""

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import BitLadder
from placer.execute.planes.gptq import MatrixCodes, clipped_grid, gptq, half, output_error_K
from placer.execute.planes.kernels import compensated_codes, descend, kick, level_weights

__all__ = ["matryoshka"]

FloatArray = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.uint8]

ROUNDS, PLAIN_ROUNDS, SWEEPS, NEAREST = 10, 4, 4, 24
RIDGE = 1e-6


def matryoshka(weight_RC: FloatArray, hessian_CC: FloatArray, factor_CC: FloatArray, ladder: BitLadder) -> MatrixCodes:
    """The nested planes of a matrix; `factor_CC` is the `inverse_factor` of the (damped) Hessian.

    Rounds of coordinate descent, pushes out of local optima and least-squares scales; the round whose worst level, as a
    multiple of independent GPTQ's error at the same width, is best is returned. Deterministic.
    Complexity: O(rounds R C (K C + N K 2^K)). Guarantee: none but the comparison above; how near each level comes to
    GPTQ depends on how correlated the inputs are, because a code can serve one level or the other.
    """
    group, bits_K = ladder.group_size, ladder.bits_K
    top = 2 ** bits_K[0] - 1
    alone_K = np.array(
        [output_error_K(weight_RC, gptq(weight_RC, factor_CC, b, group).weight_KRC(), hessian_CC)[0] for b in bits_K]
    )
    alone_K = np.maximum(alone_K, np.finfo(np.float64).tiny)
    scale_RGQ = _first_scales(weight_RC, factor_CC, ladder)
    importance_K = 1 / alone_K
    code_RC, sign_RC = compensated_codes(weight_RC, factor_CC, scale_RGQ, importance_K, top, group)
    near_CN = _nearest_columns(hessian_CC)
    best, least = None, np.inf
    for at in range(ROUNDS):
        gradient_KRC = (weight_RC - level_weights(code_RC, sign_RC, scale_RGQ, group)) @ hessian_CC
        descend(code_RC, sign_RC, gradient_KRC, hessian_CC, scale_RGQ, importance_K, top, group, SWEEPS)
        if at >= PLAIN_ROUNDS:
            kick(code_RC, sign_RC, gradient_KRC, hessian_CC, scale_RGQ, importance_K, top, group, near_CN)
        found = MatrixCodes(code_RC=code_RC.copy(), sign_RC=sign_RC.copy(), scale_RGQ=scale_RGQ.copy(), group=group)
        ratio_K = output_error_K(weight_RC, found.weight_KRC(), hessian_CC) / alone_K
        if best is None or ratio_K.max() < least:
            best, least = found, float(ratio_K.max())
        if not ratio_K.mean() > 0:
            break
        _refit_scales(code_RC, sign_RC, gradient_KRC, hessian_CC, scale_RGQ, importance_K, group)
        importance_K = importance_K * np.clip(ratio_K / ratio_K.mean(), 0.5, 2) ** 2
        importance_K /= (importance_K * alone_K).mean()
    assert best is not None
    return best


def _first_scales(weight_RC: FloatArray, factor_CC: FloatArray, ladder: BitLadder) -> FloatArray:
    """An even grid over the range that suits the second width best, halved by every residual; (R, G, Q)."""
    bits_K = ladder.bits_K
    middle = bits_K[min(1, len(bits_K) - 1)]
    grid_RG2 = clipped_grid(weight_RC, middle, ladder.group_size, np.diag(factor_CC) ** -2)
    step_RG = grid_RG2[..., 1] * 2.0 ** (middle - bits_K[0])
    offset_RG = grid_RG2[..., 0] + (step_RG - grid_RG2[..., 1]) / 2
    residuals = [step_RG / 2 ** (k + 1) for k in range(1, len(bits_K))]
    return half(np.stack([offset_RG, step_RG, *residuals], axis=-1))


def _nearest_columns(hessian_CC: FloatArray) -> npt.NDArray[np.int64]:
    """The columns most correlated with each, without itself, (C, N)."""
    tie_CC = np.abs(hessian_CC) / np.sqrt(np.diag(hessian_CC))
    np.fill_diagonal(tie_CC, -1)
    return np.argsort(-tie_CC, axis=1, kind="stable")[:, : min(NEAREST, len(tie_CC) - 1)]


def _refit_scales(
    code_RC: CodeArray,
    sign_RC: CodeArray,
    gradient_KRC: FloatArray,
    hessian_CC: FloatArray,
    scale_RGQ: FloatArray,
    importance_K: FloatArray,
    group: int,
) -> None:
    """Gives every group the offset and scales that are best for all levels together, codes as they are.

    Weighted least squares, group after group; `gradient_KRC` is kept up to date until the last rounding.
    """
    levels, _, columns = gradient_KRC.shape
    lowest_Q = np.maximum(np.arange(levels + 1) - 1, 0)
    from_level_K = np.cumsum(importance_K[::-1])[::-1]
    weigh_QQ = from_level_K[np.maximum(lowest_Q[:, None], lowest_Q)]
    weigh_QK = np.where(np.arange(levels) >= lowest_Q[:, None], importance_K, 0.0)
    for g in range(scale_RGQ.shape[1]):
        here = slice(g * group, min(columns, (g + 1) * group))
        bits = [2.0 * ((sign_RC[:, here] >> k) & 1) - 1 for k in range(levels - 1)]
        design_RQX = np.stack([np.ones_like(code_RC[:, here], dtype=np.float64), code_RC[:, here], *bits], axis=1)
        product_RQC = design_RQX @ hessian_CC[here]
        normal_RQQ = (product_RQC[:, :, here] @ design_RQX.transpose(0, 2, 1)) * weigh_QQ
        right_RQ = np.einsum("qk,rqx,krx->rq", weigh_QK, design_RQX, gradient_KRC[:, :, here], optimize=True)
        # codes that are all alike cannot tell the scale from the offset
        ridge_RQ = RIDGE * np.einsum("rqq->rq", normal_RQQ) + np.finfo(np.float64).tiny
        step_RQ = np.linalg.solve(normal_RQQ + ridge_RQ[:, :, None] * np.eye(levels + 1), right_RQ[..., None])[..., 0]
        scale_RGQ[:, g] += step_RQ
        for k in range(levels):
            gradient_KRC[k] -= (step_RQ[:, None, : k + 2] @ product_RQC[:, : k + 2])[:, 0]
    scale_RGQ[:] = half(scale_RGQ)
