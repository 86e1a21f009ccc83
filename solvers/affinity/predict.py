"""Where requests that are still to come will touch: from their first tokens, or from what requests of their kind did.

Both give a rate per token and rank, times the tokens of the request; only rates of one request compare its ranks, the
tokens say how much it matters.

Legend: Q requests, R ranks.
"""

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["touch_from_prefix", "touch_from_tag"]

FloatArray = npt.NDArray[np.float64]


def touch_from_prefix(
    seen_QR: npt.NDArray[np.number], seen_Q: npt.NDArray[np.integer], tokens_Q: npt.NDArray[np.integer]
) -> FloatArray:
    """Predicted touches of each request, (Q, R), from those of its first `seen_Q` tokens over all layers, `seen_QR`."""
    result: FloatArray = seen_QR * (tokens_Q / np.maximum(1, seen_Q))[:, None]
    return result


def touch_from_tag(
    touch_QR: npt.NDArray[np.number],
    tokens_Q: npt.NDArray[np.integer],
    tag_Q: npt.NDArray[np.integer],
    new_tag_Q: npt.NDArray[np.integer],
    new_tokens_Q: npt.NDArray[np.integer],
) -> FloatArray:
    """Predicted touches of new requests, (new Q, R): the mean rate of the known requests of their tag.

    A tag that no known token has is predicted by the mean over all. Raises UsageError for a negative tag.
    """
    if min(int(tag_Q.min(initial=0)), int(new_tag_Q.min(initial=0))) < 0:
        raise UsageError("tag_Q has an entry below 0; tags count from 0")
    tags = 1 + max(int(tag_Q.max(initial=0)), int(new_tag_Q.max(initial=0)))
    sum_GR = np.zeros((tags, touch_QR.shape[1]))
    np.add.at(sum_GR, tag_Q, touch_QR)
    tokens_G = np.bincount(tag_Q, weights=tokens_Q, minlength=tags)
    overall_R = touch_QR.sum(axis=0) / max(1, int(tokens_Q.sum()))
    rate_GR = np.where(tokens_G[:, None] > 0, sum_GR / np.maximum(1, tokens_G)[:, None], overall_R)
    result: FloatArray = rate_GR[new_tag_Q] * new_tokens_Q[:, None]
    return result
