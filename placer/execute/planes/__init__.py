"""Weights of experts as bit planes: packed, unpacked, quantised from a checkpoint, measured.

checkpoint --quantize_model--> file of planes --expert_weights--> ExpertWeights --perplexity--> nats
"""

from placer.execute.planes.packing import PlaneMatrix, pack_plane, unpack_plane
from placer.execute.planes.perplexity import Perplexity, WeightsOf, perplexity, plane_weights
from placer.execute.planes.quantize import METHODS, Method, quantize_matrices, quantize_model
from placer.execute.planes.weights import expert_weights

__all__ = [
    "METHODS",
    "Method",
    "Perplexity",
    "PlaneMatrix",
    "WeightsOf",
    "expert_weights",
    "pack_plane",
    "perplexity",
    "plane_weights",
    "quantize_matrices",
    "quantize_model",
    "unpack_plane",
]
