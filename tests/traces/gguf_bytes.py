"""GGUF bytes written from its description, for the reader's tests."""

import struct

import numpy as np

TYPES = {bool: 7, int: 4, float: 6, str: 8}


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def plain(value):
    if isinstance(value, str):
        return text(value)
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def value_of(value):
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, TYPES[type(value[0])], len(value)) + b"".join(map(plain, value))
    return struct.pack("<I", TYPES[type(value)]) + plain(value)


def gguf(values, tensors, *, version=3, alignment=32):
    """A file of values and tensors: float32 arrays (numpy's axis order), or (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(text(name) + value_of(value) for name, value in values.items())
    body = b""
    for name, tensor in tensors.items():
        kind, shape, raw = tensor if isinstance(tensor, tuple) else (0, tensor.shape, tensor.astype("<f4").tobytes())
        dimensions = shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, len(body))
        body += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + body


def imatrix(load_of_layer, *, matrices=("gate", "up", "down"), **rest):
    """What llama-imatrix writes: sums of squares and counts for every weight; dense weights have one count."""
    tensors = {"blk.0.attn_q.weight.counts": np.array([[7.0]]), "blk.0.attn_q.weight.in_sum2": np.ones((1, 5))}
    for layer, load_E in load_of_layer.items():
        for matrix in matrices:
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            tensors[f"{name}.in_sum2"] = np.ones((len(load_E), 3))
            tensors[f"{name}.counts"] = np.asarray(load_E, dtype=np.float64)[:, None]
    values = {"general.type": "imatrix", "imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 4}
    return gguf({**values, **rest.pop("values", {})}, {**tensors, **rest.pop("tensors", {})}, **rest)
