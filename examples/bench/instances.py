"""What the bench runs on: the shipped trace, the developers' traces where they are given, and the synthetic family.

A source is a trace or load counts; a case is a source on a cluster with one objective. Preparing a source writes its
planning half as a profile, its judging half as a trace, and a small profile of the same kind to warm up on.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from placer.config import Settings, load_cluster
from placer.core.modes import DispatchMode
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from placer.pipeline import open_source, profile_of
from placer.pipeline.planning import DEFAULT_CAP
from solvers.balance.load import par_bound
from traces.counts import LoadCounts
from traces.hf_config import MODELS
from traces.profile_store import save_profile
from traces.store import save_trace
from traces.synthetic import synthesize

__all__ = [
    "DEEPSEEK",
    "EXAMPLES",
    "GPTOSS",
    "OBJECTIVES",
    "SMALL_TRACE",
    "SYNTHETIC",
    "Case",
    "Objective",
    "Source",
    "cases_of",
    "prepare",
    "problem_of",
    "shape_case",
    "synthetic",
]

Objective = Literal["touched", "cut", "par"]
OBJECTIVES: dict[Objective, DispatchMode] = {"touched": "per_rank", "cut": "coherent", "par": "per_expert"}
"""What is minimised and the dispatch mode that makes it matter. touched: mean ranks a token touches in a layer. cut:
share of a token's (expert, next layer's expert) pairs that lie on two ranks, 1 - kept. par: max / mean rank load."""

EXAMPLES = Path(__file__).resolve().parents[1]
SMALL_TRACE, GPTOSS, DEEPSEEK = (
    "small_moe/trace.safetensors",
    "gptoss20b/mmlu.npz",
    "deepseekv3_load/expert_workload.json",
)
WARM_SHAPE = {"num_tokens": 400, "num_requests": 8, "seed": 1}
SYNTHETIC = {"num_tokens": 20_000, "num_requests": 200, "seed": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the routing comes from: arguments of `synthesize`, or a file (with a preset's name where it needs one).

    `file` lies under the folder of examples, or that of the developers' traces where `shipped` is False: results name
    no folder of one machine.
    """

    name: str
    synthetic: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    shipped: bool = True
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem of the bench. `limit_s` is what a search gets; `ilp_s` the limits of the papers' integer programs."""

    source: Source
    cluster: str
    objective: Objective
    redundant: int = 0
    limit_s: float = 10.0
    ilp_s: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """As the table shows it, and the front of the rows' keys."""
        spare = f" +{self.redundant}" if self.redundant else ""
        return f"{self.source.name} {self.cluster}{spare} {self.objective}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same before and after JSON: rows are found again by it."""
        data = asdict(self)
        return {**data, "ilp_s": list(self.ilp_s)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Case":
        """What `to_dict` gave, also after JSON."""
        return cls(**{**data, "source": Source(**data["source"]), "ilp_s": tuple(data["ilp_s"])})


def synthetic(layers: int, experts: int, top_k: int, **more: Any) -> Source:
    """A member of the synthetic family; its shape is its name, its seed and tokens are those of SYNTHETIC."""
    shape = {"num_layers": layers, "num_experts": experts, "top_k": top_k}
    return Source(name=f"{layers}x{experts} top-{top_k}", synthetic={**shape, **SYNTHETIC, **more})


def shape_case(layers: int, experts: int, cluster: str, *, redundant: int, limit_s: float) -> Case:
    """A large shape of the scaling study, top-8, ranks touched."""
    source = synthetic(layers, experts, 8)
    return Case(source=source, cluster=cluster, objective="touched", redundant=redundant, limit_s=limit_s)


def cases_of(suite: str, data: Path | None) -> list[Case]:
    """The cases of a suite, "quick" or "full"; those on the developers' traces where `data` has the files."""
    shipped = Source(name="small_moe", file=SMALL_TRACE)
    if suite == "quick":
        tiny = synthetic(4, 16, 2, num_tokens=4_000, num_requests=40)
        quick = [
            Case(source=tiny, cluster="node4", objective="touched", limit_s=2, ilp_s=(2,)),
            Case(source=tiny, cluster="node4", objective="touched", redundant=4, limit_s=2),
            Case(source=tiny, cluster="node4", objective="cut", limit_s=2, ilp_s=(2,)),
            Case(source=tiny, cluster="2x2", objective="par", redundant=4, limit_s=2),
        ]
        return [*quick, Case(source=shipped, cluster="node8", objective="touched", limit_s=2)]
    cases = [
        Case(source=shipped, cluster="node8", objective="touched", ilp_s=(10,)),
        Case(source=shipped, cluster="node8", objective="cut", ilp_s=(10,)),
        Case(source=shipped, cluster="node8", objective="touched", redundant=8),
        Case(source=shipped, cluster="node4", objective="touched", limit_s=5),
    ]
    if data is not None and (data / GPTOSS).is_file():
        gptoss = Source(name="gpt-oss-20b", file=GPTOSS, shipped=False, model="gpt-oss-20b")
        cases += [
            Case(source=gptoss, cluster="node8", objective="touched", ilp_s=(10, 60)),
            Case(source=gptoss, cluster="node8", objective="cut", ilp_s=(10, 60)),
            Case(source=gptoss, cluster="node8", objective="touched", redundant=8),
            Case(source=gptoss, cluster="node4", objective="touched", limit_s=5),
        ]
    if data is not None and (data / DEEPSEEK).is_file():
        counts = Source(name="DeepSeek-V3 load", file=DEEPSEEK, shipped=False)
        cases.append(Case(source=counts, cluster="8x8", objective="par", redundant=64))
    mixtral, small, middle, large = (
        synthetic(32, 8, 2),
        synthetic(16, 64, 2),
        synthetic(48, 128, 8),
        synthetic(58, 256, 8),
    )
    # one node for cuts, so that every method minimises the same: across nodes some price the nodes as well
    return [
        *cases,
        Case(source=mixtral, cluster="node4", objective="touched", limit_s=5, ilp_s=(10, 60)),
        Case(source=mixtral, cluster="node4", objective="cut", limit_s=5, ilp_s=(10, 60)),
        Case(source=small, cluster="node8", objective="touched", ilp_s=(10, 60)),
        Case(source=small, cluster="node8", objective="cut", ilp_s=(10, 60)),
        Case(source=middle, cluster="2x8", objective="touched", limit_s=15),
        Case(source=middle, cluster="node16", objective="cut", limit_s=15),
        Case(source=middle, cluster="2x8", objective="par", redundant=16),
        Case(source=large, cluster="8x8", objective="touched", limit_s=15),
        Case(source=large, cluster="node64", objective="cut", limit_s=15),
        Case(source=large, cluster="8x8", objective="par", redundant=64),
    ]


def prepare(source: Source, folder: Path, data: Path) -> None:
    """Writes plan.profile, warm.profile and, for traces, judge.trace into `folder`; halves are split by request.

    `data` is the folder of the developers' traces.
    """
    settings = Settings().profile
    top_k = source.synthetic.get("top_k", 2)
    warm = profile_of(synthesize(num_layers=2, num_experts=16, top_k=top_k, **WARM_SHAPE), settings)
    if source.synthetic:
        whole = synthesize(**source.synthetic)
    else:
        whole = open_source((EXAMPLES if source.shipped else data) / source.file, MODELS.get(source.model))
    if isinstance(whole, LoadCounts):
        save_profile(profile_of(whole, settings), folder / "plan.profile")
        warm = without_pairs(warm)
    else:
        train, test = whole.split_by_request(0.5, seed=0)
        save_profile(profile_of(train, settings), folder / "plan.profile")
        save_trace(test, folder / "judge.trace")
    save_profile(warm, folder / "warm.profile")


def without_pairs(profile: Profile) -> Profile:
    """The loads alone, as a recording of counts has them."""
    return Profile(
        model=profile.model,
        trace_sha256=profile.trace_sha256,
        num_tokens=profile.num_tokens,
        num_requests=0,
        window_tokens=profile.window_tokens,
        load_WLE=profile.load_WLE,
        load_FLE=profile.load_LE[None],
    )


def problem_of(case: Case, profile: Profile, *, cluster: str = "", redundant: int | None = None) -> PlacementProblem:
    """The case as a problem: PAR capped as `placer solve` caps it (1.10, or 5 % above its bound), not in windows."""
    free = PlacementProblem(
        profile=profile,
        cluster=load_cluster(cluster or case.cluster),
        mode=OBJECTIVES[case.objective],
        redundant=case.redundant if redundant is None else redundant,
    )
    if case.objective == "par":
        return free
    cap = max(DEFAULT_CAP, round(1.05 * par_bound(free), 4))
    return PlacementProblem(
        profile=free.profile, cluster=free.cluster, mode=free.mode, redundant=free.redundant, max_par=cap
    )
