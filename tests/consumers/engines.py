"""Where the optional engine wheels are, and subprocesses that run their code: no engine module enters pytest."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SGLANG_VERSION = "0.5.23"
VLLM_VERSION = "0.33.0"
HERE = Path(__file__).resolve().parent
INSTALL = {
    "sglang": f"pip install --no-deps --target DIR sglang=={SGLANG_VERSION} msgspec einops tqdm",
    "vllm": f"pip download --no-deps vllm=={VLLM_VERSION} && unzip vllm-*.whl 'vllm/distributed/eplb/*' "
    f"'vllm-{VLLM_VERSION}.dist-info/*' -d DIR",
}
VERSIONS = {"sglang": SGLANG_VERSION, "vllm": VLLM_VERSION}


def engine_folders() -> list[str]:
    """Folders named by PLACER_ENGINES and PLACER_VLLM_WHEEL_DIR, in that order."""
    named = (os.environ.get(name, "") for name in ("PLACER_ENGINES", "PLACER_VLLM_WHEEL_DIR"))
    return [str(Path(folder).resolve()) for folder in named if folder]


def need_engine(name: str) -> None:
    """Skips the calling test, naming the command that installs the engine, unless its pinned version can be found."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is absent: pip install 'placer[torch]'")
    where = [*engine_folders(), *sys.path]
    found = {d.version for d in importlib.metadata.distributions(name=name, path=where)}
    if VERSIONS[name] not in found:
        has = f"found {', '.join(sorted(found))} instead" if found else "not found"
        pytest.skip(f"{name} {VERSIONS[name]} {has}: {INSTALL[name]}, then set PLACER_ENGINES=DIR")


def run_driver(driver: str, request: dict[str, Any]) -> dict[str, Any]:
    """What tests/consumers/`driver` answers to `request`: JSON in on standard input, the last line out is JSON."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    paths = [*engine_folders(), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, str(HERE / driver)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
