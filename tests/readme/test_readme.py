"""The README's commands run, its generated blocks are fresh, its links lead somewhere, its Python works."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
PLACER = [sys.executable, "-c", "from placer.cli import main; main()"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_script", ROOT / "scripts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_block(block: str, folder: Path) -> list[str]:
    """Runs every `$ placer ...` or `$ python ...` line of a block in `folder`; returns what each printed."""
    printed = []
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    for line in block.splitlines():
        words = shlex.split(line.removeprefix("$ "))
        command = {"placer": PLACER, "python": [sys.executable]}[words[0]]
        done = subprocess.run([*command, *words[1:]], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tour")
    run_block(BLOCKS[0], folder)
    return folder


def test_the_tour_leaves_what_it_says(tour: Path) -> None:
    wanted = ("plan.json", "predicted.json", "chrome.json", "sglang.json", "profile.safetensors")
    assert all((tour / name).stat().st_size > 100 for name in wanted)


@pytest.mark.dist
def test_the_measured_part_of_the_tour(tour: Path) -> None:
    pytest.importorskip("torch")
    printed = run_block(BLOCKS[1], tour)
    assert "measured: " in printed[0]
    assert "as fast" in printed[0]
    assert "measured" in printed[1]
    assert "Prediction error" in printed[1]


def test_the_device_part_of_the_tour(tour: Path) -> None:
    pytest.importorskip("torch")
    printed = run_block(BLOCKS[2], tour)
    assert "resident MiB" in printed[1]
    assert "simulated: " in printed[2]
    assert "Prediction error" in printed[3]
    assert (tour / "manifest.json").stat().st_size > 100


def test_the_proof_of_the_tour_is_verified_and_the_next_plan_says_what_moves(tour: Path) -> None:
    printed = run_block(BLOCKS[3], tour)
    assert "verified on this trace" in printed[1]
    assert "moved from the plan given" in printed[2]


def test_the_python_example_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1.0 < float(done.stdout.splitlines()[-1]) < 2.0


def test_generated_blocks_are_fresh() -> None:
    assert load_script().updated(README) == README, "run python scripts/readme.py"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_demo_prints_its_out_file(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "examples" / "01_demo.py"), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "examples" / "01_demo.out").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} >= {"plan.json", "chrome-trace.json", "sglang.json"}
