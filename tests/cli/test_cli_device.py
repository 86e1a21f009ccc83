"""`placer device`: plan, simulate, run and export on random planes; what is refused, in one line."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from cli_runner import placer, refused, run_json

from placer.config.devices import save_device
from placer.core.cluster import LinkClass
from placer.core.device.ladder import LADDERS, expert_shapes
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import plane_key
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.timeline import Timeline
from traces.plane_store import PlaneFileHeader, save_planes
from traces.store import save_trace
from traces.synthetic import synthesize
from traces.tensorfile import read_tensor_file

LAYERS, EXPERTS, HIDDEN, INNER = 2, 8, 32, 24
NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
PLAN = ("device", "plan", "train.safetensors", "--planes", "planes.safetensors", "--device", "device.yaml")
RUN = ("device", "run", "plan.json", "--planes", "planes.safetensors", "--device", "device.yaml", "-o", "new.out")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random planes, the machine in a file, two traces, settings, and a plan at half of the planes' bytes."""
    folder = tmp_path_factory.mktemp("device")
    ladder, shapes = LADDERS["v1"], expert_shapes(HIDDEN, INNER)
    header = PlaneFileHeader(
        model="case",
        num_hidden_layers=LAYERS,
        moe_layers=tuple(range(LAYERS)),
        num_experts=EXPERTS,
        ladder=ladder,
        shapes=shapes,
        about={"method": "random"},
    )
    rng = np.random.default_rng(0)
    pieces = [
        # codes and half-precision scales alike: bytes below 60 are small finite numbers
        (site, expert, plane, rng.integers(0, 60, size, dtype=np.uint8))
        for site in range(LAYERS)
        for expert in range(EXPERTS)
        for plane, size in enumerate(ladder.plane_bytes_K(shapes))
    ]
    error_LEK = np.tile([0.1, 0.02, 0.005], (LAYERS, EXPERTS, 1))
    index = save_planes(folder / "planes.safetensors", header, pieces, lambda: error_LEK)
    compute = DeviceCompute(layer_us=50, base_us=40, residual_us=10, ffn_tokens=(1, 16), ffn_us=(10.0, 60.0))
    device = DeviceSpec(
        name="case",
        memory_mib=index.total_bytes / 2**21,
        disk=LinkClass(gbytes_per_s=0.05, alpha_us=20),
        compute=compute,
    )
    save_device(folder / "device.yaml", device)
    sizes = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "num_tokens": 400, "num_requests": 20}
    for name, seed in (("train", 1), ("test", 2)):
        save_trace(synthesize(**sizes, seed=seed), folder / f"{name}.safetensors")
    save_trace(synthesize(**{**sizes, "num_experts": 6}, seed=3), folder / "other.safetensors")
    settings = "device: {batch: 4, iterations: 10, warmup: 1, bit_shares: [0.3, 0.4, 0.3]}\n"
    (folder / "settings.yaml").write_text(settings)
    (folder / "ahead.yaml").write_text(settings.replace("{batch", "{predictor: transition, batch"))
    return folder


@pytest.fixture(scope="module")
def planned(prepared: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        outcome = placer(*PLAN, "-o", "plan.json", "--config", "settings.yaml")
    assert outcome.code == 0, outcome.err
    return prepared


@pytest.fixture
def folder(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in planned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_says_what_stays_and_how_far_from_the_best(folder: Path) -> None:
    data = run_json(*PLAN, "-o", "again.json", "--config", "settings.yaml")
    plan = DevicePlan.load(folder / "again.json")
    assert plan.to_json() == (folder / "plan.json").read_text()
    assert plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes <= plan.memory_bytes
    assert 0 < data["bound"] <= data["objective"]
    assert data["bound_by"]
    assert sum(data["experts_by_resident_level"]) == LAYERS * EXPERTS
    assert isinstance(data["offloading_pays"], bool)
    said = placer(*PLAN, "-o", "again.json", "--config", "settings.yaml")
    assert "Experts by level" in said.out
    assert "demand is drawn at random" in said.err


def test_more_memory_is_no_slower_and_quality_may_be_traded(folder: Path) -> None:
    slow, fast = (
        run_json(*PLAN, "-o", "x.json", "--config", "settings.yaml", "--memory", size) for size in ("8KiB", "32KiB")
    )
    assert fast["objective"] <= slow["objective"]
    clipped = run_json(
        *PLAN, "-o", "x.json", "--config", "settings.yaml", "--memory", "8KiB", "--max-quality-cost", "0.01"
    )
    assert 0 <= clipped["quality_cost"] <= 0.01
    assert clipped["objective"] <= slow["objective"]


@pytest.mark.parametrize("fidelity", ["flow", "port"])
def test_simulate_writes_a_timeline_and_a_chrome_trace(folder: Path, fidelity: str) -> None:
    call = ("device", "simulate", "plan.json", "--trace", "test.safetensors", "--device", "device.yaml")
    more = ("--config", "settings.yaml", "--fidelity", fidelity, "-o", "time.json", "--chrome", "chrome.json")
    data = run_json(*call, *more)
    assert data["about"]["source"] == "simulated"
    assert Timeline.load(folder / "time.json").num_iterations == 10
    assert json.loads((folder / "chrome.json").read_text())["traceEvents"]


def test_another_machine_is_told(folder: Path) -> None:
    call = ("device", "simulate", "plan.json", "--trace", "test.safetensors", "--device", "device.yaml", "-o", "t.json")
    assert "another machine" not in placer(*call, "--config", "settings.yaml").err
    text = (folder / "device.yaml").read_text()
    (folder / "device.yaml").write_text(text.replace("layer_us: 50", "layer_us: 60"))
    assert "the plan was made for another machine" in placer(*call, "--config", "settings.yaml").err
    (folder / "device.yaml").write_text(text)
    planned = placer(*PLAN, "-o", "plan.json", "--config", "settings.yaml", "--memory", "8KiB")
    assert planned.code == 0
    assert "another machine" not in placer(*call, "--config", "settings.yaml").err


def test_reading_ahead_needs_something_to_learn_from(folder: Path) -> None:
    ahead = ("--config", "ahead.yaml")
    refused(2, *PLAN, "-o", "new.out", *ahead, says="give --learn, a trace of other requests", folder=folder)
    outcome = placer(*PLAN, "-o", "ahead.json", *ahead, "--learn", "test.safetensors")
    assert outcome.code == 0, outcome.err
    plan = DevicePlan.load(folder / "ahead.json")
    assert (plan.prefetch_layers == 1) == ("reading ahead: " in outcome.err)
    assert plan.bound is None or plan.prefetch_layers == 0


@NEEDS_TORCH
def test_run_measures_and_predicts(folder: Path) -> None:
    call = (*RUN[:-1], "measured.json", "--trace", "test.safetensors")
    data = run_json(*call, "--config", "settings.yaml")
    measured, predicted = (Timeline.load(folder / name) for name in ("measured.json", "measured.predicted.json"))
    assert [one["name"] for one in data["timelines"]] == ["measured", "predicted"]
    assert data["errors"]
    loads = [int(one.received_bytes.sum()) for one in (measured, predicted)]
    assert loads[0] == loads[1]
    assert measured.about["peak_plane_bytes"] <= measured.about["memory_bytes"]


@pytest.mark.parametrize(("to", "name"), [("planes", "x.json"), ("llamacpp", "x.sh")])
def test_export_writes_and_warns(folder: Path, to: str, name: str) -> None:
    data = run_json("device", "export", "plan.json", "--to", to, "--planes", "planes.safetensors", "-o", name)
    assert (folder / name).stat().st_size > 0
    assert data["launch"]
    assert (to != "llamacpp") or data["warnings"]


def test_a_damaged_plane_is_named_before_anything_runs(folder: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    at = read_tensor_file(folder / "planes.safetensors").first_byte[plane_key(1, 3, 2)]
    with (folder / "planes.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff\x00\xff")
    outcome = placer(*RUN, "--trace", "test.safetensors")
    assert outcome.code == 3
    # progress comes before it
    assert "layer 1 expert 3 plane 2 has another checksum" in outcome.err.splitlines()[-1]
    assert not (folder / "new.out").exists()


@pytest.mark.parametrize(
    ("code", "call", "says"),
    [
        (2, RUN, "run needs either --trace TRACE, or --model DIR with --text FILE"),
        (2, (*RUN, "--trace", "test.safetensors", "--text", "p.txt"), "run needs either --trace TRACE"),
        (3, (*RUN, "--trace", "nowhere"), "nowhere: does not exist"),
        (3, ("device", "run", "plan.json", "--planes", "train.safetensors", "--trace", "test.safetensors", "--device",
             "device.yaml", "-o", "o"), "holds no expert planes"),
        (2, (*RUN, "--trace", "test.safetensors", "--routers", "r"), "--model and --routers go with --text"),
        (2, (*RUN, "--model", ".", "--text", "p", "--learn", "l"), "--learn goes with --trace"),
        (2, (*RUN, "--trace", "test.safetensors", "--learn", "train.safetensors"), "device.predictor is none"),
        (4, (*RUN, "--trace", "other.safetensors"), "with 2 sites of 6 experts, the plan is for 'case' with 2 of 8"),
        (3, (*PLAN, "-o", "new.out", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (2, (*PLAN, "-o", "new.out", "--memory", "much"), "--memory 'much' is not an amount; write 512MiB"),
        (5, (*PLAN, "-o", "new.out", "--memory", "1KiB"), "the smallest"),
        (4, ("device", "plan", "other.safetensors", *PLAN[3:], "-o", "new.out"), "2 sites of 6 experts"),
        (3, ("device", "simulate", "train.safetensors", "--trace", "test.safetensors", "--device", "device.yaml", "-o",
             "new.out"), "is not JSON"),
        (2, ("device", "simulate", "plan.json", "--trace", "test.safetensors", "--device", "device.yaml", "-o",
             "new.out", "--fidelity", "phase"), "fidelity is 'phase'"),
        (2, ("device", "export", "plan.json", "--to", "pigeon", "-o", "new.out"), "no exporter for 'pigeon'"),
        (2, ("device", "export", "plan.json", "--to", "planes", "-o", "new.json"), "planes"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(folder: Path, code: int, call: tuple[str, ...], says: str) -> None:
    refused(code, *call, says=says, folder=folder)


def test_the_yaml_is_strict(folder: Path) -> None:
    text = (folder / "device.yaml").read_text()
    (folder / "device.yaml").write_text(text.replace("memory_mib", "memory_mb"))
    refused(3, *PLAN, "-o", "new.out", says="unknown key 'memory_mb'; did you mean 'memory_mib'?", folder=folder)
    (folder / "device.yaml").write_text(text)
    (folder / "settings.yaml").write_text("device: {bit_shares: [0.5, 0.2]}\n")
    refused(3, *PLAN, "-o", "new.out", "--config", "settings.yaml", says="bit_shares", folder=folder)
