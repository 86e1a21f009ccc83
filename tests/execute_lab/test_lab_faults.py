"""However a lab ends, its namespaces and its processes are gone; nobody else's are touched."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from placer.core.errors import ExecutionError
from placer.execute.lab import Lab, LabSpec, clean_leftovers, run_command
from placer.execute.lab.owner import Claim

pytestmark = pytest.mark.dist
SPEC = LabSpec(nodes=2, ranks_per_node=2, mbit=200)
START_S, END_S = 60.0, 20.0


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from placer.cli import main; main()", "lab", *arguments]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(cli(*arguments), capture_output=True, text=True, timeout=START_S, check=False)


@contextlib.contextmanager
def sleeping_lab(mark: str):
    """A `placer lab` whose four ranks sleep, the first of them with a child that took a session of its own."""
    script = f"echo up {mark}; [ $RANK != 0 ] || setsid sleep 600.{mark} & exec sleep 600.{mark}"
    process = subprocess.Popen(cli("2x2@200mbit", "--", "sh", "-c", script), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert sorted(lines) == [f"[{rank}] up {mark}\n" for rank in range(4)]
        yield process
    finally:
        process.kill()
        process.communicate()
        clean_leftovers()


def sleepers(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if line.startswith("sleep ") and mark in line:
                found.append(line)
    return found


def wait_until(condition) -> bool:
    deadline = time.monotonic() + END_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_every_rank_runs_with_torchruns_variables_in_its_nodes_namespace(nothing_left):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    values = " ".join(f"${name}" for name in names)
    script = f"echo {values} $(ip -4 -br addr show eth0); [ $MASTER_PORT -gt 1023 ]"
    done = run_cli("2x2@200mbit", "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    found = sorted(" ".join(line.split()) for line in done.stdout.splitlines())
    for rank, line in enumerate(found):
        where = rf"eth0@\S+ UP 10\.77\.0\.{rank // 2 + 1}/24"
        assert re.fullmatch(rf"\[{rank}\] {rank} 4 {rank % 2} 2 10\.77\.0\.1 eth0 {where}", line), found
    assert len(found) == 4


def test_the_first_failure_ends_all_and_gives_the_exit_code(nothing_left):
    started = time.monotonic()
    done = run_cli("2x1", "--", "sh", "-c", "echo up; echo no >&2; [ $RANK = 1 ] && exit 7; exec sleep 300")
    assert done.returncode == 7
    assert "[1] no\n" in done.stderr
    assert time.monotonic() - started < 100, "it did not wait for the other rank"


def test_a_signal_is_told_as_shells_do(nothing_left):
    assert run_cli("1x2", "--", "sh", "-c", "[ $RANK = 0 ] && kill -9 $$; exec sleep 300").returncode == 128 + 9


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_command_line_leaves_nothing(number, code, nothing_left):
    mark = f"1{os.getpid()}{int(number)}"
    with sleeping_lab(mark) as process:
        assert len(sleepers(mark)) == 5 or wait_until(lambda: len(sleepers(mark)) == 5)
        process.send_signal(number)
        assert process.wait(END_S) == code
        assert sleepers(mark) == []


def test_what_a_killed_owner_left_goes_with_the_next_start(nothing_left):
    mark = f"2{os.getpid()}"
    with sleeping_lab(mark) as process, Lab.open(SPEC) as alive:
        kept = set(alive.namespaces)
        left = present() - kept
        process.kill()
        process.wait()
        assert len(left) == 3
        assert left <= present(), "nobody has cleaned yet"
        # the ranks end with their parent; the child that left them does not
        assert wait_until(lambda: len(sleepers(mark)) == 1)
        done = run_cli("1x1", "--", "true")
        assert (done.returncode, done.stdout) == (0, "")
        assert present() & left == set()
        assert sleepers(mark) == []
        assert kept <= present(), "a lab whose owner lives is left alone"


def test_clean_says_what_it_removed(nothing_left):
    mark = f"3{os.getpid()}"
    with sleeping_lab(mark) as process:
        process.kill()
        process.wait()
        done = run_cli("--clean")
    assert done.returncode == 0
    assert len(re.findall(r"^removed namespace placer-[0-9a-f]{8}-[012]$", done.stderr, re.MULTILINE)) == 3
    assert run_cli("--clean").stderr == ""


def test_a_foreign_namespace_is_untouched(nothing_left):
    name = "placer-not-ours-0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with Lab.open(SPEC):
            clean_leftovers()
        assert name in present()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_record_that_names_others_namespaces_removes_none_of_them(nothing_left):
    name = "placer-not-ours-1"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        claim = Claim()
        claim.path.write_text(f'{{"namespaces": ["{name}"]}}')
        claim._file.close()
        assert clean_leftovers() == []
        assert name in present()
        assert not claim.path.exists()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_an_exception_and_a_network_that_cannot_be_made_leave_nothing(nothing_left, monkeypatch):
    with contextlib.suppress(ZeroDivisionError), Lab.open(SPEC) as lab:
        assert set(lab.namespaces) <= present()
        raise ZeroDivisionError
    assert set(lab.namespaces) & present() == set()
    monkeypatch.setattr("placer.execute.lab.network.QUEUE_PACKETS", -1)
    said = r"the lab's network cannot be made, `tc -n placer-\S+ -batch -` says: \S"
    with pytest.raises(ExecutionError, match=said), Lab.open(SPEC):
        pass


def test_two_labs_live_side_by_side(nothing_left, capfd):
    with Lab.open(SPEC) as one, Lab.open(LabSpec(nodes=2, ranks_per_node=1)) as two:
        assert set(one.namespaces) & set(two.namespaces) == set()
        assert run_command(one, ["true"]) == 0
        assert run_command(two, ["sh", "-c", "exit 3"]) == 3


def present() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("placer-*")}
