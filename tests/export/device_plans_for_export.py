"""Device plans and plane files for the exporters' tests, written without placer's own packing."""

import numpy as np
from hypothesis import strategies as st

from placer.core.device.ladder import BitLadder, expert_shapes
from placer.core.device.plan import DevicePlan
from traces.plane_store import PlaneFileHeader, save_planes

SHAPES = expert_shapes(20, 9)


def device_plan(*, seed=0, layers=(1, 3), hidden=5, experts=4, nested=True, shapes=SHAPES, **fields):
    """A random plan; its memory holds what is resident and `spare` bytes."""
    rng = np.random.default_rng(seed)
    ladder = BitLadder(bits_K=(2, 3, 4), group_size=8, nested=nested)
    resident_LE = rng.integers(0, 4, (len(layers), experts))
    return DevicePlan(
        model="tiny",
        num_hidden_layers=hidden,
        moe_layers=layers,
        num_experts=experts,
        ladder=ladder,
        plane_bytes_K=ladder.plane_bytes_K(shapes),
        resident_LE=fields.pop("resident_LE", resident_LE),
        ceiling_LE=fields.pop("ceiling_LE", np.maximum(resident_LE, rng.integers(1, 4, resident_LE.shape))),
        memory_bytes=fields.pop("memory_bytes", 0),
        **fields,
    )


@st.composite
def device_plans(draw):
    """Plans of any shape, from nothing resident to everything."""
    hidden = draw(st.integers(1, 6))
    layers = tuple(sorted(draw(st.sets(st.integers(0, hidden - 1), min_size=1))))
    experts = draw(st.integers(1, 9))
    resident = draw(st.sampled_from(["some", "none", "all"]))
    fields = {"memory_bytes": draw(st.integers(0, 60000))}
    if resident != "some":
        fields["resident_LE"] = np.full((len(layers), experts), 0 if resident == "none" else 3)
        fields["ceiling_LE"] = np.full((len(layers), experts), 3)
    return device_plan(
        seed=draw(st.integers(0, 2**32 - 1)),
        layers=layers,
        hidden=hidden,
        experts=experts,
        nested=draw(st.booleans()),
        **fields,
    )


def packed(code_RC, width):
    """Codes row by row, least significant bit first, each row filled up to a whole byte."""
    bits = (code_RC[:, :, None] >> np.arange(width)) & 1
    return np.packbits(bits.reshape(len(code_RC), -1).astype(np.uint8), axis=1, bitorder="little").tobytes()


def plane_file(path, plan, seed=0, shapes=SHAPES):
    """Random planes for a plan, and the weights that each (site, expert, level) has, matrix by matrix."""
    rng = np.random.default_rng(seed)
    group, nested = plan.ladder.group_size, plan.ladder.nested
    weights, pieces = {}, []
    for site, expert in np.ndindex(plan.resident_LE.shape):
        sums = [0.0] * len(shapes)
        for plane, bits in enumerate(plan.ladder.bits_K):
            base = plane == 0 or not nested
            width = bits if base else 1
            raw = b""
            for at, (rows, columns) in enumerate(shapes):
                code_RC = rng.integers(0, 2**width, (rows, columns))
                scale_RG, offset_RG = rng.random((2, rows, -(-columns // group))).astype("<f2")
                raw += packed(code_RC, width) + scale_RG.tobytes() + (offset_RG.tobytes() if base else b"")
                scale_RC, offset_RC = (
                    np.repeat(table.astype(np.float64), group, axis=1)[:, :columns] for table in (scale_RG, offset_RG)
                )
                part = offset_RC + scale_RC * code_RC if base else scale_RC * (2 * code_RC - 1)
                sums[at] = part if base else sums[at] + part
            weights[site, expert, plane + 1] = [np.array(one) for one in sums]
            pieces.append((site, expert, plane, np.frombuffer(raw, dtype=np.uint8)))
    header = PlaneFileHeader(
        model=plan.model,
        num_hidden_layers=plan.num_hidden_layers,
        moe_layers=plan.moe_layers,
        num_experts=plan.num_experts,
        ladder=plan.ladder,
        shapes=shapes,
        about={},
    )
    order = rng.permutation(len(pieces))
    return save_planes(path, header, (pieces[i] for i in order)), weights
