"""Predicted iteration time of a small machine over memory budgets: the plan for each, its bound, and other requests.

    python examples/device/budget_curve.py [--trace FILE] [--iterations N] [--json FILE]

Decode batches of 16 requests. The shipped trace has routing but no bits, so every (token, expert) use draws a level
from D2MoE's training capacities (0.3, 0.4, 0.3) with a fixed seed: real routing, synthetic demand. The machine is
described below: assumed numbers of the size that two CPU cores and a disk of 350 MB/s have, not a measurement.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from placer.core.cluster import LinkClass
from placer.core.device.evaluate import evaluate_device
from placer.core.device.ladder import LADDERS, expert_shapes
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.device.work import DeviceWork
from placer.pipeline.device_planning import DevicePlanSettings, PlaneSizes, plan_device
from traces.device_work import decode_batches, device_work
from traces.store import load_trace
from traces.trace import RoutingTrace

MIB = 2**20
SHIPPED = Path(__file__).resolve().parents[1] / "small_moe" / "trace.safetensors"
REQUESTS = 16
CAPACITIES = (0.3, 0.4, 0.3)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
HIDDEN, INNER = 128, 96

MACHINE = DeviceSpec(
    name="two-cores-350MB/s",
    memory_mib=1.0,
    disk=LinkClass(gbytes_per_s=0.35, alpha_us=20.0),
    compute=DeviceCompute(
        layer_us=300.0,
        layer_token_us=10.0,
        base_us=35.0,
        residual_us=12.0,
        ffn_tokens=(1, 4, 16),
        ffn_us=(20.0, 26.0, 50.0),
    ),
)


def with_demand(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """The trace with a bit-width for every use, drawn by capacity."""
    bits = np.array(LADDERS["v1"].bits_K, dtype=np.uint8)
    drawn = np.random.default_rng(seed).choice(bits, size=trace.expert_LTK.shape, p=CAPACITIES)
    return replace(trace, bits_LTK=drawn)


def halves(trace: RoutingTrace, iterations: int) -> tuple[DeviceWork, DeviceWork]:
    """Work to plan on and work to judge on: groups of requests in turn, as many iterations of each."""
    batches = decode_batches(trace, REQUESTS)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    group_of = np.unique(trace.request_id_T, return_inverse=True)[1].reshape(-1) // REQUESTS
    groups: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        groups.setdefault(int(group_of[batch[0]]), []).append(batch)
    each = max(1, 2 * iterations // len(groups))
    for number, group in enumerate(groups.values()):
        parts[number % 2].extend(group[:each])
    planned, judged = (device_work(trace, part, LADDERS["v1"]) for part in parts)
    return planned, judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=SHIPPED)
    parser.add_argument("--iterations", type=int, default=240)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trace = with_demand(load_trace(arguments.trace))
    planned, judged = halves(trace, arguments.iterations)
    ladder, model = LADDERS["v1"], trace.model
    sizes = PlaneSizes(
        model=model.name,
        num_hidden_layers=model.num_hidden_layers,
        moe_layers=tuple(model.moe_layers),
        num_experts=model.num_experts,
        ladder=ladder,
        plane_bytes_K=ladder.plane_bytes_K(expert_shapes(HIDDEN, INNER)),
    )
    whole = sum(sizes.plane_bytes_K) * model.num_sites * model.num_experts
    print(f"{planned.num_iterations} iterations planned on, {judged.num_iterations} of other requests; ", end="")
    print(f"all planes {whole / MIB:.2f} MiB; {MACHINE.name} (assumed numbers)")
    head = "budget MiB   share  ms/iter  bound ms   gap %  read MiB  others ms  order            "
    print(head + "cache  cache MiB  buffer MiB")
    rows = []
    for share in SHARES:
        device = replace(MACHINE, memory_mib=max(share * whole, sum(sizes.plane_bytes_K)) / MIB)
        plan = plan_device(planned, device, sizes, DevicePlanSettings())
        here, there = evaluate_device(plan, planned, device), evaluate_device(plan, judged, device)
        row = {
            "budget_mib": device.memory_mib,
            "share": share,
            "iteration_ms": here.mean_iteration_ns / 1e6,
            "bound_ms": (plan.bound or 0.0) / 1e6,
            "bound_by": plan.bound_by,
            "gap": plan.gap,
            "read_mib": here.mean_read_bytes / MIB,
            "others_iteration_ms": there.mean_iteration_ns / 1e6,
            "order": plan.order,
            "cache": plan.cache,
            "cache_mib": plan.cache_bytes / MIB,
            "buffer_mib": plan.buffer_bytes / MIB,
            "resident_mib": plan.resident_bytes / MIB,
        }
        rows.append(row)
        print(
            f"{row['budget_mib']:10.3f} {share:7.2f} {row['iteration_ms']:8.3f} {row['bound_ms']:9.3f} "
            f"{100 * (plan.gap or 0.0):7.2f} {row['read_mib']:9.3f} {row['others_iteration_ms']:10.3f}  "
            f"{plan.order:<15}  {plan.cache:<5} {row['cache_mib']:10.3f} {row['buffer_mib']:11.3f}"
        )
    if arguments.json is not None:
        text = json.dumps({"machine": MACHINE.to_dict(), "all_planes_mib": whole / MIB, "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
