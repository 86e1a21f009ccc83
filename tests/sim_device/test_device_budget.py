"""More memory usually helps, but that is no theorem: where it fails, by hand."""

from typing import Any

import numpy as np
import pytest
from device_sim_cases import device_of, plan_of, spans_of, work_of

from placer.core.device.ladder import BitLadder

TWO = BitLadder(bits_K=(2, 3))
FIDELITIES = pytest.mark.parametrize("fidelity", ["port", "flow"])


def end_ns(plan: Any, work: Any, device: Any, fidelity: Any) -> int:
    return int(spans_of(plan, work, device, fidelity=fidelity)[0]["end_ns"].max())


@FIDELITIES
def test_a_larger_cache_may_be_slower(fidelity: Any) -> None:
    """Expert 1 at level 2, expert 0 at level 1, expert 1 again; a base plane has 2000 bytes, a residual plane 1000.

    In 1000 bytes no base plane fits, so expert 1's residual plane stays for the third iteration. 2000 bytes take its
    base plane instead, which expert 0's then drives out: nothing is there the third time.
    """
    work = work_of([[[[0, 0], [0, 1]]], [[[1, 0], [0, 0]]], [[[0, 0], [0, 1]]]])
    plans = [plan_of(work, TWO, cache="lru", cache_bytes=size) for size in (1000, 2000, 5000)]
    residual = device_of().read_ns(1000)
    small, larger, large = (end_ns(plan, work, device_of(), fidelity) for plan in plans)
    assert larger == small + residual
    assert large < small


@FIDELITIES
def test_a_larger_buffer_may_be_slower(fidelity: Any) -> None:
    """HEBF wants base planes first. 4000 bytes are too few for that: expert 0 is read whole, then expert 1 whole.

    In 5000 bytes expert 1 may come in between, and then there is no room for the rest of expert 0 until it is done.
    """
    work = work_of([[[[1, 0, 1], [1, 1, 0]]]])
    tight, larger, large = (
        end_ns(plan_of(work, buffer_bytes=size), work, device_of(read_us=3.0), fidelity) for size in (4000, 5000, 8000)
    )
    assert tight < larger
    assert large <= tight


@FIDELITIES
def test_more_resident_planes_never_cost_time_by_id_with_room(fidelity: Any) -> None:
    """What holds: in an order that residence does not change, without a limit, every read that falls away helps."""
    rng = np.random.default_rng(3)
    work = work_of(rng.integers(0, 3, (2, 2, 3, 3)))
    resident_LE, ends = np.zeros((2, 3), dtype=np.int64), []
    for site, expert in [(0, 0), (1, 2), (0, 0), (0, 1), (1, 2), (0, 0), (1, 1)]:
        ends.append(end_ns(plan_of(work, order="by_id", resident_LE=resident_LE.copy()), work, device_of(), fidelity))
        resident_LE[site, expert] += 1
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > ends[-1]
