"""One small trace and what the verbs make of it, made once and copied for each test that writes."""

from pathlib import Path

import pytest
from cli_runner import placer

from traces.store import save_trace
from traces.synthetic import synthesize


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trace.safetensors, other.safetensors (other tokens), plan.json, profile.safetensors, time.json."""
    folder = tmp_path_factory.mktemp("made")
    sizes = {"num_layers": 2, "num_experts": 8, "top_k": 2, "num_tokens": 600, "num_requests": 30}
    for name, seed in (("trace", 1), ("other", 2)):
        save_trace(synthesize(**sizes, seed=seed, popularity_sigma=0.4), folder / f"{name}.safetensors")
    trace = folder / "trace.safetensors"
    for arguments in (
        ("solve", trace, "--cluster", "node4", "-o", folder / "plan.json"),
        ("profile", trace, "-o", folder / "profile.safetensors"),
        ("simulate", folder / "plan.json", "--trace", trace, "--cluster", "node4", "-o", folder / "time.json"),
    ):
        outcome = placer(*arguments)
        assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder with copies of those files."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path
