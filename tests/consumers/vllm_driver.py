"""Runs vLLM's own weight mover and map commit over gloo processes on this CPU. Request and answer are JSON.

Only vllm/distributed/eplb/** is real; every other vllm module that it imports is an empty stand-in whose attributes are
empty classes. Weights are tagged with layer and logical expert, so a slot that holds the wrong expert shows.

Request {"files": [map, ...], "wanted": [rows, ...], "num_experts", "redundant", "ep_size", "scratch"}: each file's
map is reached from the one before (the first from vLLM's own starting map) and compared with the rows wanted. Answer
{"wrong_slots", "checked_slots", "wrong_maps", "file" of the mover} over all ranks.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

sys.dont_write_bytecode = True

REAL = "vllm.distributed.eplb"
ROOT = Path(str(importlib.metadata.distribution("vllm").locate_file("vllm")))
STAND_INS: dict[str, Any] = {
    "PIN_MEMORY": False,
    "gpu_sync_allowed": contextlib.nullcontext,
    "init_logger": logging.getLogger,
    "current_platform": SimpleNamespace(is_rocm=lambda: False),
    "EPLBPolicyOption": Literal["default"],
}


class StandIn(types.ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = STAND_INS[name] if name in STAND_INS else type(name, (), {})
        setattr(self, name, value)
        return value


class VllmFinder:
    """Finds the real EPLB modules in the wheel and stand-ins for the rest of vllm."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "vllm":
            return None
        file = ROOT.joinpath(*name.split(".")[1:])
        if name.startswith(REAL) and name != REAL:
            folder = [str(file)] if file.is_dir() else None
            source = file / "__init__.py" if folder else file.with_suffix(".py")
            return importlib.util.spec_from_file_location(name, source, submodule_search_locations=folder)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = StandIn(spec.name)
        module.__path__ = [str(ROOT.joinpath(*spec.name.split(".")[1:]))]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def tagged(layer: int, expert: int, weight: int) -> float:
    return layer * 1000.0 + expert + weight / 4


def worker(rank: int, request: dict[str, Any]) -> None:
    sys.meta_path.insert(0, VllmFinder())
    import torch
    import torch.distributed as dist

    mover = importlib.import_module(f"{REAL}.rebalance_execute")
    state = importlib.import_module(f"{REAL}.eplb_state")
    base = importlib.import_module(f"{REAL}.eplb_communicator").EplbCommunicator

    class GlooCommunicator(base):  # type: ignore[misc,valid-type]
        """Point-to-point sends and receives in one batch."""

        def __init__(self) -> None:
            self.pending: list[dist.P2POp] = []

        def add_send(self, tensors: Any, dst_rank: int, expert_id: int) -> None:
            self.pending += [dist.P2POp(dist.isend, tensor.contiguous(), dst_rank) for tensor in tensors]

        def add_recv(self, tensors: Any, src_rank: int, expert_id: int) -> None:
            self.pending += [dist.P2POp(dist.irecv, tensor, src_rank) for tensor in tensors]

        def execute(self) -> None:
            if self.pending:
                for work in dist.batch_isend_irecv(self.pending):
                    work.wait()
            self.pending = []

    scratch, ep_size, experts = Path(request["scratch"]), request["ep_size"], request["num_experts"]
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=ep_size)
    targets = [torch.tensor(json.loads(Path(file).read_text())) for file in request["files"]]
    layers, slots = targets[0].shape
    local = slots // ep_size
    mine = range(rank * local, (rank + 1) * local)
    start = state.EplbState.build_initial_global_physical_to_logical_map(experts, request["redundant"])
    held = torch.tensor([start] * layers)
    weights = [
        [torch.tensor([[tagged(layer, start[slot], w)] * width for slot in mine]) for w, width in ((0, 8), (1, 4))]
        for layer in range(layers)
    ]
    buffers = [torch.empty_like(weight) for weight in weights[0]]
    wrong_slots = checked = wrong_maps = 0
    for target, wanted in zip(targets, request["wanted"], strict=True):
        mover.rearrange_expert_weights_inplace(held, target, weights, buffers, dist.group.WORLD, GlooCommunicator())
        for layer in range(layers):
            for place, slot in enumerate(mine):
                for weight in (0, 1):
                    want = tagged(layer, wanted[layer][slot], weight)
                    checked += 1
                    wrong_slots += not bool((weights[layer][weight][place] == want).all())
        maps = SimpleNamespace(
            physical_to_logical_map=held.clone(),
            physical_to_logical_map_buffer=held.clone(),
            logical_to_physical_map=torch.full((layers, experts, slots), -1),
            logical_replica_count=torch.zeros(layers, experts, dtype=torch.long),
        )
        state._commit_eplb_maps(maps, target)
        wrong_maps += maps.physical_to_logical_map.tolist() != wanted
        for layer in range(layers):
            for expert in range(experts):
                count = int(maps.logical_replica_count[layer, expert])
                listed = maps.logical_to_physical_map[layer, expert, :count].tolist()
                wrong_maps += sorted(listed) != [slot for slot in range(slots) if wanted[layer][slot] == expert]
        held = target.clone()
    answer = {"wrong_slots": wrong_slots, "checked_slots": checked, "wrong_maps": wrong_maps, "file": mover.__file__}
    (scratch / f"rank{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    import torch.multiprocessing

    request = json.load(sys.stdin)
    torch.multiprocessing.spawn(worker, args=(request,), nprocs=request["ep_size"])
    ranks = [json.loads((Path(request["scratch"]) / f"rank{r}.json").read_text()) for r in range(request["ep_size"])]
    total = {key: sum(rank[key] for rank in ranks) for key in ("wrong_slots", "checked_slots", "wrong_maps")}
    print(json.dumps({**total, "file": ranks[0]["file"]}))


if __name__ == "__main__":
    main()
