"""Lab: N network namespaces joined by shaped links, made by `with Lab.open(spec)` and gone when the block ends.

Why it is built so, as seen on two cores (2x2 and 4x1 nodes, 100 Mbit/s to 1 Gbit/s, 16 KB to 1 MB a message):
* Packets of 240 us, not merged, a bucket of 100 us, and a rate that pays for headers: one-way times then are one line
  through all sizes (slope 1.00 to 1.03 of nominal, fixed part within 0.1 ms, R2 > .999). Packets of 9,000 bytes or a
  bucket of 64 KB let the first bytes pass for nothing: 0.6 ms and more at 100 Mbit/s.
* With one queue for a link, three senders that began with the same receiver took 5/3 of an even all-to-all's time;
  equal shares for each pair of nodes brought 1.05 to 1.08. Queues never drop, and neither probes of a tail nor
  time-outs take queueing for loss (there had been up to 86 false retransmissions a minute).
* What is left of the all-to-all's tail (p90 1.3 to 1.6 times) is not the network's: gloo's all_to_all_single lets a
  "ready to receive" wait behind data of the same connection, so that some pairs run one direction after the other.
  Receives posted before sends (irecv, then isend) have p90 within 2 % of nominal on 2x2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from placer.core.errors import DependencyError, ExecutionError
from placer.execute.lab.owner import Claim, clean_leftovers, remove_namespaces
from placer.execute.lab.spec import LabSpec
from placer.execute.launch import Host

__all__ = ["Lab", "require_lab"]

INTERFACE = "eth0"
SUBNET = "10.77.0"
MTU = 9000
PACKET_US, BURST_US = 240, 100
HEADER_BYTES, FRAME_BYTES = 52, 14
QUEUE_PACKETS = 100_000
WINDOW_PACKETS = 100
RTO_MIN_MS = 2_000
SYSCTLS = {
    "ipv4/tcp_congestion_control": "reno",
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv4/tcp_no_metrics_save": "1",
    "ipv4/tcp_early_retrans": "0",
    "ipv4/tcp_rmem": "4096 16777216 33554432",
    "ipv4/tcp_wmem": "4096 16777216 33554432",
    "ipv6/conf/all/disable_ipv6": "1",
}


def require_lab() -> None:
    """Raises DependencyError where `ip` or `tc` is missing, ExecutionError where this process is not root."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise DependencyError(f"a lab needs Linux and `{tool}`, which is not installed; install iproute2")
    if os.geteuid() != 0:
        raise ExecutionError("a lab makes network namespaces, which only root may; run it as root or with sudo")


class Lab:
    """`hosts` are the nodes, each a namespace: `run_ranks(..., hosts=lab.hosts)` starts ranks in them."""

    def __init__(self, spec: LabSpec, names: list[str]) -> None:
        self.spec = spec
        self.namespaces = names
        self.hosts = tuple(
            Host(
                prefix=("ip", "netns", "exec", name),
                address=f"{SUBNET}.{node + 1}",
                interface=INTERFACE,
                ranks=spec.ranks_per_node,
            )
            for node, name in enumerate(names[: spec.nodes])
        )

    @classmethod
    @contextlib.contextmanager
    def open(cls, spec: LabSpec) -> Iterator["Lab"]:
        """The lab, for as long as the block lasts. What earlier, killed owners left is removed first.

        In the main thread SIGTERM and SIGHUP end the block as Ctrl-C does. After SIGKILL the next `open`, or
        `clean_leftovers`, removes the namespaces. Raises DependencyError, ExecutionError.
        """
        require_lab()
        clean_leftovers()
        with _ending_on_signals(), contextlib.ExitStack() as stack:
            claim = Claim()
            stack.callback(claim.close)
            names = claim.names(spec.nodes + 1)
            stack.callback(_undisturbed, names)
            lab = cls(spec, names)
            lab._build()
            yield lab

    def _build(self) -> None:
        spec, switch, mtu = self.spec, self.namespaces[-1], _packet_bytes(self.spec.mbit)
        _ip((), [f"netns add {name}" for name in self.namespaces])
        wires = ["link add switch type bridge", "link set switch up"]
        # one packet is one packet: what the kernel merges would pass the bucket in one piece
        whole = "" if spec.mbit is None else f"gso_max_size {mtu}"
        for node, name in enumerate(self.namespaces[:-1]):
            wires.append(f"link add port{node} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {name}")
            wires.append(f"link set port{node} {whole} master switch up")
        _ip(("-n", switch), wires)
        _set(switch, {"ipv6/conf/all/disable_ipv6": "1"})
        addresses = [host.address for host in self.hosts]
        for node, (name, address) in enumerate(zip(self.namespaces, addresses, strict=False)):
            _set(name, SYSCTLS)
            route = f"route replace {SUBNET}.0/24 dev {INTERFACE} src {address}"
            lines = ["link set lo up", f"addr add {address}/24 dev {INTERFACE}", f"link set {INTERFACE} {whole} up"]
            _ip(("-n", name), [*lines, f"{route} initcwnd {WINDOW_PACKETS} rto_min {RTO_MIN_MS}ms"])
            if spec.mbit is not None:
                _tc(name, _shape(INTERFACE, spec.mbit, addresses, "dst"))
                _tc(switch, _shape(f"port{node}", spec.mbit, addresses, "src"))


def _packet_bytes(mbit: float | None) -> int:
    """Largest packet, which nearly always is the size of all: PACKET_US of the link, within what Ethernet has."""
    return MTU if mbit is None else min(MTU, max(1500, int(mbit / 8 * PACKET_US)))


def _shape(device: str, mbit: float, peers: Sequence[str], side: str) -> list[str]:
    """What `tc -batch` needs to send at most `mbit` of payload out of `device`, peers (dst or src) in equal shares."""
    mtu = _packet_bytes(mbit)
    rate = mbit * (mtu + FRAME_BYTES) / (mtu - HEADER_BYTES)
    burst = max(1000, int(mbit / 8 * BURST_US))
    full = f"ceil {rate:.6f}mbit burst {burst} cburst {burst} quantum {mtu + FRAME_BYTES}"
    lines = [
        f"qdisc add dev {device} root handle 1: htb default 2",
        f"class add dev {device} parent 1: classid 1:1 htb rate {rate:.6f}mbit {full}",
    ]
    for index, peer in enumerate(peers):
        # nearly all is borrowed from the one class above, which is what makes the shares equal
        leaf = f"1:{index + 2:x}"
        lines.append(f"class add dev {device} parent 1:1 classid {leaf} htb rate {rate / 100:.6f}mbit {full}")
        lines.append(f"qdisc add dev {device} parent {leaf} pfifo limit {QUEUE_PACKETS}")
        lines.append(f"filter add dev {device} parent 1: protocol ip prio 1 u32 match ip {side} {peer} flowid {leaf}")
    return lines


def _ip(flags: tuple[str, ...], lines: list[str]) -> None:
    _run(["ip", *flags, "-batch", "-"], lines)


def _tc(name: str, lines: list[str]) -> None:
    _run(["tc", "-n", name, "-batch", "-"], lines)


def _set(name: str, values: dict[str, str]) -> None:
    # an address family that the kernel lacks needs no setting
    lines = [f"[ ! -e /proc/sys/net/{key} ] || echo {value} > /proc/sys/net/{key}" for key, value in values.items()]
    _run(["ip", "netns", "exec", name, "sh", "-e"], lines)


def _run(command: list[str], lines: list[str]) -> None:
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ExecutionError(f"the lab's network cannot be made, `{' '.join(command)}` says: {why}")


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become SystemExit, so that blocks are left in order; what was set before is restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _undisturbed(names: list[str]) -> None:
    """Removes the namespaces; a second Ctrl-C must not stop that half way."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers} if main else {}
    try:
        remove_namespaces(names)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
