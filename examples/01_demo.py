"""Plans a recorded routing trace on half of its requests and judges the plan on the other half.

    python examples/01_demo.py [FOLDER]        writes plan, timelines, Chrome trace and SGLang file into FOLDER (demo/)

The routing is the shipped trace of a small MoE that was trained on a CPU (examples/small_moe). Its experts are tiny, so
times are priced as if they had the size of gpt-oss-20b's; the routing itself is untouched.
"""

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from placer.config import load_cluster
from placer.core.modes import DISPATCH_MODES
from placer.export import export_plan
from placer.pipeline import judge, predict, solve
from placer.report.chrome import write_chrome_trace
from placer.report.gain import gain
from placer.report.summary import plan_table
from placer.report.tables import render
from traces.hf_config import MODELS
from traces.store import load_trace

HERE = Path(__file__).resolve().parent
SOLVERS = {"linear": "linear", "eplb": "eplb", "placer": "auto"}


def main(folder: Path) -> None:
    """The whole arrow: trace -> split -> plans -> judgement -> timelines -> export."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = load_trace(HERE / "small_moe" / "trace.safetensors")
    size = MODELS["gpt-oss-20b"]
    model = replace(
        trace.model,
        hidden_size=size.hidden_size,
        moe_intermediate_size=size.moe_intermediate_size,
        weight_bytes=size.weight_bytes,
        attention_params=size.attention_params,
    )
    train, test = replace(trace, model=model).split_by_request(0.5, seed=0)
    cluster = load_cluster("2x4")

    plans = {name: solve(train, cluster, solver=solver, mode="per_rank") for name, solver in SOLVERS.items()}
    judged = {name: judge(solved.plan, test, cluster, modes=DISPATCH_MODES) for name, solved in plans.items()}
    console = Console(width=110, highlight=False)
    render(plan_table(judged), console)
    for mode in DISPATCH_MODES:
        print(gain(judged["placer"], judged["linear"], mode))

    best = plans["placer"]
    print(f"placer on the planning half: {best.result.message}")
    found, bound = best.result.objective, best.result.bound
    assert found is not None
    assert bound is not None
    left, cap = 100 * (1 - bound / found), best.problem.max_par
    print(f"it touches {found:.3f} ranks a token there; no placement with PAR <= {cap:g} touches fewer than")
    print(f"{bound:.3f} ({best.result.bound_by}): at most {left:.1f} % are left to gain")
    best.plan.save(folder / "plan.json")
    timelines = []
    for name, solved in plans.items():
        timeline, _ = predict(solved.plan, test, cluster, iterations=8)
        timeline.save(folder / f"timeline-{name}.json")
        timelines.append(timeline)
    write_chrome_trace(folder / "chrome-trace.json", timelines, list(plans))
    flags = export_plan(best.plan, model, "sglang", folder / "sglang.json")
    for name in ("plan.json", "chrome-trace.json", "sglang.json"):
        print(f"wrote {folder.name}/{name}")
    print("SGLang loads it with:", flags.replace(str(folder / "sglang.json"), f"{folder.name}/sglang.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo"))
