"""The serving loop is tested on the simulator's own random deployments as well."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "sim"))
