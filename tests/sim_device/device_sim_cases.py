"""Small devices, plans and work whose simulations tests look into."""

from typing import Any

import numpy as np

from placer.core.cluster import LinkClass
from placer.core.device.ladder import BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.device.work import DeviceWork
from sim.device.rows import COLUMNS
from sim.device.simulator import device_rows

NESTED = BitLadder(bits_K=(2, 3, 4))
COPIES = BitLadder(bits_K=(2, 3, 4), nested=False)


def device_of(*, read_us: float = 10.0, two_hops: bool = False, slowdown: float = 1.0, **compute: Any) -> DeviceSpec:
    """A disk that needs `read_us` and 1 us for 1000 bytes, and a processor of a few microseconds an item."""
    times: dict[str, Any] = {
        "layer_us": 4.0,
        "layer_token_us": 0.25,
        "base_us": 6.0,
        "residual_us": 1.5,
        "ffn_tokens": (1, 4, 16),
        "ffn_us": (4.0, 7.0, 19.0),
        "io_slowdown": slowdown,
        **compute,
    }
    return DeviceSpec(
        name="small",
        memory_mib=64,
        disk=LinkClass(gbytes_per_s=1.0, alpha_us=read_us),
        to_device=LinkClass(gbytes_per_s=2.0, alpha_us=1.0) if two_hops else None,
        compute=DeviceCompute(**times),
    )


def work_of(count_BLEK: Any, predicted_BLEK: Any = None, tokens: int = 4) -> DeviceWork:
    counts = np.asarray(count_BLEK, dtype=np.int64)
    predicted = None if predicted_BLEK is None else np.asarray(predicted_BLEK, dtype=np.int64)
    return DeviceWork(
        tokens_B=np.full(len(counts), tokens, dtype=np.int64), count_BLEK=counts, predicted_BLEK=predicted
    )


def random_work(seed: int, shape_BLEK: tuple[int, int, int, int] = (3, 3, 5, 3), *, predicted: bool = False) -> Any:
    """Counts that are mostly small and often 0; predictions that are right for about half of the experts."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, shape_BLEK) * (rng.random(shape_BLEK) < rng.uniform(0.2, 0.8))
    other = rng.integers(0, 5, shape_BLEK) * (rng.random(shape_BLEK) < 0.4)
    right = rng.random((*shape_BLEK[:3], 1)) < 0.5
    return work_of(counts, np.where(right, counts, other) if predicted else None, int(rng.integers(1, 20)))


def plan_of(work: DeviceWork, ladder: BitLadder = NESTED, **changes: Any) -> DevicePlan:
    """Nothing resident, no ceiling, planes of 2000 and 1000 bytes, a buffer for everything that a site has."""
    shape = work.count_BLEK.shape[1:3]
    plane_bytes_K = (2000, 1000, 1000)[: ladder.levels] if ladder.nested else (2000, 3000, 4000)[: ladder.levels]
    fields: dict[str, Any] = {
        "model": "small",
        "num_hidden_layers": shape[0],
        "moe_layers": tuple(range(shape[0])),
        "num_experts": shape[1],
        "ladder": ladder,
        "plane_bytes_K": plane_bytes_K,
        "resident_LE": np.zeros(shape, dtype=np.int64),
        "ceiling_LE": np.full(shape, ladder.levels, dtype=np.int64),
        "buffer_bytes": sum(plane_bytes_K) * shape[1],
        **changes,
    }
    fields.setdefault("memory_bytes", 0)
    plan = DevicePlan(**fields)
    if not plan.memory_bytes:
        fields["memory_bytes"] = plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes
    return DevicePlan(**fields)


def random_plan(seed: int, work: DeviceWork, ladder: BitLadder = NESTED, **changes: Any) -> DevicePlan:
    """A plan of any kind: some planes resident, some ceilings, a cache of any size or none, a buffer large or small."""
    rng = np.random.default_rng(seed)
    shape = work.count_BLEK.shape[1:3]
    expert = 4000 if ladder.nested else 9000
    fields: dict[str, Any] = {
        "resident_LE": rng.integers(0, ladder.levels + 1, shape) * (rng.random(shape) < rng.uniform(0, 0.8)),
        "ceiling_LE": rng.integers(1, ladder.levels + 1, shape) if rng.random() < 0.5 else np.full(shape, 3),
        "order": str(rng.choice(["by_id", "hebf", "hebf_exact"])),
        "cache": "lru" if rng.random() < 0.6 else "none",
        "cache_bytes": int(rng.integers(1, 12)) * 1000,
        "buffer_bytes": int(rng.choice([expert, expert + 1500, 2 * expert, 5 * expert, 9 * expert])),
        **changes,
    }
    return plan_of(work, ladder, **fields)


def spans_of(plan: DevicePlan, work: DeviceWork, device: DeviceSpec, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The table of spans (columns of sim.device.rows.COLUMNS) as a dict of columns, and `about`."""
    rows, about = device_rows(plan, work, device, **options)
    return dict(zip(COLUMNS, rows.table().T, strict=True)), about
