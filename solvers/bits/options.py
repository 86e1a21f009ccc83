"""What every expert may get (a ceiling and resident planes), and what each choice does to processor and disk.

Legend: L routing sites, B iterations, E experts, K levels, X = E K, O options, M ceilings that are allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.evaluate import clipping_loss_LEK, outside_ns_B
from placer.core.device.ladder import BitLadder
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork, tokens_on_planes
from solvers.bits.knapsack import Knapsack
from solvers.bits.replay import compute_ns_KN

__all__ = ["LevelOptions", "level_options"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LevelOptions:
    """Options of every expert and the load they put on the two machines of a site: processor and disk.

    ceiling_O, resident_O   the option as `DevicePlan` writes it
    bytes_O, missing_O      resident bytes; most bytes that one use may have to load
    loads_OK                planes that are not resident
    at_O                    the option's ceiling as an index over M
    need_MLBX               1 where an iteration needs the plane under that ceiling (whole numbers as floats)
    compute_MLBE            nanoseconds of an expert's items under that ceiling
    input_ns_K              nanoseconds of a plane on the busier of disk and copy engine
    tail_LB                 factor, 1 or more, on the input time: after the last plane some item is still to be computed
    outside_ns              mean nanoseconds of an iteration outside its experts
    loss_LEO                quality cost of an option, per use of the whole work (zeros where nothing is clipped)
    """

    ladder: BitLadder
    ceiling_O: IntArray
    resident_O: IntArray
    bytes_O: IntArray
    missing_O: IntArray
    loads_OK: BoolArray
    at_O: IntArray
    need_MLBX: FloatArray
    compute_MLBE: FloatArray
    input_ns_K: FloatArray
    tail_LB: FloatArray
    outside_ns: float
    loss_LEO: FloatArray

    @property
    def shape_LBE(self) -> tuple[int, int, int]:
        """Sites, iterations, experts."""
        _, sites, iterations, experts = self.compute_MLBE.shape
        return sites, iterations, experts

    def cost_LEO(self, share_LB: FloatArray) -> FloatArray:
        """Nanoseconds of every option when a share (0 to 1) of a site's time is the disk's, the rest the processor's.

        For any shares, its sum over experts is at most the sum over sites and iterations of the makespans.
        """
        sites, _, experts = self.shape_LBE
        input_LB = (share_LB * self.tail_LB)[:, None, :]
        options = len(self.ceiling_O)
        cost_LEO = np.empty((sites, experts, options))
        for number in range(len(self.need_MLBX)):
            need_LEK = (input_LB @ self.need_MLBX[number]).reshape(sites, experts, -1) * self.input_ns_K
            compute_LE = ((1.0 - share_LB)[:, None, :] @ self.compute_MLBE[number])[:, 0, :]
            for option in np.flatnonzero(self.at_O == number):
                cost_LEO[..., option] = compute_LE + need_LEK @ self.loads_OK[option]
        return cost_LEO

    def machine_ns_LB(self, choice_LE: IntArray) -> tuple[FloatArray, FloatArray]:
        """Time of processor and disk at every site and iteration under a choice of options, (L, B) each."""
        sites, iterations, _ = self.shape_LBE
        compute_LB, input_LB = np.zeros((sites, iterations)), np.zeros((sites, iterations))
        for number in range(len(self.need_MLBX)):
            here_LE = (self.at_O[choice_LE] == number).astype(np.float64)
            loads_LX = (self.loads_OK[choice_LE] * self.input_ns_K * here_LE[..., None]).reshape(sites, -1, 1)
            input_LB += (self.need_MLBX[number] @ loads_LX)[..., 0]
            compute_LB += (self.compute_MLBE[number] @ here_LE[..., None])[..., 0]
        return compute_LB, input_LB * self.tail_LB

    def knapsack(self, cost_LEO: FloatArray, most_bytes: int, buffer_bytes: int, most_loss: float | None) -> Knapsack:
        """One class per (site, expert): options that such a buffer can load, within the byte budget and loss limit."""
        sites, _, experts = self.shape_LBE
        options = len(self.ceiling_O)
        bytes_O = np.where(self.missing_O <= buffer_bytes, self.bytes_O, -1)
        return Knapsack(
            bytes_CO=np.broadcast_to(bytes_O, (sites * experts, options)).copy(),
            cost_CO=cost_LEO.reshape(sites * experts, options),
            most_bytes=most_bytes,
            loss_CO=None if most_loss is None else self.loss_LEO.reshape(sites * experts, options),
            most_loss=most_loss,
        )


def level_options(
    work: DeviceWork,
    device: DeviceSpec,
    ladder: BitLadder,
    plane_bytes_K: tuple[int, ...],
    *,
    ceilings: Sequence[int],
    error_LEK: FloatArray | None = None,
) -> LevelOptions:
    """Options with these ceilings (levels from 1) and every residency up to each. Complexity: O(M B L E K).

    Several ceilings need `error_LEK`; `work` is the demand before clipping.
    """
    iterations, sites, experts, levels = work.count_BLEK.shape
    assert len(ceilings) == 1 or error_LEK is not None
    pairs = [(at, ceiling, level) for at, ceiling in enumerate(ceilings) for level in range(ceiling + 1)]
    at_O, ceiling_O, resident_O = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    plane_K = np.arange(levels)
    held_OK = plane_K < resident_O[:, None] if ladder.nested else plane_K == resident_O[:, None] - 1
    bytes_K = np.asarray(plane_bytes_K, dtype=np.int64)
    loads_OK = ~held_OK
    missing_O = ((loads_OK & (plane_K < ceiling_O[:, None])) * bytes_K).sum(axis=1)
    read_K = np.array([device.read_ns(size) for size in plane_bytes_K], dtype=np.float64)
    copy_K = np.array([device.copy_ns(size) for size in plane_bytes_K], dtype=np.float64)
    table_KN = compute_ns_KN(device, ladder, plane_bytes_K, int(work.count_BLEK.sum(axis=-1).max(initial=0)))
    need_MLBX = np.empty((len(ceilings), sites, iterations, experts * levels))
    compute_MLBE = np.empty((len(ceilings), sites, iterations, experts))
    input_K, other_K = (read_K, copy_K) if read_K.sum() >= copy_K.sum() else (copy_K, read_K)
    most_LB, least_LB = np.zeros((sites, iterations)), np.full((sites, iterations), np.inf)
    for at, ceiling in enumerate(ceilings):
        clipped = work.clipped(np.full((sites, experts), ceiling, dtype=np.int64)).count_BLEK
        needed = tokens_on_planes(clipped, nested=ladder.nested) > 0
        need_MLBX[at] = needed.transpose(1, 0, 2, 3).reshape(sites, iterations, -1)
        item_BLEK = table_KN[plane_K, clipped].astype(np.float64)
        compute_MLBE[at] = item_BLEK.sum(axis=-1).transpose(1, 0, 2)
        most_LB = np.maximum(most_LB, need_MLBX[at] @ np.tile(input_K, experts))
        least = np.where(clipped > 0, item_BLEK, np.inf).min(axis=(2, 3), initial=np.inf).T
        least_LB = np.minimum(least_LB, least)
    # one plane takes at least this on the machine that is not counted, and its item on the processor
    extra_LB = np.where(np.isfinite(least_LB), least_LB + other_K.min(), 0.0)
    loss_LEK = np.zeros((sites, experts, levels))
    if error_LEK is not None:
        loss_LEK = clipping_loss_LEK(work.count_BLEK.sum(axis=0), error_LEK) / max(1, int(work.count_BLEK.sum()))
    return LevelOptions(
        ladder=ladder,
        ceiling_O=ceiling_O,
        resident_O=resident_O,
        bytes_O=(held_OK * bytes_K).sum(axis=1),
        missing_O=missing_O,
        loads_OK=loads_OK,
        at_O=at_O,
        need_MLBX=need_MLBX,
        compute_MLBE=compute_MLBE,
        input_ns_K=input_K,
        tail_LB=1.0 + np.divide(extra_LB, most_LB, out=np.zeros_like(extra_LB), where=most_LB > 0),
        outside_ns=float(outside_ns_B(work, device).mean()) if iterations else 0.0,
        loss_LEO=loss_LEK[..., ceiling_O - 1],
    )
