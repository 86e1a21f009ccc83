"""The headline: experts by index with standard dispatch against placer's plan in the mode it chose, predicted first.

    sudo python examples/gates/headline.py TRACE OUT.json [--model gpt-oss-20b] [--lab 2x2@200mbit] [--launches 5]

Everything is chosen on one half of the requests: placements for every mode, request homes aligned with them, then the
(plan, mode) that fidelity `flow` predicts to be fastest there. The other half runs, its requests at home by their own
routing or dealt in turn (`--homes`), outputs compared with a single-process reference. OUT has the prediction, written
before the measurement begins.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from combinations import MAX_PAR, Combination, Halves, at_home, mixed, resized
from gates import CALIBRATE, HIDDEN, INNER, launch_medians_us, predicted_us
from rich.console import Console

from placer.config.settings import RunSettings
from placer.core.atomic import write_text_atomically
from placer.core.cluster import ClusterSpec
from placer.execute.lab import Lab, LabSpec
from placer.execute.measure import replay_plans
from placer.pipeline import open_trace, solve
from placer.pipeline.calibrating import calibrate_cluster
from placer.report.paired import paired_ratio
from traces.hf_config import MODELS

TOKENS, ROUNDS = 512, 8
MODES = ("per_rank", "per_node", "coherent")


def candidates(halves: Halves, cluster: ClusterSpec, homes: str, seconds: float) -> list[Combination]:
    """placer's plan for each mode, run in every mode, on the half that `halves.test` holds."""
    found = []
    dealt_T = np.arange(halves.test.num_tokens) % cluster.num_ranks
    for planned in MODES:
        plan = solve(halves.train, cluster, mode=planned, max_par=MAX_PAR, time_limit_s=seconds).plan
        plan, home_T = at_home(plan, halves.train, halves.test) if homes == "local" else (plan, dealt_T)
        found += [Combination.of(plan, f"for {planned}", mode, homes, home_T) for mode in MODES]
    return found


def main() -> None:
    """Parses the arguments, chooses, predicts, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--lab", default="2x2@200mbit")
    parser.add_argument("--homes", choices=("dealt", "local"), default="local")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of each solve")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    say = Console(width=150)
    run = RunSettings(hidden_size=HIDDEN, moe_intermediate_size=INNER, tokens_per_iteration=TOKENS)
    trace = open_trace(given.trace, MODELS.get(given.model))
    train, test = trace.split_by_request(0.5, given.seed)
    say.print(f"{given.lab}: calibrating")
    shape = LabSpec.parse(given.lab)
    per_rank = -(-trace.model.num_experts // shape.num_ranks)
    settings = replace(CALIBRATE, top_k=trace.model.top_k, experts_per_rank=per_rank)
    calibration = calibrate_cluster(lab=given.lab, settings=settings, run=run)
    cluster = calibration.cluster
    used = TOKENS * ROUNDS
    # chosen on tokens of the planning half, mixed as the others will be
    trial = Halves(
        name="choosing", train=resized(train, HIDDEN, INNER), test=resized(mixed(train, used, 1), HIDDEN, INNER)
    )
    halves = Halves(name="judged", train=trial.train, test=resized(mixed(test, used, 0), HIDDEN, INNER))
    tried = candidates(trial, cluster, given.homes, given.seconds)
    times = [predicted_us(one, trial, cluster, TOKENS)["flow"] for one in tried]
    at = int(np.argmin(times))
    say.print(f"chosen on the planning half: plan {tried[at].name}")
    chosen = candidates(halves, cluster, given.homes, given.seconds)[at]
    linear = solve(train, cluster, solver="linear").plan
    arms = [
        Combination.of(linear, "linear", "per_expert", "dealt", np.arange(used) % cluster.num_ranks),
        chosen,
    ]
    predicted = [predicted_us(one, halves, cluster, TOKENS) for one in arms]
    ratio = {fidelity: predicted[0][fidelity] / predicted[1][fidelity] for fidelity in predicted[0]}
    data = {
        "trace": given.trace.name,
        "lab": given.lab,
        "tokens_per_iteration": TOKENS,
        "rounds": ROUNDS,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "seed": given.seed,
        "chosen": chosen.name,
        "tried_us": {one.name: time for one, time in zip(tried, times, strict=True)},
        "predicted_us": {one.name: times for one, times in zip(arms, predicted, strict=True)},
        "predicted_ratio": ratio,
        "calibration": {"cluster": cluster.to_dict(), "about": calibration.about},
    }
    write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    say.print(f"predicted: {ratio['flow']:.3f}x as fast; now measured, {given.launches} launches")
    with Lab.open(shape) as opened:
        measured = replay_plans(
            [one.plan for one in arms],
            halves.test.expert_LTK,
            halves.test.weight_LTK,
            model=halves.test.model,
            sources=[one.source_T for one in arms],
            modes=[one.mode for one in arms],
            tokens_per_iteration=TOKENS,
            iterations=ROUNDS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            launches=given.launches,
            realtime=True,
            hosts=opened.hosts,
            timeout_s=900,
            progress=lambda line: say.print(f"  {line}"),
        )
    data |= {
        "measured_launch_medians_us": {
            one.name: launch_medians_us(timeline) for one, timeline in zip(arms, measured, strict=True)
        },
        "measured": asdict(paired_ratio(measured[0], measured[1])),
        "bit_identical": [timeline.about["bit_identical"] for timeline in measured],
        "max_rel_error": [timeline.about["max_rel_error"] for timeline in measured],
    }
    write_text_atomically(given.out, json.dumps(data, indent=1) + "\n")
    say.print(f"measured: {paired_ratio(measured[0], measured[1])}; predicted {ratio['flow']:.3f}x")


if __name__ == "__main__":
    main()
