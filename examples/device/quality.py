"""What each bit-width costs in quality: expert planes of a small model, their bytes, output error and perplexity.

    python examples/device/quality.py ~/small-moe/checkpoint --work ~/small-moe quality.json

Round to nearest and GPTQ as whole copies at 2 to 8 bits, Matryoshka planes at 2-3-4 (v1) and 5-6-7-8 (v2). Calibration
texts are windows of the text that the model was trained on; perplexity is that of the corpus's held-out prompts. Errors
are relative squared errors of an expert's output on every fifth calibration text, which the Hessians do not see, as a
mean over experts. Plane files stay in `--planes`; one that is there is used again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placer.core.atomic import write_text_atomically
from placer.core.device.ladder import LADDERS, BitLadder
from placer.core.device.planes import PlaneIndex
from placer.execute.planes import Method, perplexity, plane_weights, quantize_model
from traces.plane_store import load_plane_index, verify_planes

sys.path.append(str(Path(__file__).parents[1] / "small_moe"))
from corpus import Corpus, load_corpus
from record import choose_prompts

__all__ = ["STORES", "main", "measure", "table"]

COPIES = BitLadder(bits_K=(2, 3, 4, 5, 6, 7, 8), nested=False)
STORES: dict[str, tuple[Method, BitLadder]] = {
    "rtn": ("rtn", COPIES),
    "gptq": ("gptq", COPIES),
    "mwq-v1": ("mwq", LADDERS["v1"]),
    "mwq-v2": ("mwq", LADDERS["v2"]),
}
TEXT_TOKENS = 512
TARGET = 1.05


def measure(checkpoint: Path, corpus: Corpus, planes: Path, texts: int, prompts: int) -> dict[str, Any]:
    """Every store at every width, and the model as it is."""
    start_Q = np.random.default_rng(0).integers(0, len(corpus.train_N) - TEXT_TOKENS, texts)
    calibration_QS = np.stack([corpus.train_N[start : start + TEXT_TOKENS] for start in start_Q]).astype(np.int64)
    held_out_QS = corpus.prompt_QS[choose_prompts(corpus, prompts, seed=0)].astype(np.int64)
    own = perplexity(checkpoint, None, held_out_QS)
    rows, gptq_LEK = [], None
    for name, (method, ladder) in STORES.items():
        index = _planes(checkpoint, planes / f"{name}.planes.safetensors", ladder, method, calibration_QS)
        assert index.error_LEK is not None
        if name == "gptq":
            gptq_LEK = index.error_LEK
        for level, bits in enumerate(ladder.bits_K, 1):
            found = perplexity(checkpoint, plane_weights(index, level), held_out_QS)
            error_LE = index.error_LEK[:, :, level - 1]
            row = {
                "store": name,
                "bits": bits,
                "expert_bytes": ladder.level_bytes(index.shapes, level),
                "plane_bytes": index.total_bytes,
                "file_bytes": index.path.stat().st_size,
                "error": float(error_LE.mean()),
                "perplexity": found.value,
            }
            if method == "mwq" and gptq_LEK is not None:
                ratio_LE = error_LE / gptq_LEK[:, :, COPIES.level_of(bits) - 1]
                row["error_of_gptq"] = float(error_LE.mean() / gptq_LEK[:, :, COPIES.level_of(bits) - 1].mean())
                row["error_of_gptq_median"] = float(np.median(ratio_LE))
                row["experts_within_target"] = float((ratio_LE <= TARGET).mean())
            rows.append(row)
            print(f"{name} at {bits} bits: perplexity {found.value:.3f}", file=sys.stderr, flush=True)
    return {
        "model": checkpoint.name,
        "calibration_texts": texts,
        "held_out_tokens": own.tokens,
        "perplexity": own.value,
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """The rows as text; `of GPTQ` is the mean error as a multiple of GPTQ's at the same width."""
    lines = [f"{'store':8s} bits  bytes/expert  output error  of GPTQ  perplexity"]
    lines.append(f"{'none':8s}   32  {'':12s}  {'':12s}  {'':7s}  {found['perplexity']:10.3f}")
    for row in found["rows"]:
        ratio = f"{row['error_of_gptq']:.3f}" if "error_of_gptq" in row else ""
        lines.append(
            f"{row['store']:8s} {row['bits']:4d}  {row['expert_bytes']:12,d}  {row['error']:12.3e}  {ratio:>7s}"
            f"  {row['perplexity']:10.3f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder that examples/small_moe/train.py wrote")
    parser.add_argument("--planes", type=Path, help="folder for the plane files (default: WORK/planes)")
    parser.add_argument("--texts", type=int, default=160, help=f"calibration texts of {TEXT_TOKENS} tokens")
    parser.add_argument("--prompts", type=int, default=44, help="held-out prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    planes = options.planes or options.work / "planes"
    planes.mkdir(parents=True, exist_ok=True)
    found = measure(options.checkpoint, load_corpus(options.work), planes, options.texts, options.prompts)
    write_text_atomically(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def _planes(
    checkpoint: Path, path: Path, ladder: BitLadder, method: Method, calibration_QS: npt.NDArray[np.int64]
) -> PlaneIndex:
    if path.is_file():
        index = load_plane_index(path)
        verify_planes(index)
        return index

    def progress(done: int, experts: int) -> None:
        print(f"{path.name}: {done} of {experts} experts", end="\r", file=sys.stderr, flush=True)

    text = f"{len(calibration_QS)} windows of {TEXT_TOKENS} tokens of the training text"
    return quantize_model(checkpoint, path, ladder, calibration_QS, method=method, text=text, progress=progress)


if __name__ == "__main__":
    raise SystemExit(main())
