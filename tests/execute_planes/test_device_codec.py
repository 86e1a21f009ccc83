"""QMoE's codec: rates of the authors' dictionary, a coder that writes real codewords, bytes, bad input."""

import numpy as np
import pytest

from placer.core.device import codec
from placer.core.device.codec import TernaryCodec, bits_per_weight, entropy_bits
from placer.core.device.ladder import expert_shapes
from placer.core.errors import UsageError


@pytest.mark.parametrize(("zeros", "rate"), [(0.8, 1.119), (0.885, 0.735), (0.9, 0.688), (0.95, 0.591)])
def test_rates_are_those_of_the_papers_dictionary(zeros, rate) -> None:
    assert bits_per_weight(zeros) == pytest.approx(rate, abs=0.004)


@pytest.mark.parametrize("zeros", [0.6, 0.885, 0.97])
def test_a_greedy_coder_needs_as_many_codewords(zeros) -> None:
    tree = codec._dictionary()
    child = {}
    for node in range(codec.CODEWORDS):
        child[int(tree.parent_W[node]), int(tree.pair_W[node])] = node
    weights = np.random.default_rng(5).choice(3, size=400_000, p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2])
    codewords, node = 0, -1
    for pair in (weights[0::2] * 3 + weights[1::2]).tolist():
        longer = child.get((node, pair))
        if longer is None:
            codewords, node = codewords + 1, child[-1, pair]
        else:
            node = longer
    assert 16 * (codewords + 1) / len(weights) == pytest.approx(bits_per_weight(zeros), rel=0.01)


def test_the_rate_is_above_entropy_and_falls_with_zeros() -> None:
    rates = [bits_per_weight(zeros) for zeros in np.linspace(1 / 3, 1, 30)]
    assert rates == sorted(rates, reverse=True)
    assert all(rate >= entropy_bits(zeros) for rate, zeros in zip(rates, np.linspace(1 / 3, 1, 30), strict=True))
    assert rates[-1] == pytest.approx(16 / 28)


def test_bytes_and_levels() -> None:
    ternary, shapes = TernaryCodec(zero_share=0.9), expert_shapes(1024, 512)
    weights, rows = 3 * 1024 * 512, 2 * 512 + 1024
    assert ternary.plane_bytes_K(shapes)[0] == pytest.approx(weights * bits_per_weight(0.9) / 8 + rows * 8, abs=1)
    assert ternary.level_bytes(shapes, 1) == ternary.plane_bytes_K(shapes)[0]
    assert ternary.level_bytes(shapes, 0) == 0
    assert (ternary.levels, ternary.nested) == (1, False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"zero_share": 1.5}, "zero_share"),
        ({"zero_share": "a"}, "zero_share"),
        ({"decode_factor": 0.5}, "decode_factor"),
    ],
)
def test_bad_codecs_are_one_line(fields, name) -> None:
    with pytest.raises(UsageError, match=f"codec.{name} is .*; give a number") as caught:
        TernaryCodec(**{"zero_share": 0.9, **fields})
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="level 2"):
        TernaryCodec(zero_share=0.9).planes_of(2)
