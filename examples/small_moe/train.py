"""Train the small mixture of experts on one CPU thread.

    python examples/small_moe/train.py --work ~/small-moe --minutes 20

Minutes are CPU minutes of this process, so other work on the machine does not shorten the training. The run can be
stopped with Ctrl-C and goes on from where it was when called again with the same --work.

Shapes: B prompt in the batch, S position, L layer, T token (B times S), K top-k, E expert,
V vocabulary, N training token, W training window, Q held-out prompt.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Corpus, load_corpus
from model import ModelConfig, SmallMoE, save_checkpoint
from torch import Tensor
from torch.nn import functional

__all__ = ["held_out_loss", "main", "training_loss"]

BATCH = 4
WINDOW = 512
PEAK_RATE = 2.5e-3
FINAL_RATE_SHARE = 0.05
WARM_UP_SHARE = 0.03
BALANCE_WEIGHT = 0.01
Z_WEIGHT = 1e-3
SEED = 7
SAVE_EVERY_STEPS = 100


@dataclass(slots=True)
class Progress:
    """How far the training has come: optimizer steps taken and CPU seconds spent on them."""

    step: int = 0
    seconds: float = 0.0


def training_loss(model: SmallMoE, token_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and its next-token part, both in nats, for windows (B, S + 1).

    The rest is the Switch Transformer's load-balancing loss and ST-MoE's z-loss on the router's logits.
    """
    logits_BSV, router_LTE = model(token_BS[:, :-1])
    next_token = functional.cross_entropy(logits_BSV.flatten(0, 1), token_BS[:, 1:].flatten())
    top_k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    chosen_LTK = router_LTE.topk(top_k, dim=-1).indices
    load_LE = torch.stack([torch.bincount(ids.flatten(), minlength=experts) for ids in chosen_LTK])
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True)
    probability_LE = router_LTE.softmax(dim=-1).mean(dim=1)
    balance = experts * (share_LE * probability_LE).sum(dim=-1).mean()
    z = router_LTE.logsumexp(dim=-1).square().mean()
    return next_token + BALANCE_WEIGHT * balance + Z_WEIGHT * z, next_token


@torch.no_grad()
def held_out_loss(model: SmallMoE, token_QS: Tensor) -> float:
    """Return the mean next-token loss in nats over held-out prompts (Q, S)."""
    losses: list[float] = []
    for token_BS in token_QS.split(BATCH):
        logits_BSV, _ = model(token_BS[:, :-1])
        losses.extend(
            functional.cross_entropy(logits_BSV.transpose(1, 2), token_BS[:, 1:], reduction="none").mean(1).tolist()
        )
    return sum(losses) / len(losses)


def _windows(corpus: Corpus) -> Tensor:
    """Return the training stream as windows (W, S + 1) in a seeded random order."""
    stream_N = torch.from_numpy(corpus.train_N.astype("int64"))
    window_WS = stream_N[: len(stream_N) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    return window_WS[torch.randperm(len(window_WS), generator=torch.Generator().manual_seed(SEED))]


def _rate(done: float) -> float:
    """Return the learning rate after a share of the budget: a short linear warm-up, then a cosine."""
    if done < WARM_UP_SHARE:
        return PEAK_RATE * (done + 1e-3) / (WARM_UP_SHARE + 1e-3)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))
    return PEAK_RATE * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)


def _keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system: 1.5 times the speed on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt_trim_threshold, mallopt_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mallopt_trim_threshold, 2**31 - 1)
        libc.mallopt(mallopt_mmap_max, 0)


def _save(path: Path, model: SmallMoE, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the resumable state, replacing the former one only when it is complete."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": progress.step,
        "seconds": progress.seconds,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(corpus: Corpus, work: Path, minutes: float) -> tuple[SmallMoE, Progress]:
    """Return the trained model and what it took; the state in work/resume.pt is continued when there is one."""
    torch.manual_seed(SEED)
    model, progress, resume = SmallMoE(ModelConfig()), Progress(), work / "resume.pt"
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(state["step"], state["seconds"])
    window_WS = _windows(corpus)
    started = time.process_time() - progress.seconds
    try:
        while progress.seconds < 60 * minutes:
            for group in optimizer.param_groups:
                group["lr"] = _rate(progress.seconds / (60 * minutes))
            row = torch.arange(progress.step * BATCH, (progress.step + 1) * BATCH) % len(window_WS)
            loss, next_token = training_loss(model, window_WS[row])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress = Progress(progress.step + 1, time.process_time() - started)
            if progress.step % SAVE_EVERY_STEPS == 0:
                tokens = progress.step * BATCH * WINDOW / 1e6
                print(
                    f"step {progress.step} tokens {tokens:.2f} M cpu {progress.seconds:.0f} s"
                    f" loss {next_token.item():.3f} with router losses {loss.item():.3f}",
                    file=sys.stderr,
                    flush=True,
                )
                _save(resume, model, optimizer, progress)
    finally:
        _save(resume, model, optimizer, progress)
    return model, progress


def main() -> int:
    """Prepare the corpus, train, write work/checkpoint and print the held-out loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder outside the repository for everything written")
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes to train (default 20)")
    parser.add_argument("--text", type=Path, help="own text instead of Debian's: one subfolder per domain")
    options = parser.parse_args()
    if options.text and not options.text.is_dir():
        parser.error(f"--text {options.text} is not a folder")
    torch.set_num_threads(1)
    _keep_freed_memory()
    corpus = load_corpus(options.work, options.text)
    prompt_QS = torch.from_numpy(corpus.prompt_QS.astype("int64"))
    try:
        model, progress = train(corpus, options.work, options.minutes)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    save_checkpoint(model, options.work / "checkpoint")
    tokens = progress.step * BATCH * WINDOW / 1e6
    print(f"trained on {tokens:.2f} M tokens in {progress.seconds:.0f} CPU seconds")
    print(f"held-out loss {held_out_loss(model, prompt_QS):.3f} nats over {len(prompt_QS)} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
