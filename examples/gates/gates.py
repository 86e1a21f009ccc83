"""Predicted against measured: placements, modes and homes on shaped clusters of namespaces, as root.

    sudo python examples/gates/gates.py OUT.json [--labs 2x2@100mbit 4x1@200mbit 2x2 ...] [--launches 3]

For each lab the cluster is calibrated, every combination predicted, and only then measured: all combinations of a group
in each launch, iteration by iteration in random order. Plans know one half of the requests; the other half runs. OUT is
written after every group; groups that it has are kept, so a run that was stopped goes on. `--table` only prints it.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from combinations import Combination, Halves, combinations, mixed, planted, resized
from rich.console import Console

from placer.config.settings import CalibrateSettings, RunSettings
from placer.core.atomic import write_text_atomically
from placer.core.cluster import ClusterSpec
from placer.core.timeline import Timeline
from placer.execute.job import metadata_bytes
from placer.execute.lab import Lab, LabSpec
from placer.execute.measure import replay_plans
from placer.pipeline import open_trace
from placer.pipeline.calibrating import calibrate_cluster
from placer.report.gates import GateRow, GateVerdict, gate_tables, judge_gates
from placer.report.paired import paired_ratio
from placer.report.tables import render
from sim import FIDELITIES, simulate

LABS = ("2x2@100mbit", "2x2@200mbit", "4x1@100mbit", "4x1@200mbit", "2x2")
SHIPPED = Path(__file__).parents[1] / "small_moe" / "trace.safetensors"
HIDDEN, INNER, TOKENS, ROUNDS, SECONDS = 256, 128, 1024, 4, 10.0
FIDELITY = FIDELITIES[-1]
RUN = RunSettings(hidden_size=HIDDEN, moe_intermediate_size=INNER, tokens_per_iteration=TOKENS)
CALIBRATE = CalibrateSettings(realtime=True, repetitions=11)


def halves_of(name: str, ranks: int, seed: int) -> Halves:
    """The shipped trace of a real model, or planted clusters: the half to plan on and the half to run."""
    used = TOKENS * ROUNDS
    if name == "planted":
        train, test = planted(ranks, 20_000, seed + 1), planted(ranks, used, seed + 2)
    else:
        train, test = open_trace(SHIPPED).split_by_request(0.5, seed)
        test = mixed(test, used, seed)
    return Halves(name=name, train=resized(train, HIDDEN, INNER), test=resized(test, HIDDEN, INNER))


def predicted_us(
    one: Combination, halves: Halves, cluster: ClusterSpec, batch_tokens: int = TOKENS
) -> dict[str, float]:
    """Median iteration at every fidelity, before anything of the group is measured."""
    model, tokens_LTK = halves.test.model, halves.test.expert_LTK
    extra = metadata_bytes(one.mode, tokens_LTK.shape[2])
    found = {}
    for fidelity in FIDELITIES:
        timeline = simulate(
            one.plan,
            model,
            cluster,
            tokens_LTK,
            one.source_T,
            fidelity=fidelity,
            mode=one.mode,
            batch_tokens=batch_tokens,
            metadata_bytes=extra,
        )
        found[fidelity] = float(np.median(timeline.iteration_ns())) / 1e3
    return found


def launch_medians_us(timeline: Timeline) -> list[float]:
    """Median iteration of each launch."""
    counts = timeline.about.get("launch_iterations", [timeline.num_iterations])
    return [float(np.median(part)) / 1e3 for part in np.split(timeline.iteration_ns(), np.cumsum(counts)[:-1])]


def group_of(lab: str, halves: Halves, cluster: ClusterSpec, launches: int, seed: int, say: Console) -> dict:
    """Rows of one group, and what the baseline measured against itself."""
    found = combinations(halves, cluster, SECONDS, seed)
    times = [predicted_us(one, halves, cluster) for one in found]
    say.print(f"{lab}, {halves.name}: {len(found)} combinations predicted, now measured")
    arms = [*found, found[0]]  # the baseline twice: the noise floor
    with Lab.open(LabSpec.parse(lab)) as opened:
        measured = replay_plans(
            [one.plan for one in arms],
            halves.test.expert_LTK,
            model=halves.test.model,
            sources=[one.source_T for one in arms],
            modes=[one.mode for one in arms],
            tokens_per_iteration=TOKENS,
            iterations=ROUNDS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            launches=launches,
            seed=seed,
            realtime=True,
            hosts=opened.hosts,
            verify=False,
            progress=lambda line: say.print(f"  {line}"),
        )
    group, rows = f"{lab}, {halves.name}", []
    for one, at, timeline in zip(found, times, measured, strict=False):
        medians, ratio = launch_medians_us(timeline), paired_ratio(measured[0], timeline)
        row = GateRow(
            group=group,
            name=one.name,
            placement=one.placement,
            mode=one.mode,
            homes=one.homes,
            measured_us=float(np.median(medians)),
            measured_low_us=min(medians),
            measured_high_us=max(medians),
            predicted_us=at[FIDELITY],
            ratio=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            predicted_ratio=times[0][FIDELITY] / at[FIDELITY],
        )
        rows.append(asdict(row) | {"by_fidelity_us": at})
    return {"rows": rows, "again": asdict(paired_ratio(measured[0], measured[-1]))}


def judged(data: dict) -> tuple[list[GateRow], GateVerdict]:
    """All rows and the verdict; the noise floor is the worst launch of a baseline against itself."""
    groups = data["groups"].values()
    rows = [GateRow(**{key: row[key] for key in GateRow.__slots__}) for group in groups for row in group["rows"]]
    noise = max(abs(np.log(group["again"][end])) for group in groups for end in ("low", "high"))
    return rows, judge_gates(rows, float(np.expm1(noise)))


def main() -> None:
    """Parses the arguments, runs what OUT does not have yet, prints the gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labs", nargs="+", default=LABS)
    parser.add_argument("--traces", nargs="+", default=("shipped", "planted"), choices=("shipped", "planted"))
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    say = Console(width=150)
    data = json.loads(given.out.read_text()) if given.out.exists() else {"groups": {}, "calibrations": {}}
    settings = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "tokens_per_iteration": TOKENS, "rounds": ROUNDS}
    data |= {"fidelity": FIDELITY, "launches": given.launches, "seed": given.seed} | settings
    for lab in () if given.table else given.labs:
        wanted = [name for name in given.traces if f"{lab}, {name}" not in data["groups"]]
        if not wanted:
            continue
        say.print(f"{lab}: calibrating")
        calibration = calibrate_cluster(lab=lab, settings=CALIBRATE, run=RUN)
        cluster = calibration.cluster
        data["calibrations"][lab] = {"cluster": cluster.to_dict(), "about": calibration.about}
        for name in wanted:
            halves = halves_of(name, cluster.num_ranks, given.seed)
            done = group_of(lab, halves, cluster, given.launches, given.seed, say)
            data["groups"][f"{lab}, {name}"] = done
            write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    rows, verdict = judged(data)
    data["verdict"] = verdict.to_dict()
    write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    for table in gate_tables(rows, verdict):
        render(table, say)


if __name__ == "__main__":
    main()
