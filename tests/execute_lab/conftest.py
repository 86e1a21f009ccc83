"""What the lab's tests share: a lab where this machine can have one, and what is left of labs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMESPACES, RECORDS = Path("/run/netns"), Path("/run/placer-lab")


def can_have_labs() -> bool:
    """Root with iproute2, and a kernel that gives a network namespace with a shaped link."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        return False
    probe = "ip link add probe0 type veth peer name probe1 && tc qdisc add dev probe0 root htb default 1"
    done = subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, check=False)
    return done.returncode == 0


def ours() -> set[str]:
    """Namespaces and records of labs that exist now."""
    folders = [(NAMESPACES, "placer-*"), (RECORDS, "*.json")]
    return {path.name for folder, pattern in folders if folder.is_dir() for path in folder.glob(pattern)}


@pytest.fixture(scope="session")
def lab_machine() -> None:
    if not can_have_labs():
        pytest.skip("needs root, iproute2 and network namespaces")


@pytest.fixture
def nothing_left(lab_machine) -> Iterator[None]:
    before = ours()
    yield
    assert ours() - before == set()
