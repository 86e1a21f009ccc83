"""What a predictor tells a device: the experts, and the levels, that each iteration is expected to demand.

Legend: B iterations, L routing sites, T tokens, K levels of the ladder (top-k in `_LTK`), E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import BitLadder
from placer.core.device.work import DeviceWork
from placer.core.errors import MismatchError, UsageError
from traces.device_work import device_work
from traces.trace import RoutingTrace

__all__ = ["level_shares", "predicted_work"]

IntArray = npt.NDArray[np.int64]


def predicted_work(
    work: DeviceWork,
    trace: RoutingTrace,
    batches: Sequence[IntArray],
    predicted_LTK: npt.NDArray[np.uint8 | np.uint16],
    ladder: BitLadder,
    *,
    level: int | None = None,
    share_LEK: npt.NDArray[np.float64] | None = None,
) -> DeviceWork:
    """`work` (of `trace` in `batches`) with `predicted_BLEK` from a prediction of the trace's experts.

    Nobody predicts bit-widths: an expert's predicted tokens are spread over the levels as `share_LEK` says (see
    `level_shares`), or all demand `level` (None: the highest, as `device_work` counts a trace without bits). Spreading
    keeps whole tokens and their number. Raises UsageError where the trace has bits and neither is given, or where both
    are; MismatchError where work, trace and batches do not belong together.
    """
    if len(batches) != work.num_iterations or predicted_LTK.shape != trace.expert_LTK.shape:
        raise MismatchError(
            f"{len(batches)} batches and a prediction {predicted_LTK.shape} for {work.num_iterations} iterations of a "
            f"trace {trace.expert_LTK.shape}; predict the trace that the work was made of"
        )
    if (share_LEK is not None) == (level is not None) and not (share_LEK is None and trace.bits_LTK is None):
        raise UsageError("give predicted_work either level or share_LEK: which levels will predicted tokens demand?")
    expected = replace(trace, expert_LTK=predicted_LTK, weight_LTK=None, bits_LTK=None, known_sha256="")
    count_BLEK = device_work(expected, batches, ladder, level=level).count_BLEK
    if count_BLEK.shape != work.count_BLEK.shape:
        raise MismatchError(f"the work has {work.count_BLEK.shape} counts, trace and ladder give {count_BLEK.shape}")
    if share_LEK is not None:
        if share_LEK.shape != count_BLEK.shape[1:]:
            raise MismatchError(f"share_LEK is {share_LEK.shape}; give {count_BLEK.shape[1:]} (sites, experts, levels)")
        total_BLE = count_BLEK.sum(axis=-1)
        below_BLEK = np.rint(total_BLE[..., None] * np.cumsum(share_LEK, axis=-1)).astype(np.int64)
        below_BLEK[..., -1] = total_BLE
        count_BLEK = np.diff(below_BLEK, axis=-1, prepend=0)
    return DeviceWork(tokens_B=work.tokens_B, count_BLEK=work.count_BLEK, predicted_BLEK=count_BLEK)


def level_shares(trace: RoutingTrace, ladder: BitLadder) -> npt.NDArray[np.float64]:
    """How the tokens of each expert spread over the levels they demand in `trace`, (L, E, K), rows summing to 1.

    An expert without tokens has its site's mix. Raises UsageError for a trace without bits.
    """
    if trace.bits_LTK is None:
        raise UsageError("the trace has no bit-widths (bits_LTK); give predicted_work a level")
    count_LEK = device_work(trace, [np.arange(trace.num_tokens)], ladder).count_BLEK[0].astype(np.float64)
    site_L1K = count_LEK.sum(axis=1, keepdims=True)
    site_L1K[site_L1K.sum(axis=-1) == 0, :] = 1.0
    count_LEK = np.where(count_LEK.sum(axis=-1, keepdims=True) > 0, count_LEK, site_L1K)
    return np.asarray(count_LEK / count_LEK.sum(axis=-1, keepdims=True))
