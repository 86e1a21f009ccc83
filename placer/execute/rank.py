"""What every rank's program does, whatever it measures: its place, its device, the rendezvous, and how it ends."""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from placer.core.errors import ExecutionError, PlacerError, UsageError
from placer.execute.dispatch import Fabric, exchange
from placer.execute.heartbeat import die_with
from placer.execute.job import Backend
from placer.execute.protocol import PROGRESS_PREFIX, RunFolder

__all__ = [
    "RankEnvironment",
    "ask_for_realtime",
    "barrier",
    "choose_device",
    "first_line",
    "host_id",
    "join_ranks",
    "make_fabrics",
    "say",
    "serve",
]

REALTIME_PRIORITY = 10


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What the launcher tells a rank, read once."""

    rank: int
    num_ranks: int
    local_rank: int
    local_ranks: int
    folder: RunFolder | None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "RankEnvironment":
        """From torchrun's variables and, where `run_ranks` started us, its folder. Raises UsageError."""
        try:
            rank, num_ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
            local_rank, local_ranks = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise UsageError(f"the environment lacks {error}; start the worker with torchrun") from error
        folder = environ.get(RunFolder.VARIABLE)
        return cls(rank, num_ranks, local_rank, local_ranks, RunFolder(Path(folder)) if folder else None)


def choose_device(backend: Backend, environment: RankEnvironment, cuda_devices: int) -> torch.device:
    """The rank's device; a CUDA one means NCCL. Raises ExecutionError where NCCL is asked for and cannot be had."""
    enough = cuda_devices >= environment.local_ranks
    if backend == "nccl" and not enough:
        raise ExecutionError(
            f"backend nccl needs a CUDA device for each of the {environment.local_ranks} ranks of this machine, which "
            f"has {cuda_devices}; use backend gloo or fewer ranks"
        )
    if backend == "gloo" or not enough:
        return torch.device("cpu")
    return torch.device("cuda", environment.local_rank)


def serve(module: str, arguments: Sequence[str], run: Callable[[RankEnvironment, list[Path]], None]) -> int:
    """Calls `run` with the job files named; returns the exit code, having said in one line on standard error what went
    wrong, and told the launcher. `module` is what torchrun was asked to start."""
    rank, folder = int(os.environ.get("RANK", "0")), None
    try:
        environment = RankEnvironment.read(os.environ)
        folder = environment.folder
        _watch(environment)
        if not arguments:
            raise UsageError(f"no job given; usage: torchrun ... -m {module} JOB.json")
        run(environment, [Path(argument) for argument in arguments])
    except PlacerError as error:
        lost = isinstance(error.__cause__, RuntimeError) and _is_lost_contact(error.__cause__)
        if folder is not None:
            folder.report(rank, type(error).__name__, str(error), lost_contact=lost)
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _watch(environment: RankEnvironment) -> None:
    """Makes this rank end with its launcher, and a programming error leave its reason where the launcher looks."""
    folder = environment.folder
    if folder is None:
        return
    if folder.lock.exists():
        die_with(folder.lock)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        folder.report(environment.rank, "ExecutionError", f"{kind.__name__}: {error}", lost_contact=False)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def ask_for_realtime(work: str) -> None:
    """Before any thread or process group is made: threads inherit the priority."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
    except (AttributeError, OSError) as error:
        raise ExecutionError(
            f"{work}.realtime: this machine refuses SCHED_RR ({error}); run as root, or without realtime"
        ) from error


def join_ranks(environment: RankEnvironment, device: torch.device, timeout_s: float) -> None:
    """Joins and connects all ranks, or says within `timeout_s` where the rendezvous is that cannot be had."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ranks = {"rank": environment.rank, "world_size": environment.num_ranks}
    try:
        dist.init_process_group(backend, **ranks, timeout=timedelta(seconds=timeout_s))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ExecutionError(
            f"the rendezvous at {where} did not bring {environment.num_ranks} ranks together within {timeout_s:g} s "
            f"({first_line(error)}); is every machine started, and can it reach that address?"
        ) from error
    except RuntimeError as error:
        if not _is_own_interface(error):
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME", "of this host's name")
        raise ExecutionError(
            f"cannot use network interface {name} ({first_line(error).rpartition('] ')[2]}); set GLOO_SOCKET_IFNAME "
            "to one that this machine has"
        ) from error
    # connections are made by the first message on some back ends, and must not be timed
    one_R = [1] * environment.num_ranks
    exchange(torch.zeros(environment.num_ranks, 4, device=device), one_R, one_R)


def make_fabrics(nodes: Sequence[tuple[int, bool]], device: torch.device) -> list[Fabric]:
    """One for each job, of which we know the ranks of a node and whether it has exchanges of two levels; nodes of one
    size share their process groups. Collective."""
    made = {size: Fabric.plain() for size, _ in nodes}
    for size, two_level in nodes:
        if two_level and made[size].ranks_per_node != size:
            made[size] = Fabric.create(size, device)
    return [made[size] for size, _ in nodes]


def barrier() -> None:
    """Waits for all ranks."""
    # on the CPU backend, so that it is the same call for gloo and NCCL
    dist.all_reduce(torch.zeros(1))


def host_id(rank: int) -> int:
    """Equal for ranks that share a monotonic clock (one boot of one kernel), else different."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        text = f"rank {rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _is_lost_contact(error: RuntimeError) -> bool:
    gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return gone and not _is_own_interface(error)


def _is_own_interface(error: RuntimeError) -> bool:
    # gloo's only words for an interface without address, or one that cannot be bound, are where it checks
    return "transport/tcp/device.cc" in str(error)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def say(text: str) -> None:
    """Hands a line of progress to the launcher."""
    # one write: ranks share the pipe, and print would send the end of the line by itself
    sys.stdout.write(f"{PROGRESS_PREFIX}{text}\n")
    sys.stdout.flush()
