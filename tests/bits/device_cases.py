"""Small devices, ladders and work for the tests of the bit budget."""

from typing import Any

import numpy as np

from placer.core.cluster import LinkClass
from placer.core.device.ladder import LADDERS, BitLadder, expert_shapes
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.device.work import DeviceWork

SHAPES = expert_shapes(128, 64)
NESTED = LADDERS["v1"]
COPIES = BitLadder(bits_K=(2, 3, 4), nested=False)


def device_of(mbytes_per_s: float = 350.0, *, copies: bool = False, memory_mib: float = 1.0) -> DeviceSpec:
    return DeviceSpec(
        name="small",
        memory_mib=memory_mib,
        disk=LinkClass(gbytes_per_s=mbytes_per_s / 1e3, alpha_us=3.0),
        to_device=LinkClass(gbytes_per_s=1.5, alpha_us=1.0) if copies else None,
        compute=DeviceCompute(
            layer_us=5.0,
            layer_token_us=0.5,
            base_us=6.0,
            residual_us=1.5,
            ffn_tokens=(1, 4, 16),
            ffn_us=(4.0, 7.0, 19.0),
        ),
    )


def work_of(seed: int, shape_BLEK: tuple[int, int, int, int] = (4, 2, 5, 3), share: float = 0.5) -> DeviceWork:
    """Counts that are mostly small, with experts that nobody uses."""
    rng = np.random.default_rng(seed)
    count_BLEK = rng.integers(0, 5, shape_BLEK) * (rng.random(shape_BLEK) < share)
    count_BLEK[:, :, int(rng.integers(shape_BLEK[2]))] = 0
    return DeviceWork(tokens_B=rng.integers(1, 9, shape_BLEK[0]), count_BLEK=count_BLEK)


def plan_of(work: DeviceWork, ladder: BitLadder, **changes: Any) -> DevicePlan:
    """Nothing resident, no ceiling, a buffer for one expert."""
    shape = work.count_BLEK.shape[1:3]
    bytes_K = ladder.plane_bytes_K(SHAPES)
    fields: dict[str, Any] = {
        "model": "small",
        "num_hidden_layers": shape[0],
        "moe_layers": tuple(range(shape[0])),
        "num_experts": shape[1],
        "ladder": ladder,
        "plane_bytes_K": bytes_K,
        "resident_LE": np.zeros(shape, dtype=np.int64),
        "ceiling_LE": np.full(shape, ladder.levels, dtype=np.int64),
        "buffer_bytes": sum(bytes_K),
        "memory_bytes": 2**20,
        **changes,
    }
    return DevicePlan(**fields)
