"""Writes a file of random planes, as large and as shaped as a real one, to try a machine with."""

import argparse
from pathlib import Path

from placer.core.device.ladder import LADDERS, BitLadder, expert_shapes
from placer.execute.device.random_planes import write_random_planes


def main() -> None:
    """python examples/device/make_planes.py planes.safetensors --layers 4 --experts 8 --hidden 512 --inner 1024"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    for name, value in (("layers", 4), ("experts", 8), ("hidden", 512), ("inner", 1024), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ladder", choices=sorted(LADDERS), default="v1")
    parser.add_argument("--copies", action="store_true", help="whole copies instead of nested planes")
    given = parser.parse_args()
    ladder = BitLadder(bits_K=LADDERS[given.ladder].bits_K, nested=not given.copies)
    shapes = expert_shapes(given.hidden, given.inner)
    index = write_random_planes(given.path, given.layers, given.experts, ladder, shapes, given.seed)
    print(f"{index.path}: planes of {index.plane_bytes_K} bytes, {index.total_bytes} together")


if __name__ == "__main__":
    main()
