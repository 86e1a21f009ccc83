"""Which methods run on which case, and for how long."""

from instances import Case
from partitioners import TOOLS

from placer.config import load_cluster
from solvers.registry import SOLVERS

__all__ = ["ILPS", "LEFT_OUT", "methods_of", "name_and_limit"]

ALL = ("touched", "cut", "par")
SUITS: dict[str, tuple[str, ...]] = {
    "linear": ALL,
    "round_robin": ("par",),
    "eplb": ("touched", "par"),
    "eplb_hierarchical": ("touched", "par"),
    "lpt": ALL,
    "risk": ("par",),
    "coactivation": ("touched",),
    "replicated": ("touched",),
    "blocks": ("touched",),
    "cpsat": ("touched",),
    "sem_moe": ("touched",),
    "affinity": ("cut",),
    "chain": ("cut",),
    "exflow": ("cut",),
    "moetuner": ("cut",),
    "exflow_staged": ("cut",),
    "lplb": ("par",),
}
"""Objectives a solver is meant for; one that is not named here runs on all and may refuse, which its row then says."""

ILPS = ("cpsat", "exflow", "exflow_staged", "moetuner")
"""They run where a case gives them limits, once for each: on larger models they find nothing in a minute."""

NEEDS_REPLICAS, NEEDS_NODES = ("replicated",), ("eplb_hierarchical",)
ONE_COPY = ("coactivation", "blocks", "cpsat", "sem_moe", "affinity", "chain", "exflow", "exflow_staged", "moetuner")

LEFT_OUT = ("Qwen3 co-activation (JSON): the files hold the top pairs only, which is neither a load nor a set",)


def methods_of(case: Case) -> list[str]:
    """Names of the methods for `case`, "solver", "solver@seconds" for integer programs, "tool+repair"."""
    found = []
    several_nodes = load_cluster(case.cluster).nodes > 1
    for name in (*SOLVERS, "auto"):
        if case.objective not in SUITS.get(name, ALL) or (name in ONE_COPY and case.redundant):
            continue
        if (name in NEEDS_REPLICAS and not case.redundant) or (name in NEEDS_NODES and not several_nodes):
            continue
        if name in ILPS:
            found += [f"{name}@{seconds:g}" for seconds in case.ilp_s]
        else:
            found.append(name)
    if case.objective != "par" and not case.redundant:
        found += [f"{tool}+repair" for tool in TOOLS]
    return found


def name_and_limit(method: str, case: Case) -> tuple[str, float]:
    """The solver's (or tool's) name and its time limit in seconds."""
    name, _, seconds = method.removesuffix("+repair").partition("@")
    return name, float(seconds) if seconds else case.limit_s
