"""`placer schedule`: what it writes is what the simulator predicts, never slower than plain, in every mode."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from choosing_cases import cluster_of

from placer.cli import main
from placer.config.settings import ScheduleSettings
from placer.core.cluster import ClusterSpec
from placer.core.modes import DISPATCH_MODES
from placer.core.plan import Plan
from placer.core.schedule import ALGORITHMS
from placer.pipeline.scheduling import schedule_plan
from placer.pipeline.sources import sources_of
from sim import simulate
from traces.store import save_trace
from traces.synthetic import synthesize
from traces.trace import RoutingTrace

TAILED = cluster_of(2, 2, intra=(20.0, 2.0, 1.5), inter=(2.0, 4.0, 1.5))
ALL = 1000


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synthesize(num_layers=3, num_experts=8, top_k=2, num_tokens=700, num_requests=30, seed=1, popularity_sigma=1)


def plan_of(trace: RoutingTrace, cluster: ClusterSpec, mode: str) -> Plan:
    return Plan(
        model=trace.model.name,
        num_experts=trace.model.num_experts,
        num_ranks=cluster.num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        moe_layers=trace.model.moe_layers,
        slot_expert_LP=np.tile(np.arange(trace.model.num_experts), (trace.model.num_sites, 1)),
        mode=mode,
    )


def mean_us(plan: Plan, trace: RoutingTrace, cluster: ClusterSpec, batch: int, schedule: Any) -> float:
    timeline = simulate(
        plan,
        trace.model,
        cluster,
        trace.expert_LTK,
        sources_of(trace, cluster.num_ranks),
        fidelity="port",
        batch_tokens=batch,
        schedule=schedule,
    )
    return float(timeline.iteration_ns().mean()) / 1e3


@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_predicted_times_are_the_simulators_and_never_worse(trace: RoutingTrace, mode: str) -> None:
    plan = plan_of(trace, TAILED, mode)
    sizes = {"prefill": 300, "decode": 40}
    settings = ScheduleSettings(max_degree=2, iterations=ALL)
    planned, found, warnings = schedule_plan(plan, trace, TAILED, batch_tokens=sizes, settings=settings)
    assert warnings == []
    assert [one.kind for one in found] == ["prefill", "decode"]
    for one in found:
        schedule = planned.schedule(one.kind)
        assert schedule is one.schedule
        assert one.before_us == pytest.approx(mean_us(plan, trace, TAILED, sizes[one.kind], None))
        assert one.after_us == pytest.approx(mean_us(planned, trace, TAILED, sizes[one.kind], schedule))
        assert one.after_us <= one.before_us
        assert sum(one.layers_by_choice.values()) == 3
    if mode == "allgather":
        assert found[0].layers_by_choice == {"linear x1": 3}
    if mode == "per_node":
        assert set(found[0].schedule.algorithm_L) == {"linear"}


def test_no_uniform_schedule_beats_what_was_chosen(trace: RoutingTrace) -> None:
    """Brute force over what needs no rounds; layers are independent at fidelity port."""
    from placer.core.schedule import Schedule

    plan = plan_of(trace, TAILED, "per_expert")
    settings = ScheduleSettings(max_degree=3, iterations=ALL)
    _, (one,), _ = schedule_plan(plan, trace, TAILED, batch_tokens={"decode": 64}, settings=settings)
    for algorithm in ("linear", "2dh"):
        for degree in (1, 2, 3):
            uniform = Schedule.uniform(3, algorithm=algorithm, degree=degree)
            assert one.after_us <= mean_us(plan, trace, TAILED, 64, uniform) * (1 + 1e-9)


def test_the_choice_follows_the_cluster(trace: RoutingTrace) -> None:
    """A dear message and a fast node: 2dh. A tail where messages share a port: rounds. Neither: linear."""
    choices = {}
    for name, cluster in (
        ("2dh", cluster_of(4, 2, intra=(1000.0, 0.0), inter=(1000.0, 50.0))),
        ("rounds", cluster_of(1, 8, intra=(0.1, 0.0, 2.0))),
        ("linear", cluster_of(4, 2, intra=(0.1, 1.0), inter=(10.0, 1.0))),
    ):
        plan = plan_of(trace, cluster, "per_expert")
        settings = ScheduleSettings(max_degree=1, iterations=2)
        planned, _, _ = schedule_plan(plan, trace, cluster, batch_tokens={"prefill": 350}, settings=settings)
        assert planned.prefill is not None
        assert planned.decode is None
        choices[name] = set(planned.prefill.algorithm_L)
    assert choices == {name: {name} for name in choices}
    assert set(choices) == set(ALGORITHMS)


def test_pipelining_pays_where_experts_and_links_take_alike(trace: RoutingTrace) -> None:
    cluster = cluster_of(1, 4, intra=(10.0, 0.0))
    per_token = 2 * trace.model.expert_params / 1000  # ns at 1 teraflop
    balanced = replace(cluster, intra=replace(cluster.intra, gbytes_per_s=trace.model.token_bytes / per_token))
    for alpha_us, deeper in ((0.0, True), (1e6, False)):
        spec = replace(balanced, intra=replace(balanced.intra, alpha_us=alpha_us))
        spec = replace(spec, compute=replace(spec.compute, weight_read_gbytes_per_s=1e9))
        plan = plan_of(trace, spec, "per_expert")
        _, (one,), _ = schedule_plan(plan, trace, spec, batch_tokens={"prefill": 700})
        assert (min(one.schedule.degree_L) > 1) == deeper


def test_the_verb_writes_the_plan_and_says_what_it_gains(
    trace: RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_trace(trace, Path("trace.safetensors"))
    plan_of(trace, TAILED, "per_rank").save(Path("plan.json"))
    Path("cluster.yaml").write_text(yaml.safe_dump(TAILED.to_dict()))
    Path("settings.yaml").write_text("schedule: {decode_tokens: 32, max_degree: 2, iterations: 4}\n")
    shared = ("schedule", "plan.json", "--trace", "trace.safetensors", "--cluster", "cluster.yaml")
    data = json.loads(run(monkeypatch, capsys, *shared, "--config", "settings.yaml", "-o", "new.json", "--json"))
    written = Plan.load(Path("new.json"))
    assert written.prefill is not None
    assert written.decode is not None
    assert data["output"] == "new.json"
    assert data["kinds"]["decode"]["batch_tokens"] == 32
    assert data["kinds"]["decode"]["iterations"] == 4
    for one in data["kinds"].values():
        assert one["gain"] == pytest.approx(one["before_us"] / one["after_us"])
        assert one["gain"] >= 1
        assert sum(one["layers"].values()) == 3
    again = run(monkeypatch, capsys, *shared, "--config", "settings.yaml", "-o", "same.json")
    assert Path("same.json").read_bytes() == Path("new.json").read_bytes()
    assert "layers by choice" in again
    assert "wrote same.json" in again
    run(monkeypatch, capsys, *shared, "-o", "decode.json", "--for", "decode")
    assert Plan.load(Path("decode.json")).prefill is None


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["placer", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_wrong_words_are_refused(
    trace: RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan_of(trace, TAILED, "per_rank").save(Path("plan.json"))
    save_trace(trace, Path("trace.safetensors"))
    Path("deep.yaml").write_text("schedule: {max_degree: 65}\n")
    base = ["placer", "schedule", "plan.json", "--trace", "trace.safetensors", "--cluster", "2x2", "-o", "new.json"]
    for more, says in (
        (["--for", "training"], "prefill, decode or both"),
        (["--config", "deep.yaml"], "schedule.max_degree is 65"),
        (["--cluster", "node8"], "the plan is for 4 ranks"),
    ):
        monkeypatch.setattr("sys.argv", [*base, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code
        error = "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("note: "))
        assert says in error
        assert error.count("\n") == 1
        assert not Path("new.json").exists()
