"""The whole model over ranks that are threads: logits of transformers' own forward, and tokens that go nowhere.

Legend: B requests of one rank, V vocabulary.
"""

import numpy as np
import pytest
import torch
import transformers

from placer.core.errors import ExecutionError
from placer.core.schedule import Schedule
from placer.core.timeline import PHASES
from placer.execute.dispatch import fabric as fabric_module
from placer.execute.dispatch import shipment as shipment_module
from placer.execute.experts import ExpertFile
from placer.execute.hf import GENERATION_MODES, GenerateJob
from placer.execute.hf.backbone import load_backbone
from placer.execute.hf.prepare import Caches, prepare

MODES = GENERATION_MODES
PAIRS = [
    *((kind, "per_rank") for kind in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "small_moe")),
    *(("gpt_oss", mode) for mode in MODES if mode != "per_rank"),
]
STEPS = 4


def run_steps(tiny, checkpoint, tmp_path, ranks, plan, rank_q, mode, *, dtype="float32"):
    """Per rank: (requests, logits of each step (B, V), routed tokens and spans of each step, tokens)."""
    plan.save(tmp_path / "plan.json")
    job = GenerateJob(
        plan_path=str(tmp_path / "plan.json"),
        model_path=str(checkpoint),
        result_path="unused",
        prompts=tiny.PROMPTS,
        rank_Q=rank_q,
        mode=mode,
        max_new_tokens=STEPS,
        dtype=dtype,
    )

    # building a model changes transformers' global state: not from several threads
    prepared = [
        prepare(job, rank, ranks.num_ranks, torch.device("cpu"), Caches(), lambda *_: None)
        for rank in range(ranks.num_ranks)
    ]

    def one_rank(rank):
        one, logits = prepared[rank], []
        batch = one.start(ranks.fabric(plan.ranks_per_node))
        one.backbone.model.register_forward_hook(lambda _module, _args, output: logits.append(output.logits[:, -1]))
        steps = []
        for _ in range(STEPS):
            steps.append((batch.advance(one.clock.start()), list(one.step.spans)))
            batch.take()
        return batch.request_B.tolist(), logits, steps, batch.generated

    return ranks.run(one_rank)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_logits_are_those_of_the_single_process_model(
    checkpoints, tiny, thread_ranks, tmp_path, monkeypatch, kind, mode
):
    """Prompts of different lengths share a rank's batch; every expert has a place, some two."""
    folder = checkpoints[kind]
    plan = tiny.make_plan(folder, 2, slots_per_rank=5, replica_choice="visit_first")
    ranks = thread_ranks(2)
    monkeypatch.setattr(fabric_module, "dist", ranks)
    check_logits(tiny, folder, run_steps(tiny, folder, tmp_path, ranks, plan, (0, 0, 1, 0), mode))


def check_logits(tiny, folder, results):
    """Every step's logits and tokens are those of transformers' own forward over the whole sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    compared = 0
    for requests, logits, _, generated in results:
        for row, request in enumerate(requests):
            ids = list(tiny.PROMPTS[request])
            for step, token in enumerate(generated[row]):
                with torch.inference_mode():
                    expected_V = model(torch.tensor([ids])).logits[0, -1]
                assert torch.allclose(logits[step][row], expected_V, rtol=0, atol=1e-5), (request, step)
                assert token == int(expected_V.argmax())
                compared += 1
                ids.append(token)
    assert compared >= len(tiny.PROMPTS)


@pytest.mark.parametrize("mode", ["per_node", "per_rank"])
def test_prefill_and_decode_have_their_own_schedules_over_two_nodes(
    checkpoints, tiny, thread_ranks, random_rounds, tmp_path, monkeypatch, mode
):
    """Rank 2 has no prompt and takes part all the same; pipeline degrees are left out."""
    folder, layers = checkpoints["olmoe"], 2
    schedules = {}
    if mode == "per_rank":
        rounds = random_rounds(np.random.default_rng(3), 4)
        schedules["prefill"] = Schedule.uniform(layers, algorithm="2dh", degree=3)
        schedules["decode"] = Schedule.uniform(layers, algorithm="rounds", rounds=rounds)
    plan = tiny.make_plan(folder, 4, slots_per_rank=3, ranks_per_node=2, mode=mode, **schedules)
    ranks, used = thread_ranks(4), []
    monkeypatch.setattr(fabric_module, "dist", ranks)
    hops = fabric_module.hops

    def noted(fabric, algorithm, flow, rounds):
        used.extend([algorithm] if fabric.rank == 2 else [])
        return hops(fabric, algorithm, flow, rounds)

    monkeypatch.setattr(shipment_module, "hops", noted)
    results = run_steps(tiny, folder, tmp_path, ranks, plan, (3, 0, 0, 1), mode)
    check_logits(tiny, folder, results)
    both_ways = 2 * layers
    # per_node has legs of its own
    expected = ["2dh"] * both_ways + ["rounds"] * both_ways * (STEPS - 1) if schedules else []
    assert used == expected
    for step in zip(*(steps for _, _, steps, _ in results), strict=True):
        for phase in ("dispatch", "combine"):
            moved = [(span.sent, span.received) for _, own in step for _, span in own if PHASES[span.phase] == phase]
            assert sum(sent for sent, _ in moved) == sum(received for _, received in moved) > 0


def test_bfloat16_stays_near_the_single_process_model_in_bfloat16(
    checkpoints, tiny, thread_ranks, tmp_path, monkeypatch
):
    """Only near: transformers rounds each expert's share to bfloat16, placer sums in float32."""
    folder = checkpoints["gpt_oss"]
    ranks = thread_ranks(2)
    monkeypatch.setattr(fabric_module, "dist", ranks)
    plan = tiny.make_plan(folder, 2)
    results = run_steps(tiny, folder, tmp_path, ranks, plan, (0, 0, 1, 1), "per_rank", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for requests, logits, _, _ in results:
        for row, request in enumerate(requests):
            with torch.inference_mode():
                expected_V = model(torch.tensor([tiny.PROMPTS[request]])).logits[0, -1]
            assert logits[0].dtype == torch.bfloat16
            difference = float((logits[0][row].float() - expected_V.float()).norm() / expected_V.float().norm())
            assert difference < 0.1


def test_rotary_frequencies_that_transformers_leaves_out_are_noticed(checkpoints, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "_init_weights", lambda _self, _module: None)
    monkeypatch.setattr(transformers.MixtralPreTrainedModel, "_init_weights", lambda _self, _module: None)
    with pytest.raises(ExecutionError, match=r"does not compute model\.rotary_emb\."):
        load_backbone(checkpoints["mixtral"], dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_ended_requests_send_nothing(checkpoints, tiny, thread_ranks, tmp_path, monkeypatch, mode):
    """Rank 1 has no request: it computes its experts' share all the same and routes no token."""
    folder = checkpoints["mixtral"]
    plan = tiny.make_plan(folder, 2)
    ranks = thread_ranks(2)
    monkeypatch.setattr(fabric_module, "dist", ranks)
    (requests, _, steps, generated), (nobody, no_logits, idle, nothing) = run_steps(
        tiny, folder, tmp_path, ranks, plan, (0, 0, 0, 0), mode
    )
    assert (requests, nobody, no_logits, nothing) == ([0, 1, 2, 3], [], [], [])
    assert steps[0][0] == sum(map(len, tiny.PROMPTS))
    for step in range(1, STEPS):
        assert steps[step][0] == sum(len(row) > step for row in generated)
    assert all(tokens == 0 for tokens, _ in idle)
    for (tokens, own), (_, other) in zip(steps, idle, strict=True):
        for (site, span), (site_there, span_there) in zip(own, other, strict=True):
            assert (site, span.phase) == (site_there, span_there.phase)
            assert (span.sent, span.received) == (span_there.received, span_there.sent)
            phase = PHASES[span.phase]
            if phase == "experts":
                assert span.tokens + span_there.tokens == tokens * tiny.TOP_K
            elif phase == "attention":
                assert (span.tokens, span_there.tokens) == (tokens, 0)
            elif phase == "dispatch":
                assert span_there.sent == 0
            else:
                assert span.sent == 0


def test_experts_make_a_difference(checkpoints, tiny, thread_ranks, tmp_path, monkeypatch):
    """The comparison above can fail: with two experts exchanged, logits are elsewhere."""
    folder = checkpoints["olmoe"]
    good = tiny.make_plan(folder, 2)
    ranks = thread_ranks(2)
    monkeypatch.setattr(fabric_module, "dist", ranks)
    first = run_steps(tiny, folder, tmp_path, ranks, good, (0, 1, 0, 1), "per_rank")
    load = ExpertFile.load

    def swapped(self, layer, expert, **options):
        return load(self, layer, {0: 1, 1: 0}.get(expert, expert), **options)

    monkeypatch.setattr(ExpertFile, "load", swapped)
    second = run_steps(tiny, folder, tmp_path, ranks, good, (0, 1, 0, 1), "per_rank")
    difference = max(float((a[1][0] - b[1][0]).abs().max()) for a, b in zip(first, second, strict=True))
    assert difference > 1e-2


def test_a_rank_holds_its_own_experts_and_no_others(checkpoints, tiny, tmp_path):
    folder = checkpoints["qwen3_moe"]
    plan = tiny.make_plan(folder, 4)
    plan.save(tmp_path / "plan.json")
    job = GenerateJob(
        plan_path=str(tmp_path / "plan.json"),
        model_path=str(folder),
        result_path="unused",
        prompts=tiny.PROMPTS,
        rank_Q=(0, 1, 2, 3),
        mode="per_rank",
        max_new_tokens=1,
        dtype="bfloat16",
    )
    caches = Caches()
    one = prepare(job, 2, 4, torch.device("cpu"), caches, lambda *_: None)
    held = {(layer, expert) for _, _, layer, expert in caches.experts}
    own = plan.slot_expert_LP[:, 4:6]
    assert held == {(layer, e) for layer, row in zip(plan.moe_layers, own.tolist(), strict=True) for e in row}
    assert plan.moe_layers == (0, 2)
    assert {str(p.device) for p in one.backbone.model.parameters()} == {"cpu"}
    assert not [name for name, _ in one.backbone.model.named_parameters() if "experts" in name]
    assert {p.dtype for p in one.backbone.model.parameters()} == {torch.bfloat16}
    assert one.backbone.model.lm_head.weight is one.backbone.model.model.embed_tokens.weight
    frequency = one.backbone.model.model.rotary_emb.inv_freq
    assert frequency.dtype == torch.float32
    assert np.isclose(float(frequency[0]), 1.0)
