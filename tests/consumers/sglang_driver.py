"""Runs SGLang's own reader of --init-expert-location on this CPU. Request and answer are JSON.

The package's __init__ imports half the serving stack; an empty module with the package's path stands in for it, so only
the modules that the reader needs are executed. The accessors of the running server's settings are replaced.

Request {"cases": [{"file", "num_layers", "num_experts", "redundant", "ep_size", "nodes", "dispatch", "check"}]}. Answer
{"cases": [{"ranks": [...]} or {"error": class}]}: per rank the whole map as SGLang holds it, the number of (layer,
expert) pairs whose candidates are not slots of that expert, and the number that static dispatch sends to a slot of
another expert or away from a replica on the rank itself. With "check" false only whether rank 0 accepts the file.
"""

import importlib.metadata
import json
import sys
import types
from types import SimpleNamespace
from typing import Any

sys.dont_write_bytecode = True


def reader() -> Any:
    package = types.ModuleType("sglang")
    package.__path__ = [str(importlib.metadata.distribution("sglang").locate_file("sglang"))]
    sys.modules["sglang"] = package
    import sglang.srt.eplb.expert_location as module

    return module


def load(module: Any, case: dict[str, Any], rank: int) -> Any:
    moe = SimpleNamespace(
        init_expert_location=case["file"],
        ep_num_redundant_experts=case["redundant"],
        moe_a2a_backend="deepep",
        ep_dispatch_algorithm=case["dispatch"],
        eplb_algorithm="auto",
        ep_join_mode=None,
    )
    parallel = SimpleNamespace(
        ep_size=case["ep_size"],
        tp_size=case["ep_size"],
        nnodes=case["nodes"],
        elastic_ep_initial_size=None,
        ep_join_rank_offset=0,
    )
    shape = module.ModelConfigForExpertLocation(
        num_layers=case["num_layers"], num_logical_experts=case["num_experts"], num_groups=None
    )
    module.get_exec = lambda: SimpleNamespace(moe=moe)
    module.get_parallel = lambda: parallel
    module.get_device = lambda: SimpleNamespace(device="cpu")
    module._prefer_same_node_experts = lambda: True
    module.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda config: shape)
    return module.compute_initial_expert_location_metadata(SimpleNamespace(), moe_ep_rank=rank)


def describe(metadata: Any, case: dict[str, Any], rank: int) -> dict[str, Any]:
    expert_HP = metadata.physical_to_logical_map.tolist()
    slots_per_rank = len(expert_HP[0]) // case["ep_size"]
    wrong_candidates = wrong_dispatch = 0
    for layer, row in enumerate(expert_HP):
        for expert in range(case["num_experts"]):
            holders = {slot for slot, held in enumerate(row) if held == expert}
            listed = metadata.logical_to_all_physical_map[layer, expert].tolist()
            count = int(metadata.logical_to_all_physical_map_num_valid[layer, expert])
            candidates = set(listed[:count])
            wrong_candidates += not candidates or not candidates <= holders or set(listed[count:]) - {-1} != set()
            if metadata.logical_to_rank_dispatch_physical_map is not None:
                chosen = int(metadata.logical_to_rank_dispatch_physical_map[layer, expert])
                local = {slot for slot in holders if slot // slots_per_rank == rank}
                wrong_dispatch += chosen not in (local or holders)
    return {
        "map": expert_HP,
        "wrong_candidates": wrong_candidates,
        "wrong_dispatch": wrong_dispatch,
        "static": metadata.logical_to_rank_dispatch_physical_map is not None,
        "local": metadata.num_local_physical_experts,
    }


def main() -> None:
    module = reader()
    answers = []
    for case in json.load(sys.stdin)["cases"]:
        try:
            ranks = range(case["ep_size"]) if case.get("check", True) else range(1)
            loaded = [load(module, case, rank) for rank in ranks]
        except Exception as error:  # noqa: BLE001 - which error the engine raises is the question
            answers.append({"error": type(error).__name__})
            continue
        if case.get("check", True):
            answers.append({"ranks": [describe(metadata, case, rank) for rank, metadata in enumerate(loaded)]})
        else:
            answers.append({"accepted": True})
    print(json.dumps({"cases": answers}))


if __name__ == "__main__":
    main()
