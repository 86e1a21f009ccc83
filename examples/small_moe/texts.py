"""Write the small model's text as files, one prompt a line, and put its tokenizer beside the checkpoint.

    python examples/small_moe/texts.py --work ~/small-moe --out DIR [--lines 200]

DIR/train.txt comes from the text the model was trained on, DIR/held_out.txt from documents it has never seen: the first
is to calibrate and to train on, the second to judge on. Line breaks inside a prompt become spaces.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from corpus import load_corpus
from tokenizers import Tokenizer


def main() -> int:
    """Write both files and copy the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and held_out.txt")
    parser.add_argument("--lines", type=int, default=200, help="prompts in each file (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which windows and prompts")
    options = parser.parse_args()
    corpus = load_corpus(options.work)
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    rng = np.random.default_rng(options.seed)
    length = corpus.prompt_QS.shape[1]
    windows = corpus.train_N[: len(corpus.train_N) // length * length].reshape(-1, length)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", windows), ("held_out", corpus.prompt_QS)):
        chosen = np.sort(rng.permutation(len(rows))[: options.lines])
        lines = [" ".join(tokenizer.decode(rows[row].tolist()).split()) for row in chosen]
        (options.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{options.out / name}.txt: {len(lines)} lines")
    shutil.copy(options.work / "tokenizer.json", options.work / "checkpoint" / "tokenizer.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
