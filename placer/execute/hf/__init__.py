"""A Hugging Face model served expert-parallel: its own attention on every rank, its experts where the plan puts them.

    generate_tokens -> run_ranks -> torchrun -> hf.worker, one per rank -> load_backbone, RankBatch, DistributedExperts

Importing this package imports neither torch nor transformers; without them `generate_tokens` raises DependencyError.
"""

from placer.execute.hf.architectures import ARCHITECTURES, check_model, plain_greedy, require_transformers
from placer.execute.hf.job import GENERATION_MODES, GenerateJob
from placer.execute.hf.measure import generate_tokens
from placer.execute.hf.schedules import unpipelined
from placer.execute.hf.tokens import decode, encode

__all__ = [
    "ARCHITECTURES",
    "GENERATION_MODES",
    "GenerateJob",
    "check_model",
    "decode",
    "encode",
    "generate_tokens",
    "plain_greedy",
    "require_transformers",
    "unpipelined",
]
