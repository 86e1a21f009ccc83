"""One rank's preparation and rank 0's verdict, without ranks: lazy loading, and a verdict that can fail."""

import numpy as np
import pytest
import torch

from placer.core.errors import ExecutionError, MismatchError
from placer.execute import ReplayJob, write_random_experts
from placer.execute.collect import judge_outputs
from placer.execute.experts import ExpertFile
from placer.execute.loop import first_hidden, prepare
from placer.execute.reference import reference_forward
from placer.execute.routing import load_routing

CPU = torch.device("cpu")


@pytest.fixture
def make_job(tmp_path, helpers):
    """A job of two sites, four experts and 16 tokens; returns (job, plan)."""

    def make(ranks, *, hidden=16, dtype="float32", mode="per_rank", slots=((0, 1, 2, 3), (3, 2, 1, 0))):
        plan = helpers.make_plan(slots, experts=4, ranks=ranks, mode=mode)
        plan.save(tmp_path / "plan.json")
        rng = np.random.default_rng(0)
        np.save(tmp_path / "expert.npy", helpers.random_routing(rng, 2, 16, 2, 4))
        np.save(tmp_path / "source.npy", np.arange(16) % ranks)
        write_random_experts(tmp_path / "experts", helpers.toy_model(2, 4, 2, hidden=hidden, inner=8), 0)
        job = ReplayJob(
            plan_path=str(tmp_path / "plan.json"),
            expert_path=str(tmp_path / "expert.npy"),
            source_path=str(tmp_path / "source.npy"),
            experts_path=str(tmp_path / "experts"),
            result_path=str(tmp_path / "result.json"),
            stored_layers=(0, 1),
            mode=mode,
            tokens_per_iteration=8,
            iterations=2,
            dtype=dtype,
        )
        return job, plan

    return make


def test_a_rank_loads_only_its_plans_experts_and_each_once(make_job, monkeypatch):
    job, _ = make_job(2, slots=((0, 1, 2, 3, 0, -1), (3, 2, 1, 0, -1, -1)))
    loaded = []
    real = ExpertFile.load

    def load(self, layer, expert, **place):
        loaded.append((layer, expert))
        return real(self, layer, expert, **place)

    monkeypatch.setattr(ExpertFile, "load", load)
    cache = {}
    prepared = prepare(job, 1, 2, CPU, cache)
    assert loaded == [(0, 3), (0, 0), (1, 0)]
    assert [[expert is None for expert in held] for held in prepared.experts_LP] == [
        [False, False, True],
        [False, True, True],
    ]
    prepare(job, 1, 2, CPU, cache)
    assert len(loaded) == 3


def test_batches_are_the_ranks_own_tokens_of_each_iteration(make_job):
    job, plan = make_job(2)
    prepared = prepare(job, 1, 2, CPU, {})
    whole = load_routing(job, plan)
    assert [batch.token_T.tolist() for batch in prepared.batches] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    np.testing.assert_array_equal(prepared.batches[1].slot_LTK.numpy(), whole.slot_LTK[:, 9::2])
    assert first_hidden(prepared, 1).shape == (4, 16)


def test_a_plan_for_other_ranks_and_an_odd_hidden_size_are_refused(make_job):
    job, _ = make_job(2)
    with pytest.raises(MismatchError, match="for 2 ranks, 3 were started"):
        prepare(job, 0, 3, CPU, {})
    job, _ = make_job(2, hidden=15, dtype="bfloat16")
    with pytest.raises(MismatchError, match="hidden size 15 in bfloat16"):
        prepare(job, 0, 2, CPU, {})


def right_outputs(job, plan, helpers):
    """Residual stream of all tokens, summed expert by expert."""
    routing = load_routing(job, plan)
    experts = torch.from_numpy(np.where(routing.slot_LTK >= 0, routing.expert_LTK, -1))
    with ExpertFile(job.experts_path) as file:
        return reference_forward(
            job.seed,
            16,
            experts,
            torch.from_numpy(routing.weight_LTK),
            lambda layer, expert: file.load(layer, expert, dtype=torch.float32),
            dtype=torch.float32,
        )


def test_the_verdict_accepts_rounding_and_refuses_anything_wrong(make_job, helpers):
    job, plan = make_job(2, mode="per_expert")
    prepared = prepare(job, 0, 2, CPU, {})
    good_TH = right_outputs(job, plan, helpers)
    verdict = judge_outputs(prepared, good_TH)
    assert verdict["bit_identical"]
    assert verdict["max_abs_error"] == 0.0
    rounded_TH = good_TH * (1 + 1e-6)
    nearly = judge_outputs(prepared, rounded_TH)
    assert not nearly["bit_identical"]
    assert 0 < nearly["max_rel_error"] < 1e-5
    assert nearly["output_sha256"] != verdict["output_sha256"]
    swapped_TH = good_TH[torch.tensor([1, 0, *range(2, 16)])]
    lost_TH = good_TH.clone()
    lost_TH[3, 5] = float("nan")
    for wrong_TH in (swapped_TH, lost_TH, good_TH + 0.01):
        with pytest.raises(ExecutionError, match="outputs differ from the single-process reference"):
            judge_outputs(prepared, wrong_TH)
