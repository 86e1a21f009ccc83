"""Small plane files, plans and work for them, and the layers computed in memory: what runs are compared with.

Legend: L sites, E experts, K levels, B iterations, T tokens, H hidden size.
"""

from functools import cache

import numpy as np
import torch

from placer.core.cluster import LinkClass
from placer.core.device.ladder import BitLadder, expert_shapes
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.device.work import DeviceWork
from placer.execute.device.loop import AttentionBlock
from placer.execute.device.random_planes import write_random_planes
from placer.execute.device.rows import assigned
from placer.execute.planes import expert_weights
from placer.execute.reference import hidden_states, moe_layer

LAYERS, EXPERTS, HIDDEN, INNER = 3, 5, 48, 40
BITS = (2, 3, 4)


def write_planes(path, *, nested=True, layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, inner=INNER, seed=0):
    ladder = BitLadder(bits_K=BITS, group_size=32, nested=nested)
    return write_random_planes(path, layers, experts, ladder, expert_shapes(hidden, inner), seed)


def make_device(**fields):
    compute = DeviceCompute(layer_us=10, base_us=20, residual_us=10, ffn_tokens=(1, 8), ffn_us=(10, 20))
    values = {
        "name": "test",
        "memory_mib": 4096,
        "disk": LinkClass(gbytes_per_s=1, alpha_us=50),
        "compute": compute,
    }
    return DeviceSpec(**values | fields)


def make_device_plan(index, *, buffer_experts=1.0, cache_experts=0.0, resident=0, **fields):
    layers, experts, levels = index.shape_LEK
    whole = sum(index.plane_bytes_K)
    values = {
        "model": index.model,
        "num_hidden_layers": index.num_hidden_layers,
        "moe_layers": index.moe_layers,
        "num_experts": experts,
        "ladder": index.ladder,
        "plane_bytes_K": index.plane_bytes_K,
        "resident_LE": np.broadcast_to(np.asarray(resident), (layers, experts)).copy(),
        "ceiling_LE": np.full((layers, experts), levels),
        "buffer_bytes": int(buffer_experts * whole),
        "cache_bytes": int(cache_experts * whole),
        "memory_bytes": 1 << 40,
        "hashes": {"planes": index.sha256},
    }
    return DevicePlan(**values | fields)


def make_work(index, *, iterations=3, tokens=6, top_k=2, seed=0, predicted=None):
    """Every token chooses `top_k` experts and a level for each; predicted: None, "right" or "wrong"."""
    rng = np.random.default_rng(seed)
    layers, experts, levels = index.shape_LEK

    def counts():
        count_BLEK = np.zeros((iterations, layers, experts, levels), dtype=np.int64)
        for at in np.ndindex(iterations, layers, tokens):
            for expert in rng.choice(experts, top_k, replace=False):
                count_BLEK[at[0], at[1], expert, rng.integers(levels)] += 1
        return count_BLEK

    count_BLEK = counts()
    predicted_BLEK = {None: None, "right": count_BLEK, "wrong": counts()}[predicted]
    return DeviceWork(tokens_B=np.full(iterations, tokens), count_BLEK=count_BLEK, predicted_BLEK=predicted_BLEK)


def weights_in_memory(index):
    """load(site, expert, level): the weights that the file's planes stand for, read without the runner's code."""
    raw = index.path.read_bytes()

    @cache
    def load(site, expert, level):
        planes = []
        for plane in index.ladder.planes_of(level):
            first = int(index.offset_LEK[site, expert, plane])
            part = bytearray(raw[first : first + index.plane_bytes_K[plane]])
            planes.append(torch.frombuffer(part, dtype=torch.uint8))
        return expert_weights(planes, index.ladder, index.shapes)

    return load


def layer_in_memory(load, site, levels, x_TH, expert_TK, level_TK, weight_TK):
    """One layer by the executor's reference: every (expert, level) is an expert of its own."""
    virtual_TK = torch.from_numpy(np.where(expert_TK >= 0, expert_TK * levels + level_TK - 1, -1))
    return moe_layer(x_TH, virtual_TK, weight_TK, lambda at: load(site, at // levels, at % levels + 1))


def replay_in_memory(index, work, plan, seed, iteration):
    """The last residual stream of one iteration, (T, H)."""
    load, levels = weights_in_memory(index), index.ladder.levels
    tokens = int(work.tokens_B[iteration])
    block = AttentionBlock(index.shapes[0][1], seed)
    residual_TH = torch.from_numpy(hidden_states(seed + iteration, np.arange(tokens), index.shapes[0][1]))
    for site, count_EK in enumerate(work.clipped(plan.ceiling_LE).count_BLEK[iteration]):
        expert_TK, level_TK = assigned(count_EK, tokens)
        weight_TK = torch.where(torch.from_numpy(expert_TK) >= 0, 1.0 / expert_TK.shape[1], 0.0)
        residual_TH, x_TH = block(residual_TH)
        residual_TH = residual_TH + layer_in_memory(load, site, levels, x_TH, expert_TK, level_TK, weight_TK)
    return residual_TH
