"""What only a real process shows: signals, hash seeds, closed pipes, the installed command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import placer

TRACE = "trace.safetensors"
COMMAND = [sys.executable, "-c", "from placer.cli import main; main()"]


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        restore_signals=True,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


INTERRUPTED_SOLVE = """
import os, signal, sys, threading
import solvers.registry as registry
{patch}

def interrupt():
    # once the solver is at work
    threading.Timer({delay}, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

real = {module}.{name}

def stand_in(*arguments, **options):
    interrupt()
    return real(*arguments, **options)

{module}.{name} = stand_in
sys.argv = ["placer", "solve", "big.safetensors", "--cluster", "node8", "-o", "new.json", "--solver", {solver!r},
            "--max-par", "1.5", "--time", "300s"]
from placer.cli import main
main()
"""

SEARCH = {"module": "coactivation", "name": "solve_coactivation", "delay": 0.7}
AGAIN = """
import placer.pipeline.planning as planning

def make_plan(*arguments):
    # the second Ctrl-C, while the incumbent becomes a plan
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not interrupted")

planning.make_plan = make_plan
"""


def interrupted(solver: str, patch: str = "", **stand_in: object) -> "subprocess.CompletedProcess[str]":
    """`placer solve` of a large trace with `solver`, sent SIGINT soon after the solver has begun."""
    from traces.store import save_trace
    from traces.synthetic import synthesize

    sizes = {"num_layers": 24, "num_experts": 64, "top_k": 8, "num_tokens": 6000, "num_requests": 50}
    save_trace(synthesize(**sizes, seed=0), Path("big.safetensors"))
    # a shell's background job ignores SIGINT, and its children with it
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED_SOLVE.format(solver=solver, patch=patch, **stand_in)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_with_nothing_to_keep(work: Path) -> None:
    """While a child process works (cpsat): 130, one line, no file, no child."""
    before = names(work)
    done = interrupted("cpsat", module="registry", name="run_solver", delay=0.7)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "placer: interrupted; nothing was left half-written"
    assert "Traceback" not in done.stderr
    assert names(work) - before == {"big.safetensors"}


@pytest.mark.parametrize("solver", ["auto", "coactivation"])
def test_ctrl_c_keeps_the_best_so_far(solver: str, work: Path) -> None:
    """In compiled code: the search's plan so far is written, with a warning; a legal plan that says why it stopped."""
    done = interrupted(solver, "import solvers.touch.coactivation as coactivation", **SEARCH)
    assert done.returncode == 0, done.stderr
    assert "warning: interrupted: this is the best plan found so far" in done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped_by" in done.stdout
    assert '"stopped_by": "interrupt"' in Path("new.json").read_text()
    assert placer("check", "new.json", "--trace", "big.safetensors", "--cluster", "node8", "--max-par", "1.5").code == 0


def test_a_second_ctrl_c_ends_it(work: Path) -> None:
    before = names(work)
    done = interrupted("auto", "import solvers.touch.coactivation as coactivation" + AGAIN, **SEARCH)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "placer: interrupted; nothing was left half-written"
    assert names(work) - before == {"big.safetensors"}


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[..., None]:
    def stand_in(*arguments: object, **options: object) -> None:
        raise error from cause

    return stand_in


def test_ctrl_c_comes_out_of_compiled_code_as_a_system_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = raising(SystemError("returned a result with an exception set"), KeyboardInterrupt())
    for stand_in in (interrupted, raising(KeyboardInterrupt())):
        monkeypatch.setattr("placer.pipeline.solve", stand_in)
        outcome = placer("solve", TRACE, "--cluster", "node4")
        assert (outcome.code, outcome.out) == (130, "")
        assert outcome.err == "placer: interrupted; nothing was left half-written\n"
    monkeypatch.setattr("placer.pipeline.solve", raising(SystemError("a bug")))
    with pytest.raises(SystemError, match="a bug"):
        placer("solve", TRACE, "--cluster", "node4")


def test_memory_that_runs_out_is_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placer.pipeline.solve", raising(MemoryError()))
    outcome = placer("solve", TRACE, "--cluster", "node4")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("placer: out of memory; use a smaller trace")


def test_same_seed_same_bytes_in_another_process(work: Path) -> None:
    """Plans of a search and of a balancer, and a simulated Timeline, with another hash seed."""
    solve = ("solve", TRACE, "--cluster", "node4", "--seed", "7")
    calls = [
        (*solve, "-o", "{}.search.json"),
        (*solve, "--solver", "lpt", "--redundant", "4", "--max-par", "inf", "-o", "{}.lpt.json"),
        ("simulate", "{}.search.json", "--trace", TRACE, "--cluster", "node4", "-o", "{}.time.json"),
    ]
    script = [[part.format("other") for part in call] for call in calls]
    program = f"import sys\nfrom placer.cli import main\nfor call in {script!r}:\n"
    program += (
        "    sys.argv = ['placer', *call]\n    try: main()\n    except SystemExit as stop: assert not stop.code\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, timeout=120)
    for call in calls:
        assert placer(*(part.format("this") for part in call)).code == 0
    for suffix in ("search.json", "lpt.json", "time.json"):
        assert Path(f"this.{suffix}").read_bytes() == Path(f"other.{suffix}").read_bytes(), suffix


def test_written_twice_is_the_same_file(work: Path) -> None:
    for name in ("a", "b"):
        assert placer("solve", TRACE, "--cluster", "2x2", "--mode", "per_node", "-o", f"{name}.json").code == 0
        calls = ("simulate", "a.json", "--trace", TRACE, "--cluster", "2x2")
        assert placer(*calls, "-o", f"{name}.time.json", "--chrome", f"{name}.chrome.json").code == 0
        assert placer("profile", TRACE, "-o", f"{name}.profile").code == 0
        assert placer("trace", "import", TRACE, "-o", f"{name}.trace").code == 0
    for suffix in ("json", "time.json", "chrome.json", "profile", "trace"):
        assert Path(f"a.{suffix}").read_bytes() == Path(f"b.{suffix}").read_bytes(), suffix


def test_another_seed_is_another_plan(work: Path) -> None:
    for seed in ("1", "2"):
        assert placer("solve", TRACE, "--cluster", "node4", "--seed", seed, "-o", f"{seed}.json").code == 0
    assert Path("1.json").read_bytes() != Path("2.json").read_bytes()


def test_a_reader_that_closes_the_pipe_is_no_traceback(work: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen([*COMMAND, "trace", "info", TRACE, "--json"], stdout=writing, stderr=subprocess.PIPE)
    os.close(reading)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line(work: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "trace", "info", TRACE], stdout=full, stderr=subprocess.PIPE, text=True,
                              timeout=60, check=False)  # fmt: skip
    assert done.returncode == 3
    assert done.stderr == "placer: standard output: No space left on device\n"


def test_the_installed_command_is_this_one(work: Path) -> None:
    script = Path(sys.executable).with_name("placer")
    if not script.exists():
        pytest.skip("placer is not installed beside this Python")
    done = subprocess.run([str(script), "check", "plan.json", "--trace", "nowhere", "--cluster", "node4"],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("placer: nowhere: does not exist")
    assert done.stderr.count("\n") == 1


def test_progress_goes_to_standard_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven seconds pass between any two looks at the clock."""
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    outcome = placer("solve", TRACE, "--cluster", "node4", "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    lines = outcome.err.splitlines()
    assert lines
    assert all(line.startswith(("reading: ", "solving: ", "counting: ")) and " % after " in line for line in lines)
