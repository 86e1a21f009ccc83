"""Every solver of placer beside what others use, on the same problems: one process each, one core.

    python examples/bench/bench.py [--suite quick|full] [--data FOLDER] [--only NAME] [-o RESULT.json]

One row per case and method: objective, bound and gap on the planning half of the requests, ranks touched and balance on
the other half, wall and processor seconds of the solve alone, peak memory. Rows are written as they come; the same
command goes on where it was stopped, `--fresh` starts again. `full` takes about 25 minutes, `quick` about two.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from instances import DEEPSEEK, GPTOSS, SYNTHETIC, Case, cases_of
from methods import LEFT_OUT, methods_of, name_and_limit
from table import markdown

from placer.core.atomic import write_text_atomically

__all__ = ["WORKER", "jobs_of", "kept_rows", "run_bench", "run_worker"]

WORKER = Path(__file__).with_name("worker.py")
PACKAGES = ("numpy", "numba", "ortools", "highspy", "pymetis", "kahip", "mtkahypar")
HARD_FACTOR, HARD_S, PREPARE_S = 2.0, 180.0, 300.0
"""A solve is killed at HARD_FACTOR times its limit and HARD_S seconds more."""


def jobs_of(cases: list[Case], only: str = "", seed: int = 0) -> dict[str, dict[str, Any]]:
    """What is to be run, by the key of its row, "case | method"; all of it, or what has `only` in its key."""
    jobs = {}
    for case in cases:
        for method in methods_of(case):
            key = f"{case.name} | {method}"
            if only in key:
                jobs[key] = {"kind": "solve", "case": case.to_dict(), "method": method, "seed": seed}
    return jobs


def run_worker(job: dict[str, Any], hard_s: float, worker: Path = WORKER) -> dict[str, Any]:
    """The worker's answer; status "killed" past `hard_s` seconds, "crashed" where it ended without an answer."""
    search = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, str(worker), json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env=dict(os.environ, PYTHONPATH=search),
        )
        try:
            output, _ = process.communicate(timeout=hard_s)
        except subprocess.TimeoutExpired:
            return {"status": "killed", "message": f"still running after {hard_s:.0f} s", "seconds": hard_s}
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if process.returncode == 0:
            return dict(json.loads(output))
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    code = process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return {"status": "crashed", "message": f"{how}: {lines[-1][:200]}" if lines else how}


def kept_rows(path: Path, jobs: dict[str, dict[str, Any]], fresh: bool) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run: those of the very same jobs are not run again, unless a package was absent."""
    if not path.is_file():
        return {}
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    # a row whose job is not asked for now stays as it is
    stale = [
        key
        for key, row in rows.items()
        if key in jobs and (fresh or row["job"] != jobs[key] or row["status"] == "absent")
    ]
    return {key: row for key, row in rows.items() if key not in stale}


def run_bench(
    jobs: dict[str, dict[str, Any]],
    output: Path,
    about: dict[str, Any],
    *,
    data: Path | None = None,
    fresh: bool = False,
    worker: Path = WORKER,
) -> dict[str, Any]:
    """Runs the jobs that `output` does not have yet, in order, and writes it after each; returns what it holds."""
    rows = kept_rows(output, jobs, fresh)
    todo = [key for key in jobs if key not in rows]
    result: dict[str, Any] = {"about": about, "rows": rows}
    with tempfile.TemporaryDirectory(prefix="placer-bench-") as temporary:
        prepared: dict[str, tuple[Path, dict[str, Any]]] = {}
        for number, key in enumerate(todo, start=1):
            job = jobs[key]
            case = Case.from_dict(job["case"])
            if case.source.name not in prepared:
                folder = Path(temporary) / str(len(prepared))
                folder.mkdir()
                preparing = {**job, "kind": "prepare", "folder": str(folder), "data": str(data or "")}
                ready = run_worker(preparing, PREPARE_S, worker)
                prepared[case.source.name] = folder, ready
            folder, ready = prepared[case.source.name]
            _, limit_s = name_and_limit(job["method"], case)
            hard_s = HARD_FACTOR * limit_s + HARD_S
            row = ready
            if ready["status"] == "prepared":
                row = run_worker({**job, "folder": str(folder)}, hard_s, worker)
            rows[key] = {"case": case.name, "method": job["method"], **row, "job": job}
            order = [*(key for key in jobs if key in rows), *(key for key in rows if key not in jobs)]
            result["rows"] = {key: rows[key] for key in order}
            write_text_atomically(output, json.dumps(result, indent=1) + "\n")
            found = "" if row.get("objective") is None else f", objective {row['objective']:.4f}"
            print(
                f"[{number}/{len(todo)}] {key}: {row['status']}{found}, {row.get('seconds', 0):.1f} s", file=sys.stderr
            )
    return result


def about_run(suite: str) -> dict[str, Any]:
    """The machine, the packages and what the figures are made with."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "suite": suite,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one used",
        "python": platform.python_version(),
        "packages": versions,
        "synthetic": SYNTHETIC,
        "clock": "the solve alone, after a tiny problem that compiles the kernels; reading the profile is not timed",
        "split": "planned on half of the requests, judged on the other half",
    }


def main() -> None:
    """Parses the arguments, runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--data", type=Path, help="folder with gptoss20b/ and deepseekv3_load/ (not shipped)")
    parser.add_argument("--only", default="", metavar="NAME", help="rows with NAME in their case or method")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--fresh", action="store_true", help="run again what RESULT.json has; without --only, forget it"
    )
    given = parser.parse_args()
    output = given.output or Path(f"bench-{given.suite}.json")
    cases = cases_of(given.suite, given.data)
    jobs = jobs_of(cases, given.only)
    if not jobs:
        parser.error(f"--only {given.only!r}: no row of suite {given.suite} has that name")
    limited = sum(name_and_limit(job["method"], Case.from_dict(job["case"]))[1] for job in jobs.values())
    print(f"{len(jobs)} rows, at most {limited / 60:.0f} minutes of solving, starts not counted", file=sys.stderr)
    for file in (GPTOSS, DEEPSEEK):
        if given.suite == "full" and not any(case.source.file == file for case in cases):
            print(f"skipped: {file}; give --data FOLDER that has it", file=sys.stderr)
    print(*(f"left out: {line}" for line in LEFT_OUT), sep="\n", file=sys.stderr)
    if given.fresh and not given.only:
        output.unlink(missing_ok=True)
    started = time.perf_counter()
    try:
        result = run_bench(jobs, output, about_run(given.suite), data=given.data, fresh=given.fresh)
    except KeyboardInterrupt:
        print(f"\nstopped; {output} keeps the rows so far, the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(f"{output}, {(time.perf_counter() - started) / 60:.1f} minutes", file=sys.stderr)
    print(markdown(result))


if __name__ == "__main__":
    main()
