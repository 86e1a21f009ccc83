"""Fills the README's generated blocks, so that they cannot go stale: file tree, demo output, table of the real trace.

python scripts/readme.py            rewrites README.md; a test fails when it would change anything
"""

import ast
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("placer", "sim", "solvers", "traces", "examples")
GATES = ROOT / "examples" / "validation" / "2-core-x86_64" / "gates.json"
REPLICAS = ROOT / "examples" / "validation" / "2-core-x86_64" / "gptoss20b_node8_redundant8.json"
DEVICE = ROOT / "examples" / "validation" / "2-core-x86_64" / "device"
VALIDATION = ROOT / "examples" / "validation" / "2-core-x86_64" / "gptoss20b_node8.json"


def about(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip().rstrip(".")


def tree() -> str:
    """A line per file, folders before their files; tests are one line per folder."""
    lines = ["```"]
    for package in PACKAGES:
        modules = (ROOT / package).rglob("*.py")
        for path in sorted(modules, key=lambda p: (p.parent.parts, p.name != "__init__.py", p.name)):
            name = path.relative_to(ROOT).as_posix().replace("/__init__.py", "/")
            lines.append(f"{name:32} {about(path)}")
    folders = sorted({path.parent for path in (ROOT / "tests").rglob("test_*.py")})
    lines += [f"{f'tests/{folder.name}/':32} {len(list(folder.glob('test_*.py')))} test files" for folder in folders]
    return "\n".join([*lines, "```"])


def demo() -> str:
    """What `make demo` printed."""
    return "```\n" + (ROOT / "examples" / "01_demo.out").read_text(encoding="utf-8").rstrip() + "\n```"


def real_trace() -> str:
    """The committed run of examples/02_real_trace.py as a table."""
    rows = json.loads(VALIDATION.read_text(encoding="utf-8"))["rows"]
    columns = ("ranks touched", "PAR", "PAR window mean", "PAR window p99", "iteration us", "cpu s")
    lines = [
        "| plan | " + " | ".join(columns) + " | ranks, split 0 | PAR, split 0 |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{np.mean(row[column]):.3f}" for column in columns[:-2]]
        cells += [f"{np.mean(row['iteration us']):,.0f}", f"{np.mean(row['cpu s']):.1f}"]
        cells += [f"{row['ranks touched'][0]:.3f}", f"{row['PAR'][0]:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bounds() -> str:
    """What the run proved about the planning half of the first split."""
    rows = json.loads(VALIDATION.read_text(encoding="utf-8"))["bounds"]
    lines = ["| max-par on the requests planned on | ranks touched, found | proven least | gap |", "|---|---|---|---|"]
    for cap, row in rows.items():
        name = "none" if cap == "inf" else cap
        lines.append(f"| {name} | {row['found']:.3f} | {row['proven']:.3f} | {100 * row['gap']:.2f} % |")
    return "\n".join(lines)


def replicas() -> str:
    """The committed run with redundant slots."""
    rows = json.loads(REPLICAS.read_text(encoding="utf-8"))["rows"]
    columns = ("ranks touched", "PAR", "PAR window mean", "PAR window p99", "iteration us")
    lines = ["| plan | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{np.mean(row[column]):.3f}" for column in columns[:-1]] + [f"{np.mean(row['iteration us']):,.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gates() -> str:
    """The committed run of examples/gates/gates.py: the gates, then a line for every group."""
    data = json.loads(GATES.read_text(encoding="utf-8"))
    verdict = data["verdict"]
    word = {name: "pass" if good else "**fail**" for name, good in verdict["passed"].items()}
    wrong = "; ".join(verdict["wrong_signs"]) or "none"
    lines = [
        f"| gate over {verdict['rows']} combinations, fidelity `{data['fidelity']}` | seen | limit | verdict |",
        "|---|---|---|---|",
        f"| median error of iteration time | {100 * verdict['median_error']:.1f} % | 10 % | {word['median error']} |",
        f"| 90th percentile of the error | {100 * verdict['p90_error']:.1f} % | 25 % | {word['p90 error']} |",
        f"| Kendall tau, pairs apart by more than the noise floor ({100 * verdict['noise']:.1f} %) "
        f"| {verdict['tau']:.2f} | 0.9 | {word['Kendall tau']} |",
        f"| Kendall tau, all pairs | {verdict['tau_all']:.2f} | | |",
        f"| wrong signs of {verdict['resolved']} gains and losses above the noise floor "
        f"| {len(verdict['wrong_signs'])} ({wrong}) | 0 | {word['sign of every resolved gain']} |",
        "",
        "| cluster, routing | combinations | median error | largest | tau, apart | A/A, launches | gains measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in data["groups"].items():
        rows = group["rows"]
        error = [abs(row["predicted_us"] / row["measured_us"] - 1) for row in rows]
        ratio = [row["ratio"] for row in rows]
        again = group["again"]
        lines.append(
            f"| {name} | {len(rows)} | {100 * np.median(error):.1f} % | {100 * max(error):.1f} % "
            f"| {verdict['tau_by_group'][name]:.2f} | {again['low']:.3f} to {again['high']:.3f} "
            f"| {min(ratio):.2f}x to {max(ratio):.2f}x |"
        )
    return "\n".join(lines)


def device_gates() -> str:
    """The committed run of examples/device/gates.py: the gates, then a line for every group."""
    data = json.loads((DEVICE / "gates.json").read_text(encoding="utf-8"))
    verdict = data["verdict"]
    word = {name: "pass" if good else "**fail**" for name, good in verdict["passed"].items()}
    lines = [
        f"| gate over {verdict['rows']} combinations of budget, policy, batch and disk | seen | limit | verdict |",
        "|---|---|---|---|",
        f"| median error of iteration time | {100 * verdict['median_error']:.1f} % | 10 % | {word['median error']} |",
        f"| 90th percentile of the error | {100 * verdict['p90_error']:.1f} % | 25 % | {word['p90 error']} |",
        f"| Kendall tau, pairs apart by more than the noise floor ({100 * verdict['noise']:.1f} %) "
        f"| {verdict['tau']:.2f} | 0.9 | {word['Kendall tau']} |",
        f"| Kendall tau, all pairs | {verdict['tau_all']:.2f} | | |",
        f"| wrong signs of {verdict['resolved']} gains and losses above the noise floor "
        f"| {len(verdict['wrong_signs'])} | 0 | {word['sign of every resolved gain']} |",
        "",
        "| experts, disk, requests at a time | combinations | median error | largest | tau, apart | A/A, rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in data["groups"].items():
        error = [abs(row["predicted_us"] / row["measured_us"] - 1) for row in group["rows"]]
        again = group["again"]
        lines.append(
            f"| {name} | {len(error)} | {100 * np.median(error):.1f} % | {100 * max(error):.1f} % "
            f"| {verdict['tau_by_group'][name]:.2f} | {again['low']:.3f} to {again['high']:.3f} |"
        )
    return "\n".join(lines)


STEPS = ("on demand", "+MWQ", "+HEBF", "johnson", "budget 25%", "budget 50%", "budget 75%", "hold")


def device_steps() -> str:
    """Throughput of D2MoE's steps and of budgets in the same run, and what memory held."""
    data = json.loads((DEVICE / "gates.json").read_text(encoding="utf-8"))
    lines = ["| experts, disk, requests | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, group in data["groups"].items():
        rows = {row["name"]: row for row in group["rows"]}
        cells = [f"{rows[step]['tokens_per_s']:,.0f} ({rows[step]['ratio']:.2f}x)" for step in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    largest = next(iter(data["groups"].values()))["rows"]
    held = {row["name"]: row for row in largest}
    lines += ["", "| memory of the first line, MiB | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for what, value in (
        ("planes held at most", lambda row: row["about"]["peak_plane_bytes"]),
        (
            "rise of the process's peak, says the kernel",
            lambda row: row["about"]["peak_rss_bytes"] - row["about"]["rss_before_bytes"],
        ),
    ):
        lines.append(f"| {what} | " + " | ".join(f"{value(held[step]) / 2**20:.1f}" for step in STEPS) + " |")
    return "\n".join(lines)


def device_quality() -> str:
    """The committed run of examples/device/quality.py."""
    data = json.loads((DEVICE / "quality.json").read_text(encoding="utf-8"))
    lines = ["| bits | bytes an expert | " + " | ".join(f"{name}" for name in QUALITY.values()) + " |"]
    lines.append("|---" * (len(QUALITY) + 2) + "|")
    rows: dict[int, dict[str, dict]] = {}
    for row in data["rows"]:
        rows.setdefault(row["bits"], {})[row["store"]] = row
    for bits, by_store in sorted(rows.items()):
        cells = []
        for store in QUALITY:
            row = by_store.get(store)
            cells.append("" if row is None else f"{row['error']:.2g} / {row['perplexity']:.2f}")
        size = next((by_store[name]["expert_bytes"] for name in ("mwq-v1", "mwq-v2") if name in by_store), None)
        lines.append(f"| {bits} | {'' if size is None else f'{size:,}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


QUALITY = {"rtn": "RTN, error / perplexity", "gptq": "GPTQ copies", "mwq-v1": "nested planes, v1"}


def headline() -> str:
    """The committed runs of examples/gates/headline.py, a row each."""
    lines = [
        "| run | chosen on the planning half | measured, median launch | launches | rounds won | predicted before |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("headline", "headline-earlier"):
        data = json.loads((GATES.parent / f"{name}.json").read_text(encoding="utf-8"))
        seen = data["measured"]
        lines.append(
            f"| [{name}](examples/validation/2-core-x86_64/{name}.json) | plan {data['chosen']} "
            f"| **{seen['median']:.2f}x** | {seen['low']:.2f}x to {seen['high']:.2f}x ({seen['launches']}) "
            f"| {seen['wins']} of {seen['rounds']} | {data['predicted_ratio']['flow']:.2f}x |"
        )
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with its blocks filled."""
    blocks = {"demo": demo(), "gptoss": real_trace(), "bounds": bounds(), "replicas": replicas(), "tree": tree()}
    blocks |= {"gates": gates(), "headline": headline()}
    blocks |= {"device-gates": device_gates(), "device-steps": device_steps(), "device-quality": device_quality()}
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = readme.split(start)
        readme = f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
