"""What placer refuses before any rank is started, each in one line that says what to do."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from placer.config.settings import RunSettings
from placer.core.errors import (
    DependencyError,
    ExecutionError,
    InputFileError,
    MismatchError,
    UsageError,
    ViolationError,
)
from placer.core.schedule import Schedule
from placer.execute.hf import (
    GenerateJob,
    check_model,
    encode,
    generate_tokens,
    measure,
    plain_greedy,
    unpipelined,
    worker,
)
from placer.execute.hf.backbone import load_backbone
from placer.execute.hf.prepare import Caches, prepare
from placer.pipeline.generating import generate, read_prompts


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a checkpoint, to be spoilt."""
    shutil.copytree(checkpoints["mixtral"], tmp_path / "model")
    return tmp_path / "model"


def change_json(path, **change):
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | change))


def valid_job(**change):
    fields = {
        "plan_path": "plan.json",
        "model_path": "model",
        "result_path": "out/result.json",
        "prompts": ((1, 2), (3,)),
        "rank_Q": (0, 1),
        "mode": "per_rank",
        "max_new_tokens": 4,
    }
    return GenerateJob(**fields | change)


def test_a_job_comes_back_from_its_file_with_paths_resolved(tmp_path):
    job = valid_job(record_path="trace", about={"model": "toy"})
    job.save(tmp_path / "job.json")
    paths = ("plan_path", "model_path", "result_path", "record_path")
    resolved = {name: str(tmp_path / getattr(job, name)) for name in paths}
    assert GenerateJob.load(tmp_path / "job.json") == replace(job, **resolved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mode": "coherent"}, "coherent, which needs every request's context on every rank; use one of per_expert"),
        ({"mode": "fast"}, "generate.mode is 'fast'"),
        ({"dtype": "float16"}, "generate.dtype"),
        ({"backend": "mpi"}, "generate.backend"),
        ({"max_new_tokens": 0}, "generate.max_new_tokens is 0"),
        ({"warmup": True}, "generate.warmup is True"),
        ({"timeout_s": 0}, "generate.timeout_s"),
        ({"prompts": (), "rank_Q": ()}, "generate.prompts is empty"),
        ({"prompts": ((1,), ())}, r"generate.prompts\[1\] is \(\)"),
        ({"prompts": ((1,), (-2,))}, r"generate.prompts\[1\]"),
        ({"rank_Q": (0,)}, "generate.rank_Q .* for 2 prompts"),
    ],
)
def test_jobs_that_make_no_sense(change, match):
    with pytest.raises(UsageError, match=match):
        valid_job(**change)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a generate job"),
        ('{"format": "placer-generate-job", "version": 1, "colour": 1}', "unknown field 'colour'"),
        ('{"format": "placer-generate-job", "version": 1}', "field 'prompts' is missing"),
        ('{"format": "placer-generate-job", "version": 1, "prompts": 3, "rank_Q": []}', "damaged generate job"),
    ],
)
def test_files_that_are_no_job(tmp_path, text, match):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(InputFileError, match=match):
        GenerateJob.load(tmp_path / "job.json")
    with pytest.raises(InputFileError, match="cannot be read"):
        GenerateJob.load(tmp_path / "absent.json")


def test_plans_for_another_model(folder, tiny):
    plan = tiny.make_plan(folder, 2)
    assert check_model(plan, folder).num_experts == 8
    more = replace(plan, num_experts=9, slot_expert_LP=plan.slot_expert_LP)
    with pytest.raises(MismatchError, match=rf"plan is for 9 experts, the model in {folder} has 8 experts"):
        check_model(more, folder)
    with pytest.raises(MismatchError, match=r"plan is for 1 MoE layers, .* has 2 MoE layers"):
        check_model(replace(plan, slot_expert_LP=plan.slot_expert_LP[:1], moe_layers=(0,)), folder)
    with pytest.raises(MismatchError, match=r"MoE layers at \[0, 2\], .* has MoE layers at \[0, 1\]"):
        check_model(replace(plan, moe_layers=(0, 2)), folder)
    with pytest.raises(MismatchError, match=r"plan is for 5 layers, .* has 2 layers"):
        check_model(replace(plan, num_hidden_layers=5), folder)
    lost = plan.slot_expert_LP.copy()
    lost[lost == 3] = 4
    with pytest.raises(ViolationError, match="expert 3"):
        check_model(replace(plan, slot_expert_LP=lost), folder)
    with pytest.raises(MismatchError, match="plan is for 2 ranks, not 3"):
        generate_tokens(plan, folder, tiny.PROMPTS, max_new_tokens=1, num_ranks=3)
    with pytest.raises(UsageError, match="coherent"):
        generate_tokens(plan, folder, tiny.PROMPTS, max_new_tokens=1, mode="coherent")


def test_models_that_placer_does_not_know(folder, tiny):
    plan = tiny.make_plan(folder, 2)
    for change, match in (
        ({"model_type": "llama"}, "model_type is 'llama'; placer generates with mixtral, qwen3_moe, olmoe, gpt_oss"),
        ({"model_type": "mixtral", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": "silu", "quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
    ):
        change_json(folder / "config.json", **change)
        with pytest.raises(InputFileError, match=match):
            check_model(plan, folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputFileError, match=r"config\.json: cannot be read .* checkpoint folder"):
        check_model(plan, folder)


def test_texts_without_a_tokenizer_and_prompts_that_are_none(folder, tiny, tmp_path):
    plan = tiny.make_plan(folder, 2)
    with pytest.raises(InputFileError, match=r"has no tokenizer .* give token ids"):
        generate(plan, folder, ["Guten Tag"])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputFileError, match="tokenizer cannot be read"):
        encode(folder, ["Guten Tag"])
    with pytest.raises(UsageError, match="there is no prompt"):
        generate(plan, folder, [])
    with pytest.raises(UsageError, match="either"):
        generate(plan, folder, ["Guten Tag", [1, 2]])
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(UsageError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(InputFileError, match="cannot be read as text"):
        read_prompts(tmp_path / "absent.txt")


def test_transformers_missing_or_too_old(folder, tiny, monkeypatch):
    plan = tiny.make_plan(folder, 2)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _name: "4.57.1")
        with pytest.raises(DependencyError, match=r"transformers 5 or later, 4\.57\.1 is installed; pip install"):
            generate(plan, folder, tiny.PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(DependencyError, match=r"pip install 'placer\[hf\]'"):
            generate(plan, folder, tiny.PROMPTS)


def test_what_a_rank_refuses(folder, tiny, tmp_path):
    plan = tiny.make_plan(folder, 2)
    plan.save(tmp_path / "plan.json")

    def prepare_with(**change):
        job = valid_job(plan_path=str(tmp_path / "plan.json"), model_path=str(folder), **change)
        return prepare(job, 0, 2, torch.device("cpu"), Caches(), lambda *_: None)

    with pytest.raises(MismatchError, match="a prompt has token 64; the model's vocabulary has 64"):
        prepare_with(prompts=((1,), (64,)))
    with pytest.raises(MismatchError, match="rank_Q has rank 2"):
        prepare_with(rank_Q=(0, 2))
    job = valid_job(plan_path=str(tmp_path / "plan.json"), model_path=str(folder))
    with pytest.raises(MismatchError, match="2 ranks, 4 were started"):
        prepare(job, 0, 4, torch.device("cpu"), Caches(), lambda *_: None)


@pytest.fixture
def second_rank(monkeypatch):
    """The environment of rank 1 of 2, and the launcher's way of telling it."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


def test_a_checkpoint_without_one_expert_is_refused_by_the_rank_that_needs_it(
    checkpoints, tiny, tmp_path, second_rank, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["qwen3_moe"], folder)
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "layers.2.mlp.experts.5." not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    plan = tiny.make_plan(folder, 2, slot_expert_LP=np.tile(np.arange(8), (2, 1)))
    plan.save(tmp_path / "plan.json")
    job = valid_job(plan_path=str(tmp_path / "plan.json"), model_path=str(folder))
    job.save(tmp_path / "job.json")
    assert prepare(job, 0, 2, torch.device("cpu"), Caches(), lambda *_: None).request_B == (0,)
    assert worker.main([str(tmp_path / "job.json")]) == InputFileError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"rank 1: {folder}: layer 2 expert 5 has no gate matrix")


def test_realtime_goes_to_the_ranks_and_is_refused_in_one_line(
    folder, tiny, tmp_path, second_rank, monkeypatch, capsys
):
    def capture(jobs, **options):
        jobs[0].save(tmp_path / "job.json")
        raise ExecutionError(str(options["hosts"]))

    def refuse(pid, policy, parameter):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(measure, "run_ranks", capture)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    settings = RunSettings(realtime=True)
    with pytest.raises(ExecutionError, match="some hosts"):
        generate(tiny.make_plan(folder, 2), folder, tiny.PROMPTS, settings=settings, hosts="some hosts")
    assert worker.main([str(tmp_path / "job.json")]) == ExecutionError.exit_code
    assert "rank 1: generate.realtime: this machine refuses SCHED_RR" in capsys.readouterr().err
    valid_job().save(tmp_path / "other.json")
    assert worker.main([str(tmp_path / "job.json"), str(tmp_path / "other.json")]) == UsageError.exit_code
    assert "need the same backend and realtime" in capsys.readouterr().err


def test_a_schedule_that_another_mode_does_not_have(folder, tiny):
    plan = tiny.make_plan(folder, 2, decode=Schedule.uniform(2, algorithm="2dh", degree=4))
    with pytest.raises(UsageError, match="mode allgather has no 2dh or rounds; use linear"):
        generate_tokens(plan, folder, tiny.PROMPTS, max_new_tokens=1, mode="allgather")
    assert unpipelined(replace(plan, decode=Schedule.uniform(2))) == []
    (warning,) = unpipelined(plan)
    assert "decode schedule cuts layers into up to 4 chunks" in warning


def test_checkpoints_that_lack_a_tensor_or_have_another_shape(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def refused(change, match):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file)
        with pytest.raises(InputFileError, match=match):
            load_backbone(folder, dtype=torch.float32, device=torch.device("cpu"))

    refused(
        {"model.layers.1.self_attn.k_proj.weight": None}, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight; give"
    )
    refused({"lm_head.weight": None}, r"lacks lm_head\.weight")
    refused({"model.norm.weight": torch.zeros(31)}, r"model\.norm\.weight is \(31,\), config\.json makes it \(32,\)")


def test_settings_that_change_greedy_tokens_are_warned_of(folder):
    assert plain_greedy(folder) == []
    change_json(folder / "generation_config.json", repetition_penalty=1.3, num_beams=1, do_sample=True)
    (warning,) = plain_greedy(folder)
    assert "repetition_penalty is 1.3" in warning
