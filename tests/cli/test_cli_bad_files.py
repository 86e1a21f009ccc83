"""Bad input, files: empty, truncated, corrupt, of another kind. One line, exit code 3, nothing written."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_cases import (
    PLAN_READERS,
    TRACE,
    readers_of,
    write,
    write_npz,
)
from cli_runner import placer, refused

# --- empty files


def test_an_empty_trace(work: Path) -> None:
    write("empty", b"")
    for call in readers_of("empty"):
        refused(3, *call, says="empty: ", folder=work)


def test_an_empty_plan_timeline_and_cluster(work: Path) -> None:
    write("empty", b"")
    for call in PLAN_READERS:
        refused(3, *call("empty"), says="empty: is not JSON", folder=work)
    refused(3, "compare", "empty", says="empty: is not JSON", folder=work)
    write("empty.yaml", b"")
    refused(3, "solve", TRACE, "--cluster", "empty.yaml", says="empty.yaml: is empty; give name, nodes", folder=work)


def test_a_trace_without_tokens(work: Path) -> None:
    write_npz("none.npz", expert_TLK=np.zeros((0, 2, 2), dtype=np.uint8))
    for call in readers_of("none.npz"):
        refused(3, *call, says=("none.npz", "record some requests"), folder=work)


# --- truncated files


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", [TRACE, "profile.safetensors"])
def test_a_truncated_trace_or_profile(name: str, share: float, work: Path) -> None:
    content = Path(name).read_bytes()
    write("cut", content[: max(1, int(share * len(content)))])
    for call in readers_of("cut"):
        refused(3, *call, says="cut: ", folder=work)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_plan_timeline_or_npz(share: float, work: Path) -> None:
    def cut(name: str) -> str:
        content = Path(name).read_bytes()
        return write("cut", content[: max(1, int(share * len(content)))])

    cut("plan.json")
    for call in PLAN_READERS:
        refused(3, *call("cut"), says="cut: is not JSON", folder=work)
    refused(3, "compare", cut("time.json"), says="cut: is not JSON", folder=work)
    write_npz("whole.npz", expert_TLK=np.arange(96, dtype=np.uint8).reshape(12, 4, 2) % 8)
    cut("whole.npz")
    for call in readers_of("cut"):
        refused(3, *call, says="cut: ", folder=work)


# --- corrupt files


def test_corrupt_traces(work: Path) -> None:
    """A bit flipped anywhere in the header, or ids beyond the model's: never a traceback, never a wrong answer."""
    content = bytearray(Path(TRACE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    codes = set()
    for place in rng.choice(header, 60, replace=False).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        write("damaged", bytes(damaged))
        outcome = placer("trace", "info", "damaged", "--json")
        codes.add(outcome.code)
        if outcome.code:
            assert (outcome.code, outcome.out) == (3, "")
            assert outcome.err.startswith("placer: damaged: ")
            assert outcome.err.count("\n") == 1
    assert 3 in codes


def test_a_corrupt_archive(work: Path) -> None:
    write("broken.npz", b"PK\x03\x04" + b"garbage" * 30)
    for call in readers_of("broken.npz"):
        refused(3, *call, says="broken.npz: is a damaged archive", folder=work)


def test_corrupt_json(work: Path) -> None:
    write("bad.json", "{'format': placer-plan}")
    for call in PLAN_READERS:
        refused(3, *call("bad.json"), says="bad.json: is not JSON", folder=work)
    write("bad.jsonl", '{"experts": [[1, 2]]}\n{"experts": [[1, \n')
    for call in readers_of("bad.jsonl"):
        refused(3, *call, says=("bad.jsonl", "line 2"), folder=work)


# --- wrong magic


@pytest.mark.parametrize(
    "content", [b"GIF89a" + bytes(50), b"\x7fELF" + bytes(60), b"%PDF-1.7\n", bytes(100), b"PAR1" + bytes(20)],
    ids=["gif", "elf", "pdf", "zeros", "parquet"],
)  # fmt: skip
def test_wrong_magic(content: bytes, work: Path) -> None:
    write("strange", content)
    for call in readers_of("strange"):
        refused(3, *call, says="strange: is none of placer trace, npz, JSON lines", folder=work)
    for call in PLAN_READERS:
        refused(3, *call("strange"), says="strange: is not", folder=work)
    refused(3, "compare", "strange", says="strange: is not", folder=work)


def test_a_tensor_file_of_something_else(work: Path) -> None:
    """A checkpoint is a safetensors file too."""
    from safetensors.numpy import save_file

    save_file({"model.layers.0.mlp.weight": np.zeros((4, 4), dtype=np.float32)}, "model.safetensors")
    for call in readers_of("model.safetensors"):
        refused(3, *call, says="model.safetensors: is not a placer trace", folder=work)


def test_a_trace_in_the_place_of_a_plan_and_the_other_way_round(work: Path) -> None:
    for call in PLAN_READERS:
        refused(3, *call(TRACE), says=f"{TRACE}: is not JSON", folder=work)
        refused(3, *call("time.json"), says="time.json: is not a placer plan", folder=work)
    refused(3, "compare", "plan.json", says="plan.json: is not a placer Timeline", folder=work)
    for call in readers_of("plan.json"):
        refused(3, *call, says="plan.json: ", folder=work)


# --- a pickle that is not a tensor file


class Bomb:
    """Unpickling this would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("pwned"), "x"))


@pytest.mark.parametrize("name", ["dump.pt", "dump.pkl", "dump"])
@pytest.mark.parametrize("content", [{"records": [1, 2]}, [1, 2, 3], Bomb()], ids=["dict", "list", "code"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "zipped"])
def test_a_pickle_that_is_no_tensor_file(name: str, content: object, wrapped: bool, work: Path) -> None:
    data = pickle.dumps(content)
    if wrapped:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
        data = buffer.getvalue()
    write(name, data)
    for call in readers_of(name)[:3]:
        outcome = placer(*call)
        assert outcome.code in (3, 9), outcome.err  # 9 where torch is not installed
        assert outcome.out == ""
        assert outcome.err.startswith("placer: ")
        assert outcome.err.count("\n") == 1, outcome.err
    assert not Path("pwned").exists()
    assert not Path("new.out").exists()
