"""Device plans in other loaders' files, read here by their rules and without the exporters' code."""

import hashlib
import json
import re
import shlex
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from device_plans_for_export import device_plan, device_plans, plane_file
from hypothesis import HealthCheck, given, settings

from placer.core.errors import DependencyError, InputFileError, MismatchError, UsageError
from placer.export import DEVICE_EXPORTERS, export_device_plan

ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)


def mask_as_ktransformers(table, ratio, moe_layers, torch):
    """What its start does with the table and the flag: add the steps, take the largest counts of all layers."""
    counts = table["logical_count"]
    assert counts.dim() == 3
    frequency = counts.sum(dim=0).float()
    number = int(len(moe_layers) * frequency.shape[1] * ratio)
    mask = torch.zeros(frequency.numel(), dtype=torch.bool)
    mask[torch.topk(frequency.view(-1), k=number, sorted=False).indices] = True
    return mask.view(frequency.shape)[list(moe_layers)].numpy()


@ONE_FOLDER
@given(plan=device_plans())
def test_ktransformers_makes_our_resident_mask_of_the_counts(plan, tmp_path):
    torch = pytest.importorskip("torch")
    flags, _ = export_device_plan(plan, None, "ktransformers", tmp_path / "counts.pt")
    words = shlex.split(flags)
    assert words[words.index("--init-expert-location") + 1] == str(tmp_path / "counts.pt")
    ratio = float(words[words.index("--kt-gpu-experts-ratio") + 1])
    assert 0 < ratio <= 1
    table = torch.load(tmp_path / "counts.pt", weights_only=True)
    assert table["logical_count"].shape == (1, plan.num_hidden_layers, plan.num_experts)
    assert np.array_equal(mask_as_ktransformers(table, ratio, plan.moe_layers, torch), plan.resident_LE > 0)


def test_ktransformers_warns_of_what_it_does_otherwise(tmp_path):
    pytest.importorskip("torch")
    partly = device_plan(resident_LE=np.full((2, 4), 1), ceiling_LE=np.full((2, 4), 3), cache="lru", cache_bytes=9)
    _, warnings = export_device_plan(partly, None, "ktransformers", tmp_path / "a.pt")
    assert "8 experts are resident with some" in warnings[0]
    assert "cache and prefetching are not exported" in warnings[1]
    whole = device_plan(resident_LE=np.full((2, 4), 3), ceiling_LE=np.full((2, 4), 3))
    assert export_device_plan(whole, None, "ktransformers", tmp_path / "b.pt")[1] == ()


def test_without_torch_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"placer\[torch\]"):
        export_device_plan(device_plan(), None, "ktransformers", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def commands_of(path):
    return [shlex.split(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]


@ONE_FOLDER
@given(plan=device_plans())
def test_llamacpp_lines_say_layers_and_what_they_cost(plan, tmp_path):
    flags, (warning,) = export_device_plan(plan, None, "llamacpp", tmp_path / "run.sh")
    server, quantize = commands_of(tmp_path / "run.sh")
    assert shlex.split(flags) == server[3:]
    pattern = server[server.index("-ot") + 1].removesuffix("=CPU") if "-ot" in server else "$^"
    on_cpu = [layer for layer in range(9) if re.search(pattern, f"blk.{layer}.ffn_up_exps.weight")]
    assert set(on_cpu) <= set(plan.moe_layers)
    assert not re.search(pattern, f"blk.{plan.moe_layers[0]}.attn_q.weight")
    # what the layers kept need, at their highest level, fits
    sizes = np.array(plan.plane_bytes_K)
    kept = [row for row, layer in enumerate(plan.moe_layers) if layer not in on_cpu]
    highest = plan.ceiling_LE.max(axis=1)
    need = [plan.num_experts * (sizes[:level].sum() if plan.ladder.nested else sizes[level - 1]) for level in highest]
    assert sum(need[row] for row in kept) <= max(plan.memory_bytes, plan.resident_bytes)
    resident_LE = plan.resident_LE > 0
    dropped = sum(int(resident_LE[row].sum()) for row in range(len(highest)) if row not in kept)
    added = sum(int((plan.resident_LE[row] < highest[row]).sum()) for row in kept)
    for text in (warning, (tmp_path / "run.sh").read_text()):
        assert "nothing finer" in text
        assert f"{dropped} of {int(resident_LE.sum())} resident experts" in text
        assert f"and {added} experts that the plan does not keep whole" in text
    types = [word.split("=") for word in quantize if word.startswith("blk")]
    for row, layer in enumerate(plan.moe_layers):
        (kind,) = {kind for name, kind in types if re.search(name, f"blk.{layer}.ffn_down_exps.weight")}
        assert kind == f"q{plan.ladder.bits_K[highest[row] - 1]}_K"
    short = re.search(r"--n-cpu-moe (\d+)", (tmp_path / "run.sh").read_text())
    if short:
        assert [layer for layer in plan.moe_layers if layer < int(short[1])] == on_cpu
    else:
        assert min(plan.moe_layers[row] for row in kept) < max(on_cpu)


def test_llamacpp_keeps_the_layer_with_the_most_resident_bytes(tmp_path):
    ceiling = np.full((3, 4), 3)
    plan = device_plan(
        layers=(0, 2, 4), resident_LE=np.array([[0, 0, 1, 0], [3, 3, 3, 0], [1, 1, 0, 0]]), ceiling_LE=ceiling
    )
    plan = replace(plan, memory_bytes=4 * sum(plan.plane_bytes_K) + 5)
    _, (warning,) = export_device_plan(plan, None, "llamacpp", tmp_path / "run.txt")
    text = (tmp_path / "run.txt").read_text()
    assert r"-ot 'blk\.(0|4)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'" in text
    assert "--n-cpu-moe cannot say these layers" in text
    assert "3 of 6 resident experts" in warning
    assert "1 experts that the plan does not keep whole" in warning


def weights_by_manifest(manifest, raw, layer, expert, level):
    """An expert's matrices from the manifest and the file alone, by the words of its `layout`."""
    nested, group = manifest["ladder"]["nested"], manifest["ladder"]["group_size"]
    rows_of = {r["plane"]: r for r in manifest["planes"] if (r["layer"], r["expert"]) == (layer, expert)}
    result = [0.0] * len(manifest["matrices"])
    for plane in range(level) if nested else [level - 1]:
        row = rows_of[plane]
        part = raw[row["offset"] : row["offset"] + row["length"]]
        assert zlib.crc32(part) == row["crc32"]
        at = 0

        def take(count, part=part):
            nonlocal at
            at += count
            return part[at - count : at]

        for number, matrix in enumerate(manifest["matrices"]):
            rows, columns, width = matrix["rows"], matrix["columns"], row["width"]
            stride, groups = -(-columns * width // 8), -(-columns // group)
            packed = np.frombuffer(take(rows * stride), np.uint8).reshape(rows, stride)
            bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : columns * width]
            code = (bits.reshape(rows, columns, width) << np.arange(width)).sum(axis=2)
            group_of = np.arange(columns) // group
            scale = np.frombuffer(take(rows * groups * 2), "<f2").reshape(rows, groups)[:, group_of].astype(float)
            if plane == 0 or not nested:
                offset = np.frombuffer(take(rows * groups * 2), "<f2").reshape(rows, groups)[:, group_of].astype(float)
                result[number] = offset + scale * code
            else:
                result[number] = result[number] + np.where(code == 1, scale, -scale)
        assert at == row["length"]
    return result


@pytest.mark.parametrize("nested", [True, False])
def test_weights_come_back_from_the_manifest_alone(nested, tmp_path):
    plan = device_plan(nested=nested)
    planes, weights = plane_file(tmp_path / "experts.planes", plan)
    export_device_plan(plan, planes, "planes", tmp_path / "experts.json")
    manifest = json.loads((tmp_path / "experts.json").read_text())
    raw = (tmp_path / manifest["file"]["name"]).read_bytes()
    assert len(raw) == manifest["file"]["bytes"]
    assert hashlib.sha256(raw).hexdigest() == manifest["file"]["sha256"]
    assert len(manifest["planes"]) == plan.resident_LE.size * 3
    for (site, expert, level), wanted in weights.items():
        found = weights_by_manifest(manifest, raw, plan.moe_layers[site], expert, level)
        for one, other in zip(found, wanted, strict=True):
            assert np.array_equal(one, other)
    resident = sum(row["length"] for row in manifest["planes"] if row["resident"])
    assert resident == manifest["resident_bytes"] == plan.resident_bytes
    for row in manifest["planes"]:
        level = plan.resident_LE[plan.moe_layers.index(row["layer"]), row["expert"]]
        assert row["resident"] == (row["plane"] < level if nested else row["plane"] == level - 1)


def test_same_plan_same_bytes_and_no_temporary_file(tmp_path):
    pytest.importorskip("torch")
    plan = device_plan()
    planes, _ = plane_file(tmp_path / "experts.planes", plan)
    for name, exporter in DEVICE_EXPORTERS.items():
        paths = [tmp_path / f"{one}{exporter.suffixes[0]}" for one in "ab"]
        for path in paths:
            export_device_plan(plan, planes, name, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        for path in paths:
            path.unlink()
    assert list(tmp_path.iterdir()) == [tmp_path / "experts.planes"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    plan = device_plan()
    planes, _ = plane_file(tmp_path / "experts.planes", plan)
    with pytest.raises(UsageError, match="no exporter for 'ollama'"):
        export_device_plan(plan, None, "ollama", tmp_path / "x.sh")
    with pytest.raises(UsageError, match=r"ending in \.json"):
        export_device_plan(plan, planes, "planes", tmp_path / "x.txt")
    with pytest.raises(UsageError, match="give the plane file"):
        export_device_plan(plan, None, "planes", tmp_path / "x.json")
    with pytest.raises(MismatchError, match="num_experts 4, the plan 5"):
        export_device_plan(device_plan(experts=5), planes, "planes", tmp_path / "x.json")
    with pytest.raises(MismatchError, match="not the file that the plan was made for"):
        export_device_plan(replace(plan, hashes={"planes": "f" * 64}), planes, "llamacpp", tmp_path / "x.sh")
    export_device_plan(replace(plan, hashes={"planes": planes.sha256}), planes, "llamacpp", tmp_path / "x.sh")
    (tmp_path / "experts.planes").unlink()
    with pytest.raises(InputFileError, match="cannot be read"):
        export_device_plan(plan, planes, "planes", tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.sh"]


@pytest.mark.parametrize("name", sorted(DEVICE_EXPORTERS))
def test_a_file_that_reads_back_otherwise_is_not_kept(name, tmp_path):
    """The exporter's own check can fail: the bytes of one plan are not another's."""
    pytest.importorskip("torch")
    plan = device_plan(resident_LE=np.array([[3, 0, 0, 0], [3, 3, 3, 3]]), ceiling_LE=np.full((2, 4), 3))
    other = replace(plan, resident_LE=plan.resident_LE[::-1].copy())
    planes, _ = plane_file(tmp_path / "experts.planes", plan)
    mixed = replace(DEVICE_EXPORTERS[name], encode=lambda *_: DEVICE_EXPORTERS[name].encode(other, planes))
    with pytest.raises(InputFileError, match="reads back otherwise"):
        mixed.write(plan, planes, tmp_path / f"x{mixed.suffixes[0]}")
    assert [path.name for path in tmp_path.iterdir()] == ["experts.planes"]
