"""What a device needs before it can plan: planes of a checkpoint, recorded demand for bits, a measured machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.config.device_settings import DeviceSettings
from placer.core.device.ladder import LADDERS, BitLadder
from placer.core.device.planes import PlaneIndex
from placer.core.errors import InputFileError, UsageError
from placer.pipeline.generating import read_prompts
from traces.plane_store import load_plane_index
from traces.store import save_trace

if TYPE_CHECKING:
    from placer.core.device.spec import DeviceSpec

__all__ = ["measure_device", "parse_ladder", "quantize_checkpoint", "record_bits", "token_windows"]

Progress = Callable[[int, int], None]


def parse_ladder(bits: str, *, copies: bool = False) -> BitLadder:
    """The ladder that a flag names: v1, v2, or widths such as 2,3,4. Raises UsageError."""
    if bits in LADDERS:
        found = LADDERS[bits]
        return BitLadder(bits_K=found.bits_K, group_size=found.group_size, nested=not copies)
    try:
        widths = tuple(int(part) for part in bits.split(","))
    except ValueError as error:
        raise UsageError(f"--bits {bits!r}: give {', '.join(LADDERS)}, or widths such as 2,3,4") from error
    return BitLadder(bits_K=widths, nested=not copies)


def token_windows(model: Path, text: Path, positions: int) -> np.ndarray:
    """The token ids of a text file's lines, end to end, cut into windows of equal length: (Q, S).

    Windows are `positions` long, or shorter where the text would not fill two. Raises InputFileError.
    """
    from placer.execute.hf import encode

    ids = np.array([token for line in encode(model, read_prompts(text)) for token in line], dtype=np.int64)
    length = min(positions, len(ids) // 2)
    if length < 2:
        raise InputFileError(f"{text}: has {len(ids)} tokens; give a text of at least 4, better of some thousand")
    windows = len(ids) // length
    return ids[: windows * length].reshape(windows, length)


def quantize_checkpoint(
    model: Path,
    text: Path,
    output: Path,
    *,
    bits: str = "v1",
    copies: bool = False,
    settings: DeviceSettings | None = None,
    progress: Progress | None = None,
) -> PlaneIndex:
    """Quantises the experts of a checkpoint folder: nested planes (MWQ), or GPTQ copies at every width.

    Raises UsageError, InputFileError; see placer.execute.planes.quantize_model.
    """
    from placer.execute.hf import require_transformers

    ladder = parse_ladder(bits, copies=copies)
    require_transformers()
    from placer.execute.planes import quantize_model

    calibration_QS = token_windows(model, text, (settings or DeviceSettings()).positions)
    return quantize_model(
        model,
        output,
        ladder,
        calibration_QS,
        method="gptq" if copies else "mwq",
        text=Path(text).name,
        progress=progress,
    )


def record_bits(
    model: Path,
    planes: Path,
    train: Path,
    text: Path,
    output: Path,
    routers_path: Path | None = None,
    *,
    settings: DeviceSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Trains bit routers on `train`, records the routing and bits of `text` as a trace, and says what was demanded."""
    from placer.execute.hf import encode, require_transformers

    require_transformers()
    from placer.execute.demand import level_weights, load_level_model, record_demand, train_bit_routers

    settings = settings or DeviceSettings()
    index = load_plane_index(planes)
    level_model = load_level_model(model, level_weights(index))

    def told(what: str) -> Progress:
        return lambda done, total: progress(f"{what}: {done} of {total}") if progress is not None else None

    routers = train_bit_routers(
        level_model,
        token_windows(model, train, settings.positions),
        alpha=settings.bit_alpha,
        seed=settings.seed,
        steps=settings.bit_steps,
        progress=told("training bit routers"),
    )
    trace = record_demand(level_model, routers, encode(model, read_prompts(text)), progress=told("recording"))
    if routers_path is not None:
        routers.save(routers_path)
    save_trace(trace, output)
    bits_LTK = trace.bits_LTK
    assert bits_LTK is not None
    count_K = [int((bits_LTK == bits).sum()) for bits in index.ladder.bits_K]
    shares = {
        str(bits): round(count / sum(count_K), 4) for bits, count in zip(index.ladder.bits_K, count_K, strict=True)
    }
    return {
        "output": str(output),
        "routers": None if routers_path is None else str(routers_path),
        "tokens": trace.num_tokens,
        "requests": trace.num_requests,
        "shares": shares,
    }


def measure_device(
    planes: Path,
    *,
    memory_mib: float,
    limit_mbytes_per_s: float | None = None,
    model: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> "tuple[DeviceSpec, dict[str, Any]]":
    """This machine as a DeviceSpec, measured at the sizes of `planes`, and how well it fits.

    Raises ExecutionError where a fit is none.
    """
    from placer.execute.launch import require_torch

    require_torch()
    from placer.execute.device import calibrate_device

    return calibrate_device(
        load_plane_index(planes),
        memory_mib=memory_mib,
        limit=limit_mbytes_per_s,
        model_path=model,
        progress=progress,
    )
