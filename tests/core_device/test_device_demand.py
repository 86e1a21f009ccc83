"""DeviceWork: shapes, clipping to ceilings token by token, and which tokens use a plane."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.work import DeviceWork, clip_levels, tokens_on_planes
from placer.core.errors import MismatchError, UsageError


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), levels=st.integers(1, 4))
def test_clipping_moves_each_token_down_to_its_experts_ceiling(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    count_BLEK = rng.integers(0, 4, (2, 3, 4, levels))
    ceiling_LE = rng.integers(1, levels + 1, (3, 4))
    expected = np.zeros_like(count_BLEK)
    for b, site, e, k in np.ndindex(count_BLEK.shape):
        for _ in range(count_BLEK[b, site, e, k]):
            expected[b, site, e, min(k, ceiling_LE[site, e] - 1)] += 1
    np.testing.assert_array_equal(clip_levels(count_BLEK, ceiling_LE), expected)
    work = DeviceWork(tokens_B=np.array([5, 6]), count_BLEK=count_BLEK, predicted_BLEK=count_BLEK[::-1])
    clipped = work.clipped(ceiling_LE)
    np.testing.assert_array_equal(clipped.count_BLEK, expected)
    assert clipped.predicted_BLEK is not None
    np.testing.assert_array_equal(clipped.predicted_BLEK, expected[::-1])
    assert clipped.num_iterations == 2
    np.testing.assert_array_equal(work.clipped(np.full((3, 4), levels)).count_BLEK, count_BLEK)


def test_a_nested_plane_is_used_by_every_token_at_its_level_or_above() -> None:
    count_EK = np.array([[1, 2, 3], [0, 0, 5]])
    assert tokens_on_planes(count_EK, nested=True).tolist() == [[6, 5, 3], [5, 5, 5]]
    assert tokens_on_planes(count_EK, nested=False).tolist() == count_EK.tolist()


def test_wrong_shapes_and_negative_counts_are_refused() -> None:
    count_BLEK = np.zeros((2, 3, 4, 3), dtype=np.int64)
    with pytest.raises(UsageError, match="for 1 iterations"):
        DeviceWork(tokens_B=np.array([1]), count_BLEK=count_BLEK)
    with pytest.raises(UsageError, match="predicted_BLEK is"):
        DeviceWork(tokens_B=np.array([1, 1]), count_BLEK=count_BLEK, predicted_BLEK=count_BLEK[:1])
    for name in ("tokens_B", "count_BLEK", "predicted_BLEK"):
        fields = {"tokens_B": np.array([1, 1]), "count_BLEK": count_BLEK, "predicted_BLEK": count_BLEK}
        with pytest.raises(UsageError, match=f"work.{name} has -1"):
            DeviceWork(**{**fields, name: 0 * fields[name] - 1})
    work = DeviceWork(tokens_B=np.array([1, 1]), count_BLEK=count_BLEK)
    with pytest.raises(MismatchError, match="ceilings for"):
        work.clipped(np.ones((3, 5), dtype=np.int64))
