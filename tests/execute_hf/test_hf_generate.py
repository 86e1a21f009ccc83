"""Real ranks generate what the single-process model generates, token for token, and say what went wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from placer.config.settings import RunSettings
from placer.core.errors import InputFileError
from placer.core.timeline import PHASES
from placer.execute.hf import GENERATION_MODES, GenerateJob, generate_tokens
from placer.execute.hf.measure import WORKER
from placer.execute.launch import run_ranks
from placer.pipeline.generating import generate, read_prompts
from traces.store import load_trace

pytestmark = pytest.mark.dist

NEW_TOKENS = 8
GENEROUS_S = 180.0


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


def test_two_ranks_generate_the_same_tokens_for_every_model_and_mode(checkpoints, tiny, tmp_path):
    jobs, plans = {}, {}
    for index, (kind, folder) in enumerate(checkpoints.items()):
        for turn, mode in enumerate(GENERATION_MODES):
            replicas = (index + turn) % 2
            plan = tiny.make_plan(folder, 2, slots_per_rank=4 + replicas, seed=index, mode=mode)
            plans[kind, mode] = plan
            jobs[kind, mode] = job_for(tmp_path, tiny, folder, plan, mode, (0, 1, 0, 1))
    timelines = run_ranks(list(jobs.values()), num_ranks=2, timeout_s=GENEROUS_S, entry=WORKER)
    for (kind, mode), timeline in zip(jobs, timelines, strict=True):
        expected = tiny.single_process_tokens(checkpoints[kind], NEW_TOKENS)
        assert timeline.about["generated"] == expected, (kind, mode)
        assert (timeline.about["mode"], timeline.about["dtype"]) == (mode, "float32")
        check_spans(timeline, plans[kind, mode], tiny.TOP_K)
    lengths = {len(row) for kind in checkpoints for row in tiny.single_process_tokens(checkpoints[kind], NEW_TOKENS)}
    assert max(lengths) == NEW_TOKENS
    assert min(lengths) < NEW_TOKENS, "no request ended at an end-of-sequence token: choose another"


def test_four_ranks_with_replicas_a_rank_without_a_prompt_and_one_without_experts(checkpoints, tiny, tmp_path):
    folder = checkpoints["gpt_oss"]
    row_P = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, -1, -1, -1, -1]
    slots = np.tile(row_P, (3, 1))
    plans = [
        tiny.make_plan(folder, 4, slots_per_rank=4, slot_expert_LP=slots, replica_choice="round_robin"),
        tiny.make_plan(folder, 4, slots_per_rank=3, seed=4, replica_choice="visit_first"),
    ]
    jobs = []
    for index, plan in enumerate(plans):
        (tmp_path / str(index)).mkdir()
        jobs.append(job_for(tmp_path / str(index), tiny, folder, plan, "per_rank", (3, 0, 0, 1), warmup=0))
    for plan, timeline in zip(plans, run_ranks(jobs, num_ranks=4, timeout_s=GENEROUS_S, entry=WORKER), strict=True):
        assert timeline.about["generated"] == tiny.single_process_tokens(folder, NEW_TOKENS)
        assert timeline.about["request_rank"] == [3, 0, 0, 1]
        check_spans(timeline, plan, tiny.TOP_K)


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
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["olmoe"], folder)
    write_tokenizer(folder)
    texts = tmp_path / "prompts.txt"
    texts.write_text("\n".join(" ".join(f"w{token}" for token in prompt) for prompt in tiny.PROMPTS) + "\n\n")
    plan = tiny.make_plan(folder, 2, mode="per_expert")
    said = []
    timeline, completions, warnings = generate(
        plan,
        folder,
        read_prompts(texts),
        max_new_tokens=NEW_TOKENS,
        ranks=2,
        settings=RunSettings(warmup=1, timeout_s=GENEROUS_S),
        record_path=tmp_path / "trace",
        progress=said.append,
    )
    assert warnings == []
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


def test_a_checkpoint_without_one_expert_is_refused_by_the_rank_that_needs_it(checkpoints, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["qwen3_moe"], folder)
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "layers.2.mlp.experts.5." not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    plan = tiny.make_plan(folder, 2, slot_expert_LP=np.tile(np.arange(8), (2, 1)))
    with pytest.raises(InputFileError, match=rf"rank 1: {folder}: layer 2 expert 5 has no gate matrix"):
        generate_tokens(plan, folder, tiny.PROMPTS, max_new_tokens=1, timeout_s=GENEROUS_S)
