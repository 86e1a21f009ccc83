"""The bench's runner: a row for every end a worker can come to, resumable, and its table."""

import json
import sys
from pathlib import Path
from typing import Any

import bench
import pytest
from bench import jobs_of, run_bench, run_worker
from instances import EXAMPLES, SMALL_TRACE, Case, Source, cases_of
from methods import ILPS, methods_of, name_and_limit
from table import markdown

from solvers.registry import SOLVERS

FAKE = """
import json, sys, time
from pathlib import Path
job = json.loads(sys.argv[1])
with Path(__file__).with_suffix(".log").open("a") as log:
    print(job["kind"], job.get("method"), file=log)
if job["kind"] == "solve" and job["method"] == "eplb":
    raise RuntimeError("boom of a back end")
print(json.dumps({"status": "prepared" if job["kind"] == "prepare" else "solved", "objective": 1.5, "seconds": 0.1}))
"""
ABOUT = {"machine": "test", "clock": "none"}
TINY = Source(
    name="2x8 top-2",
    synthetic={"num_layers": 2, "num_experts": 8, "top_k": 2, "num_tokens": 600, "num_requests": 12, "seed": 3},
)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "fake_worker.py"
    path.write_text(FAKE)
    return path


def jobs(*methods: str, limit_s: float = 1.0) -> dict[str, dict[str, Any]]:
    case = Case(source=TINY, cluster="node4", objective="touched", limit_s=limit_s)
    found = jobs_of([case])
    return {key: job for key, job in found.items() if job["method"] in methods}


def log(fake: Path) -> list[str]:
    return fake.with_suffix(".log").read_text().splitlines()


def test_a_crash_becomes_a_row_and_the_rest_goes_on(fake: Path, tmp_path: Path) -> None:
    result = run_bench(jobs("linear", "eplb", "lpt"), tmp_path / "r.json", ABOUT, worker=fake)
    rows = {row["method"]: row for row in result["rows"].values()}
    assert [row["status"] for row in rows.values()] == ["solved", "crashed", "solved"]
    assert rows["eplb"]["message"] == "exit status 1: RuntimeError: boom of a back end"
    assert json.loads((tmp_path / "r.json").read_text()) == result


def test_a_row_that_is_there_is_not_run_again(fake: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    run_bench(jobs("linear"), output, ABOUT, worker=fake)
    run_bench(jobs("linear", "lpt"), output, ABOUT, worker=fake)
    assert log(fake) == ["prepare linear", "solve linear", "prepare lpt", "solve lpt"]
    run_bench(jobs("linear", "lpt"), output, ABOUT, worker=fake)
    assert len(log(fake)) == 4
    # another time limit is another job; rows not asked for stay
    result = run_bench(jobs("lpt", limit_s=2.0), output, ABOUT, worker=fake)
    assert len(log(fake)) == 6
    assert [row["method"] for row in result["rows"].values()] == ["lpt", "linear"]
    run_bench(jobs("linear", "lpt", limit_s=2.0), output, ABOUT, fresh=True, worker=fake)
    assert len(log(fake)) == 9


def test_ctrl_c_keeps_what_is_there(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def until_lpt(job: dict[str, Any], hard_s: float, worker: Path) -> dict[str, Any]:
        if job["method"] == "lpt" and job["kind"] == "solve":
            raise KeyboardInterrupt
        return run_worker(job, hard_s, worker)

    monkeypatch.setattr(bench, "run_worker", until_lpt)
    output = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run_bench(jobs("linear", "lpt"), output, ABOUT, worker=fake)
    assert [row["method"] for row in json.loads(output.read_text())["rows"].values()] == ["linear"]


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "signal SIGSEGV"),
        ("import time; time.sleep(60)", "killed", "still running after 1 s"),
        ("raise SystemExit(3)", "crashed", "exit status 3"),
    ],
)
def test_every_bad_end_has_a_name(program: str, status: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad_worker.py"
    path.write_text(program)
    answer = run_worker({}, 1.0, path)
    assert (answer["status"], answer["message"]) == (status, message)


def test_a_source_that_cannot_be_prepared_is_a_row(tmp_path: Path) -> None:
    missing = Case(source=Source(name="gone", file="gone.npz", shipped=False), cluster="node4", objective="par")
    only = {key: job for key, job in jobs_of([missing]).items() if job["method"] == "lpt"}
    result = run_bench(only, tmp_path / "r.json", ABOUT, data=tmp_path)
    (row,) = result["rows"].values()
    assert row["status"] == "crashed"
    assert "gone.npz" in row["message"]


def test_a_real_row_has_every_field(tmp_path: Path) -> None:
    result = run_bench(jobs("lpt", "coactivation", limit_s=5.0), tmp_path / "r.json", ABOUT)
    assert [row["method"] for row in result["rows"].values()] == ["lpt", "coactivation"]
    for row in result["rows"].values():
        assert row["status"] == "solved", row["message"]
        assert row["stopped_by"] in ("effort", "optimal", "gap")
        assert 1.0 == row["bound"] <= row["objective"] <= 2.0
        assert row["bound_by"].startswith("capacity")
        assert row["broken"] == []
        assert row["cap_met"] is (row["par"] <= row["max_par"] + 1e-9)
        assert row["gap"] == pytest.approx(1 - row["bound"] / row["objective"]) or not row["cap_met"]
        assert row["peak_mib"] >= row["start_mib"] > 10
        assert row["seconds"] >= 0
        assert row["cpu_seconds"] >= 0
        assert set(row["judged"]) == {"ranks_touched", "par", "par_window_mean", "par_window_p99", "kept"}
    shown = markdown(result)
    assert shown.count("| coactivation |") == 1
    assert json.loads(json.dumps(result)) == result


def test_gap_is_to_the_best_bound_of_the_case() -> None:
    job = {"case": {"objective": "cut"}}
    common = {"case": "a", "status": "solved", "stopped_by": "effort", "message": "", "judged": None, "job": job}
    rows = {
        "1": {**common, "method": "x", "objective": 0.5, "bound": None, "cap_met": True, "broken": []},
        "2": {**common, "method": "y", "objective": 0.6, "bound": 0.4, "cap_met": True, "broken": []},
        "3": {**common, "method": "z", "objective": 0.3, "bound": None, "cap_met": False, "broken": []},
        "4": {**common, "method": "w", "status": "killed", "message": "still running after 1 s"},
    }
    lines = markdown({"about": ABOUT, "rows": rows}).splitlines()[2:6]
    assert [line.split("|")[5].strip() for line in lines] == ["20.0 %", "33.3 %", "-", "-"]
    assert "above the load cap" in lines[2]
    assert "killed, still running after 1 s" in lines[3]


def test_no_solver_is_forgotten_and_integer_programs_have_their_limits() -> None:
    shown = set()
    for case in cases_of("full", None):
        methods = methods_of(case)
        assert len(set(methods)) == len(methods)
        for method in methods:
            name, limit_s = name_and_limit(method, case)
            shown.add(name)
            assert limit_s in (*case.ilp_s, case.limit_s)
            assert ("@" in method) is (name in ILPS)
    assert {*SOLVERS, "auto", "metis", "kahip", "mtkahypar"} <= shown


def test_the_shipped_trace_is_in_both_suites_and_a_case_survives_json() -> None:
    for suite in ("quick", "full"):
        cases = cases_of(suite, None)
        assert any(case.source.file == SMALL_TRACE for case in cases)
        assert [Case.from_dict(json.loads(json.dumps(case.to_dict()))) for case in cases] == cases
    assert (EXAMPLES / SMALL_TRACE).is_file()


def test_the_table_script_needs_the_standard_library_only() -> None:
    text = Path(markdown.__code__.co_filename).read_text()
    imported = [line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert set(imported) <= sys.stdlib_module_names
