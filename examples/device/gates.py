"""Predicted against measured on one machine with a real disk: D2MoE's steps, budgets, caches, batches, and disk speeds.

    python examples/device/gates.py PLANES COPIES TRACE OUT.json [--limits 40 80 none] [--batches 4 16] [--rounds 3]

PLANES are nested, COPIES whole copies of the same experts (`placer device quantize`, with --copies). The trace has bits, or
demand is drawn with D2MoE's capacities. Plans know one half of the requests, the other half runs. For each bandwidth
limit the machine is calibrated, everything is predicted, and only then measured: all policies in each round, in random
order. OUT is written after every group; groups that it has are kept, so a run that was stopped goes on.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from policies import Halves, Policy, halves_of, policies_of
from rich.console import Console

from placer.core.atomic import write_text_atomically
from placer.core.device.spec import DeviceSpec
from placer.core.timeline import Timeline
from placer.execute.device import calibrate_device, run_device
from placer.pipeline import open_trace
from placer.report.gates import GateRow, GateVerdict, gate_tables, judge_gates
from placer.report.tables import render
from sim.device import simulate_device
from traces.plane_store import load_plane_index


def mean_us(timeline: Timeline) -> float:
    """Mean iteration."""
    return float(timeline.iteration_ns().mean()) / 1e3


def row_of(group: str, policy: Policy, measured: list[Timeline], predicted: Timeline, first: list[Timeline]) -> dict:
    """A gate's row, and what the operating system saw."""
    times = [mean_us(timeline) for timeline in measured]
    ratios = [mean_us(base) / mean_us(timeline) for base, timeline in zip(first, measured, strict=True)]
    row = GateRow(
        group=group,
        name=policy.name,
        placement=policy.name,
        mode="device",
        homes="",
        measured_us=float(np.median(times)),
        measured_low_us=min(times),
        measured_high_us=max(times),
        predicted_us=mean_us(predicted),
        ratio=float(np.median(ratios)),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        predicted_ratio=policy.first_predicted_us / mean_us(predicted),
    )
    about = measured[0].about
    seen = {key: about[key] for key in SEEN if key in about}
    return asdict(row) | {"tokens": int(policy.work.tokens_B.sum()), "about": seen}


SEEN = (
    "read_mode",
    "asked_bytes",
    "block_bytes",
    "disk_read_bytes",
    "peak_plane_bytes",
    "rss_before_bytes",
    "peak_rss_bytes",
)
