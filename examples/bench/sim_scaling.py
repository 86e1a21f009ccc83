"""What an iteration costs to simulate, against ranks (to 1,024), layers and flows; and a serving run. Processor time.

    python examples/bench/sim_scaling.py OUT.json [--plot OUT.png] [--serve]

Synthetic routing, top-8 of 256 experts (as many as ranks beyond), per_rank, nodes of 8 ranks with and without a shared
uplink, 2,048 tokens unless varied. From 128 ranks on there are fewer layers; figures are per layer, and at 64 ranks of
all 58. Replaying the routing (`work_of`) is timed apart: every fidelity needs it once.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from placer.core.atomic import write_atomically, write_text_atomically
from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.plan import Plan
from sim.flow import flow_times
from sim.phase import phase_times
from sim.port import port_times
from sim.stages import stages_of
from sim.traffic import work_of
from traces.synthetic import synthesize

LAYERS = {8: 58, 16: 58, 32: 58, 64: 58, 128: 8, 256: 2, 512: 1, 1024: 1}
PORT_ITERATIONS = 16


def cluster_of(ranks: int, *, uplink: bool) -> ClusterSpec:
    """Nodes of 8 ranks; the uplink has half of what its ranks' own ports have together."""
    network = LinkClass(gbytes_per_s=50.0, alpha_us=2.0)
    return ClusterSpec(
        name="bench",
        nodes=max(1, ranks // 8),
        ranks_per_node=min(8, ranks),
        memory_gib=80.0,
        intra=LinkClass(gbytes_per_s=400.0, alpha_us=1.0),
        inter=network,
        uplink=LinkClass(gbytes_per_s=200.0, alpha_us=2.0) if uplink else None,
        compute=Compute(tflops=400.0, weight_read_gbytes_per_s=3000.0, launch_us=10.0),
    )


def point(ranks: int, layers: int, tokens: int, *, uplink: bool) -> dict:
    """Processor seconds of one iteration at each fidelity, and how many messages it has."""
    cluster, experts = cluster_of(ranks, uplink=uplink), max(256, ranks)
    trace = synthesize(
        num_layers=layers, num_experts=experts, top_k=8, num_tokens=tokens * PORT_ITERATIONS, num_requests=256, seed=0
    )
    plan = Plan(
        model="bench",
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=cluster.ranks_per_node,
        moe_layers=tuple(range(layers)),
        slot_expert_LP=np.tile(np.arange(experts), (layers, 1)),
        mode="per_rank",
    )

    def work(iterations: int):
        count = tokens * iterations
        window_T = np.arange(count) // tokens
        source_T = np.arange(count) % ranks
        rows_LTK = trace.expert_LTK[:, :count]
        return work_of(plan, trace.model, cluster, "per_rank", rows_LTK, source_T, window_T, iterations)

    start = time.process_time()
    one = work(1)
    found = {
        "ranks": ranks,
        "layers": layers,
        "tokens": tokens,
        "uplink": uplink,
        "replay_s": time.process_time() - start,
    }
    legs = [leg for stage in stages_of(one) for leg in stage.legs]
    found["flows"] = int(sum((leg.copies_WRR > 0).sum() for leg in legs))
    many = work(PORT_ITERATIONS if ranks <= 128 else 2)
    for name, run, job in (("port", port_times, many), ("phase", phase_times, one), ("flow", flow_times, one)):
        stages = stages_of(job)
        start = time.process_time()
        run(job, stages)
        found[f"{name}_s"] = (time.process_time() - start) / job.windows
    return found


def points() -> list[dict]:
    """Warm-up first, so that nothing compiles in the clock."""
    for uplink in (False, True):
        point(8, 1, 64, uplink=uplink)
    wanted = [(ranks, layers, 2048) for ranks, layers in LAYERS.items()]
    wanted += [(64, layers, 2048) for layers in (4, 16)] + [(64, 4, tokens) for tokens in (256, 1024, 4096, 16384)]
    done = []
    for uplink in (False, True):
        for ranks, layers, tokens in wanted:
            done.append(point(ranks, layers, tokens, uplink=uplink))
            print(done[-1], flush=True)
    return done


def serving() -> dict:
    """10,000 requests on 64 ranks: processor seconds, without replicas."""
    from sim.serving import Arrivals, Lengths, Limits, PlanPricer, PoolSpec, Streams, least_loaded, make_workload, serve

    layers, experts, cluster = 58, 256, cluster_of(64, uplink=False)
    trace = synthesize(num_layers=layers, num_experts=experts, top_k=8, num_tokens=20_000, num_requests=200, seed=0)
    plan = Plan(
        model="bench",
        num_experts=experts,
        num_ranks=64,
        ranks_per_node=8,
        moe_layers=tuple(range(layers)),
        slot_expert_LP=np.tile(np.random.default_rng(0).permutation(experts), (layers, 1)),
        mode="per_rank",
    )
    arrivals = Arrivals(
        kind="poisson",
        rate_per_s=100.0,
        requests=10_000,
        input=Lengths(mean=512.0),
        output=Lengths(mean=128.0),
    )
    workload = make_workload(arrivals, 10_000.0, np.random.default_rng(0))
    pricer = PlanPricer(plan, trace.model, cluster, trace.expert_LTK)
    pool = PoolSpec(pricer=pricer, ranks=64, policy=least_loaded(), limits=Limits(horizon_s=10_000.0))
    start = time.process_time()
    served = serve(workload, Streams.of(trace.request_id_T, trace.phase_T), (pool,))
    return {"requests": 10_000, "seconds": time.process_time() - start, "stopped_by": served.stopped_by}


def plot(found: list[dict], path: Path) -> None:
    """Per layer against ranks; an iteration against layers; four layers against flows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("ranks", "one layer", lambda p: p["tokens"] == 2048 and p["layers"] == LAYERS[p["ranks"]], True),
        ("layers", "64 ranks", lambda p: p["ranks"] == 64 and p["tokens"] == 2048, False),
        ("flows", "64 ranks, 4 layers", lambda p: p["ranks"] == 64 and p["layers"] == 4, False),
    )
    for axis, (key, title, wanted, per_layer) in zip(axes, panels, strict=True):
        for uplink, style in ((False, "-"), (True, "--")):
            part = sorted((p for p in found if p["uplink"] == uplink and wanted(p)), key=lambda p: p[key])
            for name, colour in (("port", "C0"), ("phase", "C1"), ("flow", "C2"), ("replay", "C7")):
                cost = [1e3 * p[f"{name}_s"] / (p["layers"] if per_layer else 1) for p in part]
                label = f"{name}, uplink" if uplink else name
                axis.loglog([p[key] for p in part], cost, style, color=colour, marker="o", markersize=3, label=label)
        axis.set(xlabel=key, ylabel="processor ms", title=title)
        sizes = sorted({p[key] for p in found if wanted(p)})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, fontsize=7)
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main() -> None:
    """Runs, writes, plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--serve", action="store_true")
    given = parser.parse_args()
    data = {"points": points()}
    if given.serve:
        data["serving"] = serving()
        print(data["serving"])
    write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    if given.plot is not None:
        plot(data["points"], given.plot)


if __name__ == "__main__":
    main()
