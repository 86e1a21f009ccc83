"""Where a request will touch, learnt: from the rates of its first tokens in every layer to its rates as a whole.

The raw rates of a few tokens are noisy, mostly across the directions in which requests differ. A ridge regression on
requests that are known to the end, one column per layer and rank, finds those directions; its strength is the one of
RIDGES with the least leave-one-out error, so nothing is tuned on the requests to predict.

Legend: L layers, Q requests, R ranks, F features (layer and rank).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["RIDGES", "PrefixModel", "fit_prefix_model"]

FloatArray = npt.NDArray[np.float64]

RIDGES = tuple(10.0**power for power in np.arange(-2, 3.5, 0.5).tolist())
"""Strengths tried, in units of the mean tokens of a known request."""


@dataclass(frozen=True, slots=True)
class PrefixModel:
    """rate[q] = rate_R + (first rates[q] - mean_F) @ slope_FR; `ridge` is the strength that was chosen."""

    rate_R: FloatArray
    mean_F: FloatArray
    slope_FR: FloatArray
    ridge: float

    def predict(
        self, seen_LQR: npt.NDArray[np.number], seen_Q: npt.NDArray[np.integer], tokens_Q: npt.NDArray[np.integer]
    ) -> FloatArray:
        """Predicted touches of requests over all layers, (Q, R), not below 0; the mean rates where nothing was seen."""
        rate_QF = _rates(seen_LQR, seen_Q)
        if rate_QF.shape[1] != len(self.mean_F):
            raise UsageError(f"seen_LQR has {rate_QF.shape[1]} layers x ranks; the model knows {len(self.mean_F)}")
        apart_QF = np.where(np.asarray(seen_Q)[:, None] > 0, rate_QF - self.mean_F, 0.0)
        rate_QR: FloatArray = np.maximum(0.0, self.rate_R + apart_QF @ self.slope_FR)
        return rate_QR * np.asarray(tokens_Q)[:, None]


def fit_prefix_model(
    seen_LQR: npt.NDArray[np.number],
    seen_Q: npt.NDArray[np.integer],
    touch_QR: npt.NDArray[np.number],
    tokens_Q: npt.NDArray[np.integer],
) -> PrefixModel:
    """The model of known requests: `seen_LQR` touches of their first `seen_Q` tokens, `touch_QR` of all `tokens_Q`.

    Requests count by their tokens. Guarantee: the least leave-one-out squared error over RIDGES, exact by leverages.
    Complexity: one singular value decomposition, O(Q F min(Q, F)). Raises UsageError for fewer than 2 requests with
    tokens.
    """
    known = (np.asarray(tokens_Q) > 0) & (np.asarray(seen_Q) > 0)
    if int(known.sum()) < 2:
        raise UsageError(f"{int(known.sum())} known requests with tokens; a model needs 2 or more")
    weight_Q = np.asarray(tokens_Q, dtype=np.float64)[known]
    rate_QF = _rates(seen_LQR, seen_Q)[known]
    whole_QR = np.asarray(touch_QR, dtype=np.float64)[known] / weight_Q[:, None]
    share_Q = weight_Q / weight_Q.sum()
    mean_F, rate_R = share_Q @ rate_QF, share_Q @ whole_QR
    root_Q = np.sqrt(weight_Q)[:, None]
    left_QM, size_M, right_MF = np.linalg.svd((rate_QF - mean_F) * root_Q, full_matrices=False)
    target_QR = (whole_QR - rate_R) * root_Q
    along_MR = left_QM.T @ target_QR
    best_error, best_ridge = np.inf, RIDGES[-1]
    for ridge in RIDGES:
        kept_M = size_M**2 / (size_M**2 + ridge * weight_Q.mean())
        # the mean is fitted too, with leverage share_Q
        leverage_Q = share_Q + (left_QM**2) @ kept_M
        error = float((((target_QR - left_QM @ (kept_M[:, None] * along_MR)) / (1 - leverage_Q)[:, None]) ** 2).sum())
        if error < best_error:
            best_error, best_ridge = error, ridge
    shrunk_M = size_M / (size_M**2 + best_ridge * weight_Q.mean())
    slope_FR = np.asarray(right_MF.T @ (shrunk_M[:, None] * along_MR), dtype=np.float64)
    return PrefixModel(rate_R, mean_F, slope_FR, best_ridge)


def _rates(seen_LQR: npt.NDArray[np.number], seen_Q: npt.NDArray[np.integer]) -> FloatArray:
    """Touches per token seen, (Q, F)."""
    rate_LQR = seen_LQR / np.maximum(1, np.asarray(seen_Q))[None, :, None]
    return np.asarray(rate_LQR.transpose(1, 0, 2).reshape(seen_LQR.shape[1], -1), dtype=np.float64)
