"""A back end in a child process: what comes back, and that nothing survives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import isolated_functions
import pytest

from placer.core.errors import InfeasibleError, SolverError, UsageError
from solvers.exact import isolate
from solvers.exact.isolate import IsolationTimeoutError, run_isolated

REPOSITORY = Path(__file__).resolve().parents[2]


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds; a zombie that nobody has waited for counts as ended."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_the_result_comes_back_and_the_child_s_chatter_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_isolated(isolated_functions.add, (20, 22), time_limit_s=30) == 42
    assert capfd.readouterr() == ("", "")


def test_the_child_leads_a_session_of_its_own() -> None:
    pid, session = run_isolated(isolated_functions.process_facts, (), time_limit_s=30)
    assert pid == session
    assert pid != os.getpid()


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_isolated(isolated_functions.add, (1, 2), time_limit_s=30)
    with pytest.raises(SolverError):
        run_isolated(isolated_functions.crash, (), time_limit_s=30)
    assert not list(tmp_path.iterdir())


def test_a_crash_is_a_solver_error_that_names_the_signal() -> None:
    with pytest.raises(SolverError, match=r"^crash: .* signal SIGSEGV$"):
        run_isolated(isolated_functions.crash, (), time_limit_s=30)


def test_an_early_exit_is_a_solver_error() -> None:
    with pytest.raises(SolverError, match="exit status 3"):
        run_isolated(isolated_functions.vanish, (), time_limit_s=30)


def test_an_unexpected_error_is_a_solver_error_with_its_last_line() -> None:
    with pytest.raises(SolverError, match="ZeroDivisionError: the back end's own bug") as caught:
        run_isolated(isolated_functions.fail, (), time_limit_s=30)
    assert "\n" not in str(caught.value)


def test_a_placer_error_comes_back_as_it_was() -> None:
    with pytest.raises(InfeasibleError, match=r"^layer 3: no room$"):
        run_isolated(isolated_functions.refuse, (), time_limit_s=30)


def test_time_runs_out_and_the_whole_family_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "GRACE_S", 0.0)
    monkeypatch.setattr(isolate, "GRACE_FACTOR", 1.0)
    note = tmp_path / "pids"
    with pytest.raises(IsolationTimeoutError, match="with a time limit of 3 s; it was killed"):
        run_isolated(isolated_functions.start_grandchild_and_sleep, (str(note),), time_limit_s=3)
    assert all(gone(int(pid)) for pid in note.read_text().split())


def test_a_crash_takes_the_programs_it_started_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(SolverError, match="SIGSEGV"):
        run_isolated(isolated_functions.start_grandchild_and_crash, (str(note),), time_limit_s=30)
    assert gone(int(note.read_text()))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphan_survives_the_parent(ending: signal.Signals, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]; import isolated_functions; "
        "from solvers.exact.isolate import run_isolated; "
        "run_isolated(isolated_functions.start_grandchild_and_sleep, (sys.argv[1],), time_limit_s=300)"
    )
    paths = [str(Path(__file__).resolve().parent), str(REPOSITORY)]
    folder = tmp_path / "temporary"
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(note), *paths],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, TMPDIR=str(folder)),
    )
    try:
        for _ in range(6000):
            if note.is_file() or parent.poll() is not None:
                break
            time.sleep(0.01)
        pids = [int(pid) for pid in note.read_text().split()]
        parent.send_signal(ending)
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == -ending
    assert ("KeyboardInterrupt" in errors) == (ending == signal.SIGINT)
    assert all(gone(pid) for pid in pids)
    assert not list(folder.iterdir())


def test_what_cannot_run_elsewhere_is_refused() -> None:
    def local() -> None: ...

    for function in (local, lambda: None):
        with pytest.raises(UsageError, match="define it at the top of an importable module"):
            run_isolated(function, (), time_limit_s=1)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_time_is_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="give a positive number of seconds"):
        run_isolated(isolated_functions.add, (1, 2), time_limit_s=limit)


def test_a_script_without_a_main_guard_may_solve(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).resolve().parent)!r}, {str(REPOSITORY)!r}]\n"
        "from isolated_functions import add\nfrom solvers.exact.isolate import run_isolated\n"
        "print(run_isolated(add, (1, 2), time_limit_s=30))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize("order", ["pulp, ortools.sat.python.cp_model", "ortools.sat.python.cp_model, pulp"])
def test_both_back_ends_load_and_solve_in_one_process(order: str) -> None:
    script = (
        f"import {order}\n"
        "from ortools.sat.python import cp_model\n"
        "program = pulp.LpProblem('p', pulp.LpMinimize)\n"
        "x = program.add_variable('x', lowBound=3, cat=pulp.LpInteger)\n"
        "program += x\n"
        "program += x >= 4\n"
        "program.solve(pulp.HiGHS(msg=False))\n"
        "model = cp_model.CpModel()\n"
        "y = model.new_int_var(0, 9, 'y')\n"
        "model.add(y >= 5)\n"
        "model.minimize(y)\n"
        "solver = cp_model.CpSolver()\n"
        "solver.solve(model)\n"
        "assert (pulp.value(x), solver.value(y)) == (4, 5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_solvers_loads_no_back_end() -> None:
    script = (
        "import sys, solvers.exact.isolate, solvers.exact.cpsat, solvers.papers.moetuner\n"
        "sys.exit(bool({'ortools', 'pulp', 'highspy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
