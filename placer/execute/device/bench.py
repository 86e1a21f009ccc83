"""What calibration measures: reads, and the loop itself with everything in memory, beside reads and without.

Legend: L sites, E experts, K levels, N numbers of tokens, I repetitions, B iterations.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from placer.core.cluster import LinkClass
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError
from placer.core.timeline import PHASES
from placer.execute.device.files import PlaneFile
from placer.execute.device.limit import RateLimit
from placer.execute.device.loop import AttentionBlock, replay_iteration
from placer.execute.device.session import open_session

__all__ = [
    "LoopTimes",
    "loop_times",
    "model_layer_times",
    "placeholder_device",
    "read_sizes",
    "time_reads",
    "times_of_loads",
]

FloatArray = npt.NDArray[np.float64]
ATTENTION, EXPERTS = PHASES.index("attention"), PHASES.index("experts")
MOST_EXPERTS = 4
MODEL_BATCHES, PROMPT_TOKENS = (1, 4, 16), 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopTimes:
    """Nanoseconds that the loop took, medians over sites and repetitions.

    expert_KN    of one expert with this many tokens at this level: all its items, and what the loop does between them
    layer_N      of one layer outside its experts     tokens_N   tokens of the iterations that gave layer_N
    slowdown     what items took while the disk was read, over what they took without, medians
    """

    expert_KN: FloatArray
    layer_N: FloatArray
    tokens_N: npt.NDArray[np.int64]
    slowdown: float


def placeholder_device(memory_mib: float, limit: float | None) -> DeviceSpec:
    """A device whose times are not known yet: the loop asks for them in orders that calibration does not use."""
    compute = DeviceCompute(layer_us=0, base_us=1, residual_us=1, ffn_tokens=(1, 2), ffn_us=(1, 1))
    disk = LinkClass(gbytes_per_s=1.0, alpha_us=1.0)
    return DeviceSpec(
        name="calibration", memory_mib=memory_mib, disk=disk, compute=compute, disk_limit_mbytes_per_s=limit
    )


def calibration_plan(
    index: PlaneIndex, memory_bytes: int, resident_LE: npt.NDArray[np.int64], buffer_bytes: int = 0
) -> DevicePlan:
    """A plan by id with these levels resident."""
    return DevicePlan(
        model=index.model,
        num_hidden_layers=index.num_hidden_layers,
        moe_layers=index.moe_layers,
        num_experts=index.num_experts,
        ladder=index.ladder,
        plane_bytes_K=index.plane_bytes_K,
        resident_LE=resident_LE,
        ceiling_LE=np.full(resident_LE.shape, index.ladder.levels),
        order="by_id",
        memory_bytes=memory_bytes,
        buffer_bytes=buffer_bytes,
    )


def read_sizes(index: PlaneIndex) -> list[int]:
    """The sizes at which reads are timed: those of the planes, and halves and doubles around them, ascending."""
    sizes = sorted(set(index.plane_bytes_K))
    return sorted({sizes[0] // 2, *sizes, (sizes[0] + sizes[-1]) // 2, 2 * sizes[-1], 3 * sizes[-1]})


def time_reads(
    index: PlaneIndex, sizes: Sequence[int], limit: float | None, repetitions: int, rng: np.random.Generator
) -> FloatArray:
    """Nanoseconds of reads at random places of the file, (I, N): one after another, sizes in turn."""
    first, last = int(index.offset_LEK.min()), int(index.offset_LEK.max())
    time_IN = np.zeros((repetitions, len(sizes)))
    with PlaneFile(index.path, max(sizes)) as file:
        throttle = RateLimit(limit)
        end_ns = perf_counter_ns()
        for at in np.ndindex(time_IN.shape):
            size = sizes[at[1]]
            begin_ns = end_ns
            file.read(int(rng.integers(first, max(first + 1, last - size))), size)
            throttle.hold(size, begin_ns, follows=at != (0, 0))
            end_ns = perf_counter_ns()
            time_IN[at] = end_ns - begin_ns
    return time_IN


class _ReadsBeside:
    """Reads planes at random for as long as it is entered, in a thread of its own."""

    def __init__(self, index: PlaneIndex, limit: float | None, seed: int) -> None:
        self._index, self._limit, self._rng = index, limit, np.random.default_rng(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="placer-reads-beside", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        index, throttle, follows = self._index, RateLimit(self._limit), False
        with PlaneFile(index.path, max(index.plane_bytes_K)) as file:
            while not self._stop.is_set():
                begin_ns = perf_counter_ns()
                plane = tuple(int(self._rng.integers(n)) for n in index.shape_LEK)
                data = file.read(int(index.offset_LEK[plane]), index.plane_bytes_K[plane[2]])
                # what the reader does with it
                data.copy()
                throttle.hold(len(data), begin_ns, follows=follows, stopped=self._stop.is_set)
                follows = True


def loop_times(
    index: PlaneIndex,
    device: DeviceSpec,
    tokens_N: Sequence[int],
    *,
    top_k: int,
    repetitions: int,
    seed: int,
) -> LoopTimes:
    """Runs the loop with a few experts of every site resident, each with `tokens_N` tokens at one level at a time.

    Raises InfeasibleError where not even `top_k` experts of one site fit the device's memory.
    """
    layers, experts, levels = index.shape_LEK
    block = AttentionBlock(index.shapes[0][1], seed)
    item_KNI = np.zeros((levels, len(tokens_N), 2 * repetitions * layers))
    layer_NI = np.zeros((levels, len(tokens_N), repetitions * layers))
    tokens_of = np.zeros(len(tokens_N), dtype=np.int64)
    # copies: one level is resident at a time
    for resident in [levels] if index.ladder.nested else range(1, levels + 1):
        each = layers * sum(index.plane_bytes_K[plane] for plane in index.ladder.planes_of(resident))
        used = min(experts, max(top_k, MOST_EXPERTS), device.memory_bytes // each)
        if used < min(top_k, experts):
            raise InfeasibleError(
                f"calibration holds {top_k} experts of every layer in memory, {top_k * each} bytes, and the device "
                f"allows {device.memory_bytes}; give a larger budget"
            )
        resident_LE = np.zeros((layers, experts), dtype=np.int64)
        resident_LE[:, :used] = resident
        plan = calibration_plan(index, device.memory_bytes, resident_LE)
        cases = [
            (level, at, tokens)
            for level in (range(1, levels + 1) if index.ladder.nested else [resident])
            for at, tokens in enumerate(tokens_N)
        ]
        count_BLEK = np.zeros((len(cases), layers, experts, levels), dtype=np.int64)
        for row, (level, _, tokens) in enumerate(cases):
            count_BLEK[row, :, :used, level - 1] = tokens
        tokens_of = np.array([-(-tokens * used // top_k) for tokens in tokens_N])
        work = DeviceWork(tokens_B=np.array([tokens_of[at] for _, at, _ in cases]), count_BLEK=count_BLEK)
        with open_session(plan, index, device, verify=False) as session:
            replay_iteration(session, work, len(cases) - 1, block, seed)
            for repetition in range(2 * repetitions):
                beside = repetition % 2
                session.start_over()
                with ExitStack() as stack:
                    if beside:
                        stack.enter_context(_ReadsBeside(index, device.disk_limit_mbytes_per_s, seed + repetition))
                    for row in range(len(cases)):
                        replay_iteration(session, work, row, block, seed)
                for (level, at, _), (spans, _) in zip(cases, session.iterations, strict=True):
                    expert_L, layer_L = np.zeros(layers), np.zeros(layers)
                    for site, phase, begin, end, _ in spans:
                        (expert_L if phase == EXPERTS else layer_L)[site] += end - begin
                    where = slice((beside * repetitions + repetition // 2) * layers, None)
                    item_KNI[level - 1, at, where][:layers] = expert_L / used
                    if not beside:
                        layer_NI[level - 1, at, where][:layers] = layer_L
    quiet, busy = np.split(item_KNI, 2, axis=2)
    return LoopTimes(
        expert_KN=np.median(quiet, axis=2),
        layer_N=np.median(layer_NI.transpose(1, 0, 2).reshape(len(tokens_N), -1), axis=1),
        tokens_N=tokens_of,
        slowdown=max(1.0, float(np.median(np.median(busy, axis=2) / np.median(quiet, axis=2)))),
    )


def times_of_loads(
    index: PlaneIndex, device: DeviceSpec, *, top_k: int, iterations: int, seed: int
) -> dict[int, FloatArray]:
    """Nanoseconds of the loop's own reads by plane size, beside computing, with nothing resident."""
    layers, experts, levels = index.shape_LEK
    used = min(experts, max(top_k, MOST_EXPERTS))
    count_BLEK = np.zeros((iterations, layers, experts, levels), dtype=np.int64)
    count_BLEK[:, :, :used, -1 if index.ladder.nested else slice(None)] = 1
    tokens = -(-int(count_BLEK[0, 0].sum()) // top_k)
    work = DeviceWork(tokens_B=np.full(iterations, max(tokens, levels)), count_BLEK=count_BLEK)
    whole = used * sum(index.plane_bytes_K)
    plan = calibration_plan(
        index,
        max(whole, device.memory_bytes),
        np.zeros((layers, experts), dtype=np.int64),
        buffer_bytes=min(whole, device.memory_bytes),
    )
    block = AttentionBlock(index.shapes[0][1], seed)
    found: dict[int, list[int]] = {}
    with open_session(plan, index, device, verify=False) as session:
        replay_iteration(session, work, 0, block, seed)
        session.start_over()
        for iteration in range(iterations):
            replay_iteration(session, work, iteration, block, seed)
        for _, loads in session.iterations:
            for plane, begin, end in loads:
                found.setdefault(index.plane_bytes_K[plane[2]], []).append(end - begin)
    return {size: np.array(times, dtype=np.float64) for size, times in sorted(found.items())}


def model_layer_times(
    model_path: Path, index: PlaneIndex, device: DeviceSpec, *, repetitions: int, seed: int
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Tokens of a step, and the median nanoseconds of a layer outside its experts in such steps of a real model."""
    # only here, since transformers takes a second to import
    from placer.execute.device.generate import generate_on_device

    rng = np.random.default_rng(seed)
    layers, experts, _ = index.shape_LEK
    buffer = min(experts * sum(index.plane_bytes_K), device.memory_bytes)
    plan = calibration_plan(
        index, device.memory_bytes, np.zeros((layers, experts), dtype=np.int64), buffer_bytes=buffer
    )
    unlimited = replace(device, disk_limit_mbytes_per_s=None)
    found: dict[int, list[int]] = {}
    for batch in MODEL_BATCHES:
        prompts = rng.integers(1, 32, size=(batch, PROMPT_TOKENS)).tolist()
        _, timeline = generate_on_device(
            model_path, plan, index, unlimited, prompts, repetitions + 1, warm_up=1, verify=False
        )
        mine = (timeline.phase == ATTENTION) & (timeline.layer >= 0)
        for tokens, took_ns in zip(timeline.tokens[mine].tolist(), timeline.duration_ns[mine].tolist(), strict=True):
            found.setdefault(tokens, []).append(took_ns)
    tokens_N = np.array(sorted(found))
    return tokens_N, np.array([np.median(found[tokens]) for tokens in tokens_N.tolist()])
