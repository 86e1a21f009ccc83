"""Real ranks generate what the single-process model generates, token for token."""

import json
import shutil
import sys

import numpy as np
import pytest

from placer.config.settings import RunSettings
from placer.core.schedule import KINDS, SCHEDULED_MODES, Schedule
from placer.core.timeline import PHASES
from placer.execute.hf import GENERATION_MODES, GenerateJob
from placer.execute.hf.measure import WORKER
from placer.execute.launch import Host, run_ranks
from placer.pipeline.generating import generate, read_prompts
from traces.hf_config import model_from_hf_config
from traces.store import load_trace

pytestmark = pytest.mark.dist

NEW_TOKENS = 8
GENEROUS_S = 180.0
CHOICES = ("round_robin", "visit_first")


def job_for(tmp_path, tiny, folder, plan, mode, rank_q, **change):
    name = f"{folder.name}-{mode}"
    plan.save(tmp_path / f"{name}-plan.json")
    fields = {
        "plan_path": str(tmp_path / f"{name}-plan.json"),
        "model_path": str(folder),
        "result_path": str(tmp_path / f"{name}-result.json"),
        "prompts": tiny.PROMPTS,
        "rank_Q": rank_q,
        "mode": mode,
        "max_new_tokens": NEW_TOKENS,
        "timeout_s": GENEROUS_S,
    }
    return GenerateJob(**fields | change)


def check_spans(timeline, plan, top_k):
    """Four phases of every layer and one span behind the last, of every rank and iteration, one after the other."""
    about, ranks, layers = timeline.about, plan.num_ranks, len(plan.slot_expert_LP)
    assert len(timeline.start_ns) == ranks * about["iterations"] * (4 * layers + 1)
    assert about["kinds"] == ["prefill", *["decode"] * (about["iterations"] - 1)]
    assert about["tokens_by_iteration"][0] == sum(about["prompt_tokens"])
    for rank in range(ranks):
        mine = timeline.rank == rank
        start, end = timeline.start_ns[mine], (timeline.start_ns + timeline.duration_ns)[mine]
        assert (start[1:] >= end[:-1]).all()
    for iteration, tokens in enumerate(about["tokens_by_iteration"]):
        at = timeline.iteration == iteration
        sending, computing = (at & (timeline.phase == PHASES.index(phase)) for phase in ("dispatch", "experts"))
        assert timeline.sent_bytes[sending].sum() == timeline.received_bytes[sending].sum()
        assert timeline.tokens[computing].sum() == tokens * layers * top_k


def test_four_ranks_generate_the_same_tokens_for_every_model_and_mode(checkpoints, tiny, random_rounds, tmp_path):
    """Two nodes, replicas in some plans, a rank without a prompt; in one plan a rank without experts."""
    jobs, plans, rank_q = {}, {}, (3, 0, 0, 1)
    for index, (kind, folder) in enumerate(checkpoints.items()):
        for turn, mode in enumerate(GENERATION_MODES):
            change = {"seed": index, "slots_per_rank": 2 + (index + turn) % 2}
            layers = len(model_from_hf_config(folder).moe_layers)
            if mode in SCHEDULED_MODES:
                rounds = random_rounds(np.random.default_rng(index), 4)
                schedules = [
                    Schedule.uniform(layers, algorithm="2dh"),
                    Schedule.uniform(layers, algorithm="rounds", rounds=rounds),
                ]
                change["prefill"], change["decode"] = schedules[:: 1 if index % 2 else -1]
            if (kind, mode) == ("gpt_oss", "per_rank"):
                row_p = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, -1, -1, -1, -1]
                change["slot_expert_LP"] = np.tile(row_p, (layers, 1))
            plan = tiny.make_plan(folder, 4, mode=mode, ranks_per_node=2, replica_choice=CHOICES[turn % 2], **change)
            plans[kind, mode] = plan
            jobs[kind, mode] = job_for(tmp_path, tiny, folder, plan, mode, rank_q, warmup=int(kind == "olmoe"))
    timelines = run_ranks(list(jobs.values()), num_ranks=4, timeout_s=GENEROUS_S, entry=WORKER)
    for (kind, mode), timeline in zip(jobs, timelines, strict=True):
        expected, plan = tiny.single_process_tokens(checkpoints[kind], NEW_TOKENS), plans[kind, mode]
        about = timeline.about
        assert about["generated"] == expected, (kind, mode)
        assert (about["mode"], about["dtype"], about["request_rank"]) == (mode, "float32", list(rank_q))
        assert about["algorithms"] == {one: list(plan.schedule(one).algorithm_L) for one in KINDS}
        check_spans(timeline, plan, tiny.TOP_K)
    lengths = {len(row) for kind in checkpoints for row in tiny.single_process_tokens(checkpoints[kind], NEW_TOKENS)}
    assert max(lengths) == NEW_TOKENS
    assert min(lengths) < NEW_TOKENS, "no request ended at an end-of-sequence token: choose another"


def write_tokenizer(folder):
    """A tokenizer of words w0, w1, ...: word i is token i."""
    words = {f"w{index}": index for index in range(64)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_texts_in_texts_out_and_the_routing_recorded(checkpoints, tiny, tmp_path):
    """Each rank on a host of its own, which is a command that notes that it was asked."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["olmoe"], folder)
    write_tokenizer(folder)
    texts = tmp_path / "prompts.txt"
    texts.write_text("\n".join(" ".join(f"w{token}" for token in prompt) for prompt in tiny.PROMPTS) + "\n\n")
    pipelined = Schedule.uniform(2, degree=2)
    plan = tiny.make_plan(folder, 2, mode="per_expert", decode=pipelined)
    notes, said = [tmp_path / "host-0", tmp_path / "host-1"], []
    command = ("sh", "-c", 'echo started > "$0" && exec "$@"')
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    timeline, completions, warnings = generate(
        plan,
        folder,
        read_prompts(texts),
        max_new_tokens=NEW_TOKENS,
        ranks=2,
        settings=RunSettings(warmup=1, timeout_s=GENEROUS_S),
        record_path=tmp_path / "trace",
        hosts=[Host(prefix=(*command, str(note)), address="127.0.0.1", interface=loopback, ranks=1) for note in notes],
        progress=said.append,
    )
    assert [note.read_text() for note in notes] == ["started\n"] * 2
    (warning,) = warnings
    assert warning.startswith("the plan's decode schedule cuts layers into up to 2 chunks")
    assert said == ["generating for 4 requests"]
    expected = tiny.single_process_tokens(folder, NEW_TOKENS)
    assert [list(one.token_ids) for one in completions] == expected
    assert [one.prompt_ids for one in completions] == list(tiny.PROMPTS)
    assert [one.text for one in completions] == [" ".join(f"w{token}" for token in row) for row in expected]
    assert [one.rank for one in completions] == [0, 1, 0, 1]

    trace = load_trace(tmp_path / "trace")
    fed = [list(prompt) + row[:-1] for prompt, row in zip(tiny.PROMPTS, expected, strict=True)]
    assert trace.num_tokens == sum(timeline.about["tokens_by_iteration"]) == sum(map(len, fed))
    for request, tokens in enumerate(fed):
        mine = np.flatnonzero(trace.request_id_T == request)
        assert trace.token_id_T[mine].tolist() == tokens
        assert trace.position_T[mine].tolist() == list(range(len(tokens)))
        prompt = len(tiny.PROMPTS[request])
        assert trace.phase_T[mine].tolist() == [0] * prompt + [1] * (len(tokens) - prompt)
        assert set(trace.source_rank_T[mine].tolist()) == {request % 2}
        check_routing(checkpoints["olmoe"], tokens, trace.expert_LTK[:, mine], trace.weight_LTK[:, mine])


def check_routing(folder, tokens, expert_ltk, weight_ltk):
    """The experts recorded are those that the single-process model's routers choose for the whole sequence."""
    import torch
    import transformers

    model, seen = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: seen.append(output[1:]))
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    for (weight_tk, expected_tk), expert_tk, recorded_tk in zip(seen, expert_ltk, weight_ltk, strict=True):
        assert (expected_tk.numpy() == expert_tk).all()
        assert np.allclose(weight_tk.numpy(), recorded_tk.astype(np.float32), atol=1e-3)
