"""Fits of measured times: a link behind a token bucket, experts, a tail. Pure numpy, no clock.

All are least squares: of relative errors, and for links of errors over the root of the time, between relative ones
(which believe the noise of short messages) and plain ones (which forget them). What is no fit is refused, with its
numbers.

Legend: N sizes, I repetitions, J launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.errors import ExecutionError

__all__ = [
    "MAX_RESIDUAL",
    "MIN_R2",
    "ExpertFit",
    "LinkFit",
    "Quality",
    "fit_experts",
    "fit_line",
    "fit_link",
    "fit_tail",
    "short",
]

FloatArray = npt.NDArray[np.float64]

MIN_R2 = 0.95
MAX_RESIDUAL = 0.35
DIGITS = 4
BELIEVED = 0.25
"""A bucket is believed where it leaves no more than this share of what the plain line leaves."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a fit is. `max_residual`: largest |fit / measured - 1|. `spread`: (max - min) / median over launches."""

    r2: float
    max_residual: float
    spread: float

    def require(self, what: str, found: str, min_r2: float = MIN_R2) -> None:
        """Raises ExecutionError where this is no fit."""
        if not (self.r2 >= min_r2 and self.max_residual <= MAX_RESIDUAL):
            raise ExecutionError(
                f"calibration of {what} refused: {found}, R2 {self.r2:.3f} (at least {min_r2}), largest residual "
                f"{100 * self.max_residual:.0f} % (at most {100 * MAX_RESIDUAL:.0f} %); measure on a quiet machine"
            )


@dataclass(frozen=True, slots=True)
class LinkFit:
    """time(n) = alpha_ns + max(0, n - burst_bytes) / gbytes_per_s."""

    alpha_ns: float
    gbytes_per_s: float
    burst_bytes: float
    quality: Quality


@dataclass(frozen=True, slots=True)
class ExpertFit:
    """time(experts, rows) = launch_ns + experts * (read_ns `form` rows * row_ns), where `form` is max or sum.

    max: the weights arrive while rows are computed (GPUs). sum: they arrive first (BLAS on CPUs packs them).
    """

    launch_ns: float
    read_ns: float
    row_ns: float
    form: Literal["max", "sum"]
    quality: Quality


def fit_link(what: str, bytes_N: npt.ArrayLike, time_JIN: npt.ArrayLike) -> LinkFit:
    """The fit of medians over launches and repetitions (ns); spread is that of the bandwidth over launches.

    At least four sizes. Raises ExecutionError where no line of positive bandwidth fits.
    Complexity O(N^2). Guarantee: data that follow the model exactly are recovered exactly.
    """
    size_N, time_JIN = np.asarray(bytes_N, dtype=np.float64), np.asarray(time_JIN, dtype=np.float64)
    time_N = np.median(time_JIN.reshape(-1, len(size_N)), axis=0)
    alpha, slope, burst = _bucket(size_N, time_N)
    if not slope > 0:
        raise ExecutionError(
            f"calibration of {what} refused: times do not grow with sizes ({time_N[0] / 1e3:.1f} us at "
            f"{size_N[0]:.0f} bytes, {time_N[-1] / 1e3:.1f} us at {size_N[-1]:.0f}); measure larger messages"
        )
    slopes = [_bucket(size_N, np.median(time_IN, axis=0))[1] for time_IN in time_JIN]
    fitted_N = alpha + np.maximum(0.0, size_N - burst) * slope
    quality = _quality(time_N, fitted_N, slopes)
    quality.require(what, f"{1e3 / slope:.3g} MB/s")
    return LinkFit(alpha, 1 / slope, burst, quality)


def fit_line(what: str, size_N: npt.ArrayLike, time_JIN: npt.ArrayLike) -> LinkFit:
    """One line through the medians of all sizes, for work that no bucket lets through at once.

    Where the longest time is not twice the shortest, R2 says little (a constant would do) and residuals alone decide.
    Raises ExecutionError where it is none, or where times do not grow.
    """
    size, time_JIN = np.asarray(size_N, dtype=np.float64), np.asarray(time_JIN, dtype=np.float64)
    alpha, slope, _ = _line(size, np.median(time_JIN.reshape(-1, len(size)), axis=0), 0.0)
    if not slope > 0:
        raise ExecutionError(f"calibration of {what} refused: times do not grow with sizes; measure on a quiet machine")
    slopes = [_line(size, np.median(one_IN, axis=0), 0.0)[1] for one_IN in time_JIN]
    time_N = np.median(time_JIN.reshape(-1, len(size)), axis=0)
    quality = _quality(time_N, alpha + size * slope, slopes)
    flat = float(time_N.max()) < 2 * float(time_N.min())
    quality.require(what, f"{slope:.3g} ns each and {alpha / 1e3:.1f} us", 0.0 if flat else MIN_R2)
    return LinkFit(alpha, 1 / slope, 0.0, quality)


def _bucket(size_N: FloatArray, time_N: FloatArray) -> tuple[float, float, float]:
    """alpha, slope and burst: the plain line unless a bucket explains nearly all that it leaves."""
    plain = _line(size_N, time_N, 0.0)
    least, best = _error(size_N, time_N, plain), plain
    enough = BELIEVED * least
    # two sizes below the bucket and three above are the fewest that can tell one
    for split in range(2, len(size_N) - 2):
        design = np.zeros((len(size_N), 3))
        design[:split, 0] = 1
        design[split:, 1] = 1
        design[split:, 2] = size_N[split:]
        flat, start, slope = _solve(design, time_N, time_N**-0.5)
        if not slope > 0:
            continue
        burst = float(np.clip((flat - start) / slope, size_N[split - 1], size_N[split]))
        found = _line(size_N, time_N, burst)
        error = _error(size_N, time_N, found)
        if error < least and error <= enough:
            least, best = error, found
    return best


def _line(size_N: FloatArray, time_N: FloatArray, burst: float) -> tuple[float, float, float]:
    """alpha >= 0 and slope of the line behind a bucket of `burst` bytes."""
    beyond_N = np.maximum(0.0, size_N - burst)
    alpha, slope = _solve(np.stack([np.ones_like(size_N), beyond_N], axis=1), time_N, time_N**-0.5)
    if alpha < 0:
        alpha, (slope,) = 0.0, _solve(beyond_N[:, None], time_N, time_N**-0.5)
    return float(alpha), float(slope), burst


def _solve(design: FloatArray, time_N: FloatArray, weight_N: FloatArray) -> FloatArray:
    """The coefficients of least weighted squares."""
    found = np.linalg.lstsq(design * weight_N[:, None], time_N * weight_N, rcond=None)[0]
    return np.asarray(found, dtype=np.float64)


def _error(size_N: FloatArray, time_N: FloatArray, found: tuple[float, float, float]) -> float:
    alpha, slope, burst = found
    return float(((alpha + np.maximum(0.0, size_N - burst) * slope - time_N) ** 2 / time_N).sum())


def fit_experts(what: str, experts_N: npt.ArrayLike, rows_N: npt.ArrayLike, time_JIN: npt.ArrayLike) -> ExpertFit:
    """The better form's fit of medians (ns) of calls with so many experts of so many rows each.

    Spread is that of the row's cost. Raises ExecutionError where neither form fits.
    Complexity O(distinct rows * N). Guarantee: data that follow either form exactly are recovered exactly.
    """
    experts, rows = np.asarray(experts_N, dtype=np.float64), np.asarray(rows_N, dtype=np.float64)
    time_JIN = np.asarray(time_JIN, dtype=np.float64)
    time_N = np.median(time_JIN.reshape(-1, len(rows)), axis=0)
    launch, read, row, form = _curve(experts, rows, time_N)
    if not row > 0:
        raise ExecutionError(
            f"calibration of {what} refused: times do not grow with rows ({row:.3g} ns a row); measure more rows"
        )
    rates = [_curve(experts, rows, np.median(time_IN, axis=0))[2] for time_IN in time_JIN]
    quality = _quality(time_N, _expert_times(experts, rows, (launch, read, row, form)), rates)
    quality.require(what, f"{row:.3g} ns a row, {read:.3g} ns an expert")
    return ExpertFit(launch, read, row, form, quality)


Curve = tuple[float, float, float, Literal["max", "sum"]]


def _expert_times(experts: FloatArray, rows: FloatArray, curve: Curve) -> FloatArray:
    launch, read, row, form = curve
    return launch + experts * (np.maximum(read, rows * row) if form == "max" else read + rows * row)


def _curve(experts: FloatArray, rows: FloatArray, time_N: FloatArray) -> Curve:
    one = np.ones_like(rows)
    launch, read, row = _positive(np.stack([one, experts, experts * rows], axis=1), time_N)
    curves: list[Curve] = [(launch, read, row, "sum")]
    levels = np.unique(rows)
    for at in range(len(levels) - 1):
        flat = rows <= levels[at]
        parts = [one, np.where(flat, experts, 0), np.where(flat, 0, experts * rows)]
        launch, read, row = _positive(np.stack(parts, axis=1), time_N)
        # a corner outside its interval would be another curve
        curves.append((launch, float(np.clip(read, levels[at] * row, levels[at + 1] * row)), row, "max"))
    errors = [float(((_expert_times(experts, rows, curve) / time_N - 1) ** 2).sum()) for curve in curves]
    return curves[int(np.argmin(errors))]


def _positive(design: FloatArray, time_N: FloatArray) -> tuple[float, float, float]:
    """Coefficients of the three columns, the first two of which are dropped where they would be negative."""
    kept = [0, 1, 2]
    while True:
        found = dict(zip(kept, _solve(design[:, kept], time_N, 1 / time_N).tolist(), strict=True))
        negative = [column for column in kept if column < 2 and found[column] < 0]
        if not negative:
            return found.get(0, 0.0), found.get(1, 0.0), found[2]
        kept.remove(min(negative, key=lambda column: found[column]))


def fit_tail(
    predict: Callable[[float], FloatArray], time_N: npt.ArrayLike, *, most: float = 16.0
) -> tuple[float, float]:
    """The tail (1 to `most`) whose predicted times are nearest the measured ones, and the largest residual left.

    `predict(tail)` gives the closed form's times (N,), which do not fall as the tail grows. Found to 0.1 %.
    """
    time_N = np.asarray(time_N, dtype=np.float64)

    def error(tail: float) -> float:
        return float(((predict(tail) / time_N - 1) ** 2).sum())

    tails = np.geomspace(1.0, most, 65)
    at = int(np.argmin([error(tail) for tail in tails]))
    fine = np.linspace(tails[max(0, at - 1)], tails[min(64, at + 1)], 201)
    tail = float(fine[int(np.argmin([error(value) for value in fine]))])
    return tail, float(np.abs(predict(tail) / time_N - 1).max())


def _quality(time_N: FloatArray, fitted_N: FloatArray, slopes: list[float]) -> Quality:
    """R2 is of plain times, as usual: it judges the long ones, the residual judges the short."""
    total = ((time_N - time_N.mean()) ** 2).sum()
    left = ((time_N - fitted_N) ** 2).sum()
    r2 = float(1 - left / total) if total > 0 else 0.0
    spread = (max(slopes) - min(slopes)) / abs(float(np.median(slopes)) or 1.0)
    return Quality(r2, float(np.abs(fitted_N / time_N - 1).max()), float(spread))


def short(value: float) -> float:
    """The figures of a calibration that mean something."""
    return float(f"{value:.{DIGITS}g}")
