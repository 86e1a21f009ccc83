"""Train bit routers for a checkpoint and ask on held-out text whether they beat chance at the same average bits.

    python examples/device/bit_router.py ~/small-moe/checkpoint planes.safetensors --work ~/small-moe out.json

Needs the work folder of examples/small_moe (its checkpoint or one that reads the same tokens) and a file of planes of
that checkpoint. Routers are trained on windows of the training text; everything else is measured on held-out prompts.

1. Every level fixed, then the trained routers, then demand drawn at random with the routers' own shares: of each site
   and expert, of each site, and overall; and with their mean bits from the two widths around it. Differences from the
   routers are over the same prompts, with standard errors. Beside them, for scale, demand that knows every error.
2. Ceilings, as a device plan has them: at a few budgets of planes, random ones and those of least predicted cost. The
   prediction is made from the demand on training text and the planes' errors; it is compared with the loss measured.
3. The recorded demand as a trace beside OUT.json, for `placer device`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from placer.core.device.work import clip_levels
from placer.execute.demand import (
    BitRouters,
    drawn_levels,
    full_weights,
    held_out_loss,
    level_weights,
    load_level_model,
    record_demand,
    train_bit_routers,
)
from placer.execute.experts import swiglu
from placer.report.gates import kendall_tau
from traces.device_work import device_work, prefill_batches
from traces.plane_store import load_plane_index
from traces.store import save_trace

WINDOW = 512
DRAWS = 3
BUDGETS = (0.2, 0.4, 0.6, 0.8)
RANDOM_CEILINGS = 3


def main() -> int:
    """Prints what it finds and writes OUT.json, the routers and the trace of their demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("planes", type=Path)
    parser.add_argument("out", type=Path, help="JSON to write; routers and trace go beside it")
    parser.add_argument("--work", type=Path, required=True, help="work folder of examples/small_moe")
    parser.add_argument("--alpha", type=float, default=0.02, help="nats that a bit costs in training (default 0.02)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of 2,048 tokens (default 200)")
    parser.add_argument("--prompts", type=int, default=44, help="held-out prompts (default 44)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_QS, held_out_QS = windows(options)
    index = load_plane_index(options.planes)
    model = load_level_model(options.checkpoint, level_weights(index))
    reference = full_weights(options.checkpoint)
    bits_K = model.weights.bits_K

    begin = time.process_time()
    routers = train_bit_routers(
        model, train_QS, alpha=options.alpha, seed=options.seed, steps=options.steps, progress=progress
    )
    found = {"device": "cpu, one thread", "training": routers.about | {"cpu_s": round(time.process_time() - begin)}}
    routers.save(options.out.with_suffix(".routers.safetensors"))

    full = held_out_loss(load_level_model(options.checkpoint, reference), held_out_QS, 1)
    rows = [("full weights", full, 32.0)]
    for level, bits in enumerate(bits_K, 1):
        rows.append((f"{bits} bits", held_out_loss(model, held_out_QS, level, reference=reference), float(bits)))
    free = held_out_loss(model, held_out_QS, routers.levels_of, reference=reference)
    rows.append(("bit routers", free, free.mean_bits(bits_K)))
    for name, share_LEK in shares(free.count_LEK, bits_K).items():
        for draw in range(DRAWS):
            one = held_out_loss(model, held_out_QS, drawn_levels(share_LEK, options.seed + draw), reference=reference)
            rows.append((f"drawn by {name}", one, one.mean_bits(bits_K)))
    found["loss"] = [row(name, one, bits, free) for name, one, bits in rows]
    worst = worst_first(model.weights, reference, free.count_LEK.sum(axis=1))
    one = held_out_loss(model, held_out_QS, worst, reference=reference)
    found["loss"].append(row("largest error first", one, one.mean_bits(bits_K), free))
    count_LK = free.count_LEK.sum(axis=1)
    found["share_LK"] = (count_LK / count_LK.sum(axis=1, keepdims=True)).round(4).tolist()
    found["chance"] = against_chance(rows, free)
    print(
        table(found["loss"]), f"\nshare of {bits_K} bits by layer: {found['share_LK']}\n{found['chance']}\n", sep="\n"
    )

    trace = record_demand(model, routers, train_QS[: options.prompts].tolist())
    save_trace(trace, options.out.with_suffix(".trace.safetensors"))
    found["ceilings"] = ceilings(model, routers, index, trace, held_out_QS, np.random.default_rng(options.seed))
    for name, part in found["ceilings"].items():
        print(f"ceilings on {name}: " + json.dumps({key: part[key] for key in part if key != "plans"}))
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def windows(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the training stream, as many as training draws, and held-out prompts spread over the domains."""
    with np.load(options.work / "tokens.npz", allow_pickle=False) as kept:
        train_N, prompt_QS = kept["train_N"], kept["prompt_QS"]
    rng = np.random.default_rng(options.seed)
    starts = rng.integers(0, len(train_N) - WINDOW, size=max(options.prompts, 4 * options.steps))
    held_out_Q = np.linspace(0, len(prompt_QS) - 1, options.prompts).astype(int)
    train_QS = np.stack([train_N[start : start + WINDOW] for start in starts])
    return train_QS.astype(np.int64), prompt_QS[held_out_Q].astype(np.int64)


def shares(count_LEK: np.ndarray, bits_K: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Shares of levels, all (L, E, K): the routers' at each site and expert, at each site, and overall.

    The last has the routers' mean bits too, from the two widths around it alone.
    """
    by = {"site and expert": count_LEK, "site": count_LEK.sum(1, keepdims=True)}
    by["nothing"] = count_LEK.sum((0, 1), keepdims=True)
    mean = float(count_LEK.sum((0, 1)) @ np.array(bits_K)) / count_LEK.sum()
    by["nothing, two widths"] = np.maximum(1 - np.abs(np.array(bits_K, dtype=np.float64) - mean), 0)[None, None]
    return {
        name: np.broadcast_to(count / np.maximum(count.sum(-1, keepdims=True), 1), count_LEK.shape)
        for name, count in by.items()
    }


def worst_first(weights, reference, count_LK):
    """Demand that no router can name: at each site the uses that lose most at the lowest level get the highest ones.

    It looks at full weights and at the whole batch. Shares are the routers', site by site.
    """

    def levels_of(site, hidden_TH, expert_TC):
        token_X = torch.arange(expert_TC.numel()) // expert_TC.shape[1]
        error_X = torch.zeros(expert_TC.numel())
        for expert, (full,) in enumerate(reference.expert_LEK[site]):
            use_X = expert_TC.flatten() == expert
            x_XH = hidden_TH[token_X[use_X]]
            off_XH = swiglu(x_XH, weights.expert_LEK[site][expert][0]) - swiglu(x_XH, full)
            error_X[use_X] = off_XH.square().sum(dim=1)
        edge_K = torch.from_numpy(np.cumsum(count_LK[site]) / count_LK[site].sum() * error_X.numel()).round()
        level_X = torch.searchsorted(edge_K, error_X.argsort().argsort().double(), right=True) + 1
        return level_X.clamp(max=len(edge_K)).view_as(expert_TC)

    return levels_of


def row(name, one, bits, free):
    """One line of the table; the difference from the routers over the same prompts and its standard error."""
    off_Q = one.nats_Q - free.nats_Q
    return {
        "demand": name,
        "mean_bits": round(bits, 4),
        "nats_per_token": round(one.nats_per_token, 5),
        "perplexity": round(one.perplexity, 4),
        "above_routers": round(float(off_Q.mean()), 5),
        "standard_error": round(float(off_Q.std(ddof=1)) / len(off_Q) ** 0.5, 5),
        "output_error": None if one.output_error_L is None else round(float(one.output_error_L.mean()), 5),
    }


def against_chance(rows, free):
    """By kind of drawn demand: nats saved by the routers, mean over draws, standard error over prompts."""
    found = {}
    for name in dict.fromkeys(name for name, _, _ in rows if name.startswith("drawn")):
        off_Q = np.mean([one.nats_Q - free.nats_Q for other, one, _ in rows if other == name], axis=0)
        error = np.mean([one.output_error_L.mean() for other, one, _ in rows if other == name])
        found[name] = {
            "nats_saved": round(float(off_Q.mean()), 5),
            "standard_error": round(float(off_Q.std(ddof=1)) / len(off_Q) ** 0.5, 5),
            "prompts_won": round(float((off_Q > 0).mean()), 3),
            "output_error_saved": round(float(1 - free.output_error_L.mean() / error), 4),
        }
    return found


def table(rows):
    """The losses as text."""
    head = f"{'demand':30s} {'bits':>6s} {'nats':>8s} {'ppl':>8s} {'above routers':>20s} {'output error':>12s}"
    lines = [
        f"{one['demand']:30s} {one['mean_bits']:6.3f} {one['nats_per_token']:8.4f} {one['perplexity']:8.3f} "
        f"{one['above_routers']:+11.5f} +-{one['standard_error']:.5f} {one['output_error'] or 0:12.5f}"
        for one in rows
    ]
    return "\n".join([head, *lines])


def ceilings(model, routers: BitRouters, index, trace, held_out_QS, rng):
    """Predicted against measured cost of ceilings, for demand of the highest level and of the routers."""
    batches = prefill_batches(trace, trace.num_tokens)
    found = {}
    for name, demand, level in (
        ("the highest level", index.ladder.levels, index.ladder.levels),
        ("bit routers", routers.levels_of, None),
    ):
        count_LEK = device_work(trace, batches, index.ladder, level=level).count_BLEK.sum(axis=0)
        free = held_out_loss(model, held_out_QS, demand)
        plans = []
        for budget in BUDGETS:
            kinds = [("random", random_ceilings(index.shape_LEK, budget, rng)) for _ in range(RANDOM_CEILINGS)]
            kinds.append(("planned", planned_ceilings(count_LEK, index.error_LEK, budget)))
            for kind, ceiling_LE in kinds:
                one = held_out_loss(model, held_out_QS, demand, ceiling_LE=ceiling_LE)
                off_Q = one.nats_Q - free.nats_Q
                plans.append(
                    {
                        "kind": kind,
                        "budget": budget,
                        "predicted": round(predicted_cost(count_LEK, ceiling_LE, index.error_LEK), 6),
                        "nats_lost": round(float(off_Q.mean()), 6),
                        "standard_error": round(float(off_Q.std(ddof=1)) / len(off_Q) ** 0.5, 6),
                    }
                )
        predicted, measured = (np.array([plan[key] for plan in plans]) for key in ("predicted", "nats_lost"))
        slope = float(predicted @ measured / max(predicted @ predicted, 1e-300))
        found[name] = {
            "kendall_tau": round(kendall_tau(predicted.tolist(), measured.tolist()), 3),
            "nats_for_a_unit_of_error": round(slope, 4),
            "median_error_of_the_line": round(
                float(np.median(np.abs(slope * predicted - measured) / np.maximum(np.abs(measured), 1e-9))), 3
            ),
            "nats_lost_by_budget": {
                str(budget): {
                    kind: round(
                        float(np.mean([p["nats_lost"] for p in plans if (p["kind"], p["budget"]) == (kind, budget)])), 5
                    )
                    for kind in ("random", "planned")
                }
                for budget in BUDGETS
            },
            "plans": plans,
        }
    return found


def predicted_cost(count_LEK, ceiling_LE, error_LEK) -> float:
    """The device plan's quality cost: mean over uses of the error at the ceiling less the error demanded."""
    moved_LEK = clip_levels(count_LEK, ceiling_LE) - count_LEK
    return float((moved_LEK * error_LEK).sum() / count_LEK.sum())


def random_ceilings(shape_LEK, budget, rng):
    """Ceilings with this share of the planes above the lowest, spread at random."""
    sites, experts, levels = shape_LEK
    ceiling_X = np.ones(sites * experts, dtype=np.int64)
    for _ in range(round(budget * len(ceiling_X) * (levels - 1))):
        ceiling_X[rng.choice(np.flatnonzero(ceiling_X < levels))] += 1
    return ceiling_X.reshape(sites, experts)


def planned_ceilings(count_LEK, error_LEK, budget):
    """Ceilings with that share of planes, each plane given where it lowers the predicted cost most."""
    levels = count_LEK.shape[2]
    loss_LEK = np.stack(
        [
            (count_LEK[..., level:] * (error_LEK[..., level, None] - error_LEK[..., level:])).sum(-1)
            for level in range(levels)
        ],
        axis=-1,
    )
    ceiling_LE = np.ones(count_LEK.shape[:2], dtype=np.int64)
    for _ in range(round(budget * ceiling_LE.size * (levels - 1))):
        here_LE = np.take_along_axis(loss_LEK, ceiling_LE[..., None] - 1, 2)[..., 0]
        after_LE = np.take_along_axis(loss_LEK, np.minimum(ceiling_LE, levels - 1)[..., None], 2)[..., 0]
        gain_LE = np.where(ceiling_LE < levels, here_LE - after_LE, -np.inf)
        ceiling_LE[np.unravel_index(gain_LE.argmax(), gain_LE.shape)] += 1
    return ceiling_LE


def progress(done: int, total: int) -> None:
    """Tells where training is."""
    print(f"step {done} of {total}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
