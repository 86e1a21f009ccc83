"""The measured half of "predict and measure": a plan's dispatch, experts and combine on real ranks.

    replay_plans -> run_ranks -> torchrun -> worker, one per rank -> dispatch, grouped_ffn, combine -> Timeline

Importing this package does not import torch; without torch, `replay` raises DependencyError.
"""

from placer.execute.job import ReplayJob
from placer.execute.launch import run_ranks
from placer.execute.measure import replay, replay_plans, replayed_model
from placer.execute.random_experts import write_random_experts

__all__ = ["ReplayJob", "replay", "replay_plans", "replayed_model", "run_ranks", "write_random_experts"]
