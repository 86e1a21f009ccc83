"""Weights of experts as bit planes: packed, unpacked, quantised from a checkpoint, measured.

checkpoint --quantize_model--> file of planes --expert_weights--> ExpertWeights
"""

from placer.execute.planes.packing import PlaneMatrix, pack_plane, unpack_plane
from placer.execute.planes.weights import expert_weights

__all__ = ["PlaneMatrix", "expert_weights", "pack_plane", "unpack_plane"]
