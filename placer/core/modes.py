"""Names of the dispatch modes and of the engines' replica choices: how tokens travel."""

from typing import Literal, get_args

__all__ = ["DISPATCH_MODES", "REPLICA_CHOICES", "DispatchMode", "ReplicaChoice"]

DispatchMode = Literal["per_expert", "per_rank", "per_node", "coherent", "allgather"]
"""per_expert: one copy per chosen expert (DeepEP low-latency). per_rank: one copy per rank touched (DeepEP normal).
per_node: one copy per node, forwarded inside. coherent: the token stays where its expert was (ExFlow).
allgather: every token to every rank (no token all-to-all; placement can gain balance only)."""

ReplicaChoice = Literal["visit_first", "nearest", "local_or_uniform", "token_hash", "fixed_source", "round_robin"]
"""Which replica of an expert serves a token. visit_first: ours. nearest: SGLang static. local_or_uniform: SGLang
dynamic. token_hash: vLLM. fixed_source: vllm-ascend. round_robin: TensorRT-LLM."""

DISPATCH_MODES: tuple[DispatchMode, ...] = get_args(DispatchMode)
REPLICA_CHOICES: tuple[ReplicaChoice, ...] = get_args(ReplicaChoice)
