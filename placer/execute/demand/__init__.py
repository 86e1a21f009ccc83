"""Dual routing: bit routers that say at which level a token uses an expert, trained, recorded and judged on text.

planes --level_weights, load_level_model--> model --train_bit_routers--> BitRouters --record_demand--> RoutingTrace
"""

from placer.execute.demand.levels import LevelsOf, LevelWeights, full_weights, level_weights
from placer.execute.demand.model import LevelModel, load_level_model
from placer.execute.demand.quality import HeldOut, drawn_levels, held_out_loss
from placer.execute.demand.recording import record_demand
from placer.execute.demand.routers import BitRouters
from placer.execute.demand.training import CAPACITIES, train_bit_routers

__all__ = [
    "CAPACITIES",
    "BitRouters",
    "HeldOut",
    "LevelModel",
    "LevelWeights",
    "LevelsOf",
    "drawn_levels",
    "full_weights",
    "held_out_loss",
    "level_weights",
    "load_level_model",
    "record_demand",
    "train_bit_routers",
]
