"""The lab's links: their settings by sight, and their rate by bytes through real sockets."""

import json
import subprocess
import sys

import pytest

from placer.execute.lab import Lab, LabSpec

pytestmark = pytest.mark.dist

TRAIN = """
import socket, sys, time
count, size = 6, 1_000_000
if sys.argv[1] == "receive":
    with socket.create_server(("10.77.0.2", 7000)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
    at = []
    for _ in range(count):
        left = size
        while left:
            left -= len(connection.recv(min(left, 1 << 16)))
        at.append(time.monotonic())
    print(size * (count - 1) / (at[-1] - at[0]))
else:
    with socket.create_connection(("10.77.0.2", 7000)) as connection:
        connection.sendall(bytes(count * size))
"""


def inside(host, *arguments):
    return subprocess.Popen([*host.prefix, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_train_of_bytes_never_goes_faster_than_the_link(nothing_left):
    """An upper limit holds on a busy machine too; the other side is for the calibration's own report."""
    with Lab.open(LabSpec(nodes=2, ranks_per_node=1, mbit=100)) as lab:
        receiver = inside(lab.hosts[1], sys.executable, "-c", TRAIN, "receive")
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        sender = inside(lab.hosts[0], sys.executable, "-c", TRAIN, "send")
        bytes_per_s = float(receiver.communicate(timeout=60)[0])
        sender.communicate(timeout=10)
        assert sender.returncode == 0
        counted = qdisc_bytes(lab.namespaces[0])
    assert 0 < bytes_per_s <= 1.03 * 12.5e6
    assert counted["bytes"] >= 6_000_000
    assert counted["drops"] == 0


def qdisc_bytes(name):
    done = subprocess.run(
        ["tc", "-n", name, "-j", "-s", "qdisc", "show", "dev", "eth0", "root"],
        capture_output=True,
        text=True,
        check=True,
    )
    (root,) = json.loads(done.stdout)
    assert root["kind"] == "htb"
    return root


def test_unshaped_links_have_no_bucket_and_loopback_is_up(nothing_left):
    with Lab.open(LabSpec(nodes=3, ranks_per_node=1)) as lab:
        for name in lab.namespaces[:-1]:
            done = subprocess.run(["tc", "-n", name, "qdisc"], capture_output=True, text=True, check=True)
            assert "htb" not in done.stdout
        ping = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
        loopback = inside(lab.hosts[2], sys.executable, "-c", ping)
        loopback.communicate(timeout=30)
        assert loopback.returncode == 0
        setting = inside(lab.hosts[0], "cat", "/proc/sys/net/ipv4/tcp_congestion_control")
        assert setting.communicate(timeout=30)[0] == "reno\n"
