"""What a router module returned, read without importing torch: through the tensors' own methods.

Legend: T tokens, K top-k.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["describe", "extract_choice", "past_length", "to_numpy", "weights_of"]


def extract_choice(output: Any) -> tuple[Any, Any]:
    """(weights or None, indices or None) of a router's output tuple, such as (logits, weights, indices)."""
    if not isinstance(output, tuple):
        return None, None
    tensors = [item for item in output if hasattr(item, "dtype") and len(item.shape) >= 2]
    indices = [item for item in tensors if _is_integer(item)]
    if len(indices) != 1:
        return None, None
    chosen = indices[0]
    reals = [item for item in tensors if not _is_integer(item)]
    same = [item for item in reals if tuple(item.shape) == tuple(chosen.shape)]
    # the logits come first where both have one column per expert
    return (same or reals or [None])[-1], chosen


def weights_of(weights: Any, ids: npt.NDArray[Any], mask_T: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16] | None:
    """Router weights of the chosen ids; a row of weights for every expert is read at them."""
    if weights is None:
        return None
    values = to_numpy(weights.float() if hasattr(weights, "float") else weights)
    values = values.reshape(-1, values.shape[-1])
    if len(values) != len(ids):
        return None
    if values.shape != ids.shape:
        if int(ids.max(initial=0)) >= values.shape[1]:
            return None
        values = np.take_along_axis(values, np.maximum(ids, 0).astype(np.int64), axis=1)
    return np.where(ids < 0, 0, values)[mask_T].astype(np.float16)


def _is_integer(tensor: Any) -> bool:
    return "int" in str(tensor.dtype)


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """The tensor as an array in main memory."""
    for step in ("detach", "cpu"):
        tensor = getattr(tensor, step)() if hasattr(tensor, step) else tensor
    return np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)


def past_length(past: Any) -> int:
    """Tokens that a cache of keys and values already holds, in any of its forms."""
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        return int(past.get_seq_length())
    return int(past[0][0].shape[-2]) if len(past) else 0


def describe(output: Any) -> str:
    """Types and shapes of an output, for a message."""
    items = output if isinstance(output, tuple) else (output,)
    return ", ".join(
        f"{item.dtype} {tuple(item.shape)}" if hasattr(item, "shape") else type(item).__name__ for item in items
    )
