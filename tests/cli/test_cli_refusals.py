"""Flags that make no sense, files that cannot be read or written, and outputs that stay whole."""

import os
from pathlib import Path

import pytest
from cli_runner import placer, refused

TRACE, CLUSTER = "trace.safetensors", ("--cluster", "node4")
SOLVE = ("solve", TRACE, *CLUSTER, "-o", "new.out")
SIMULATE = ("simulate", "plan.json", "--trace", TRACE, *CLUSTER, "-o", "new.out")
CHECK = ("check", "plan.json", "--trace", TRACE, *CLUSTER)
RUN = ("run", "plan.json", "-o", "new.out")
LONG = "x" * 300


@pytest.mark.parametrize(
    ("code", "call", "says"),
    [
        (2, RUN, "run needs either --trace TRACE, or --model DIR with --text FILE"),
        (2, (*RUN, "--text", "prompts.txt"), "run needs either --trace TRACE"),
        (2, (*RUN, "--trace", TRACE, "--text", "prompts.txt"), "run needs either --trace TRACE"),
        (2, (*RUN, "--model", ".", "--text", "p.txt", "--baseline", "plan.json"), "--baseline, --cluster and --for go"),
        (2, (*RUN, "--trace", TRACE, "--lab", "3x3x3"), "lab '3x3x3' is not known; write NODESxRANKS@RATE"),
        (4, (*RUN, "--trace", TRACE, "--lab", "2x1"), "the lab 2x1 has 2 ranks, 1 a node; the plan is for"),
        (2, (*RUN, "--trace", TRACE, "--for", "training"), "kind is 'training'; use one of prefill, decode"),
        (2, (*SOLVE, "--solver", "magic"), "solver 'magic' is not known; use auto or one of linear"),
        (2, (*SOLVE, "--mode", "flood"), "mode is 'flood'; use one of per_expert"),
        (2, (*SOLVE, "--seed", "-1"), "seed is -1; give a whole number, 0 or more"),
        (2, (*SOLVE, "--time", "0"), "--time '0' is not a duration; write 60s, 5m or 1h"),
        (2, (*SOLVE, "--time", "soon"), "--time 'soon'"),
        (2, (*SOLVE, "--time", "-5s"), "--time '-5s'"),
        (2, (*SOLVE, "--time", "nan"), "--time 'nan'"),
        (2, (*SOLVE, "--gap", "100%"), "--gap '100%' is not a share"),
        (2, (*SOLVE, "--gap", "-1%"), "--gap '-1%'"),
        (2, (*SOLVE, "--max-par", "0.9"), "max_par is 0.9"),
        (2, (*SOLVE, "--max-par", "-inf"), "max_par is -inf"),
        (2, ("solve", TRACE, "--cluster", "node0"), "cluster 'node0' is not known; use nodeN"),
        (2, ("solve", TRACE, "--cluster", LONG), "is not known"),
        (3, ("solve", TRACE, "--cluster", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (2, (*SOLVE, "--model", "gpt-9"), "model 'gpt-9' is neither a file nor a preset; presets: deepseek-v3"),
        (2, (*SOLVE, "--model", LONG), "is neither a file nor a preset"),
        (3, (*SOLVE, "--model", "plan.json"), "plan.json"),
        (4, (*SOLVE, "--model", "gpt-oss-20b"), "has 2 MoE layers, model 'gpt-oss-20b' has 24"),
        (3, (*SOLVE, "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (3, (*SOLVE, "--from", "nowhere.json"), "nowhere.json: cannot be read"),
        (2, (*SOLVE, "--redundant", "4", "--solver", "coactivation"), "one copy of each expert"),
        (2, ("solve", "profile.safetensors", *CLUSTER, "--solver", "coactivation", "--mode", "flood"), "flood"),
        (3, ("solve", "nowhere", *CLUSTER), "nowhere: does not exist"),
        (3, ("solve", LONG, *CLUSTER), "File name too long"),
        (3, ("solve", "folder", *CLUSTER), "folder: holds no .pt files"),
        (2, (*SIMULATE, "--fidelity", "fluid"), "fidelity is 'fluid'; use one of port, phase, flow"),
        (2, (*SIMULATE, "--mode", "flood"), "mode is 'flood'"),
        (2, (*SIMULATE, "--iterations", "0"), "iterations is 0"),
        (2, (*SIMULATE, "--iterations", "-1"), "iterations is -1"),
        (3, ("simulate", "plan.json", "--trace", "profile.safetensors", *CLUSTER, "-o", "new.out"),
         "holds load counts only; this needs a trace"),
        (2, (*CHECK, "--max-regression", "-1%"), "--max-regression '-1%' is not a share"),
        (2, (*CHECK, "--max-par", "0.5"), "max_par is 0.5"),
        (3, (*CHECK, "--baseline", "nowhere"), "nowhere: cannot be read"),
        (2, ("export", "plan.json", "--to", "tgi", "-o", "new.json"), "no exporter for 'tgi'; placer exports"),
        (2, ("export", "plan.json", "--to", "sglang", "-o", "new.txt"), "reads files ending in .json or .pt"),
        (4, ("export", "plan.json", "--to", "sglang", "-o", "new.json", "--model", "gpt-oss-20b"), "gpt-oss-20b"),
        (2, ("compare", "time.json", "time.json"), "give one distinct name for each"),
        (3, ("compare", "nowhere"), "nowhere: cannot be read"),
        (3, ("compare", "."), "cannot be read"),
        (2, ("trace", "import", TRACE, "--from", "csv", "-o", "new.out"), "source is 'csv'; use one of"),
        (3, ("trace", "import", TRACE, "--from", "npz", "-o", "new.out"), TRACE),
        (2, ("trace", "split", TRACE, "--train", "a", "--test", "b", "--fraction", "1"), "fraction is 1.0"),
        (2, ("trace", "split", TRACE, "--train", "a", "--test", "b", "--fraction", "nan"), "fraction is nan"),
        (2, ("trace", "split", TRACE, "--train", "a", "--test", "b", "--seed", "-1"), "seed is -1"),
        (3, ("trace", "split", "profile.safetensors", "--train", "a", "--test", "b"), "holds load counts only"),
        (3, ("trace", "record", "folder", "--text", "binary", "-o", "new.out"), "cannot be read as text"),
        (3, ("trace", "record", "folder", "--text", "nowhere", "-o", "new.out"), "nowhere: cannot be read"),
    ],
)  # fmt: skip
def test_refusals(code: int, call: tuple[str, ...], says: str, work: Path) -> None:
    (work / "folder").mkdir()
    (work / "binary").write_bytes(b"\xff\xfe\x00")
    refused(code, *call, says=says, folder=work)


@pytest.mark.parametrize(
    "call", [(), ("trace",), ("solve",), ("solve", TRACE), ("magic",), ("solv", TRACE), ("trace", "magic"),
             ("solve", TRACE, *CLUSTER, "--seed", "x"), ("solve", TRACE, *CLUSTER, "--seed", "1.5"),
             ("solve", TRACE, *CLUSTER, "--no-such-flag"), ("export", "plan.json", "-o", "x"), ("compare",),
             ("simulate", "plan.json", "--trace", TRACE, *CLUSTER)],
)  # fmt: skip
def test_usage_errors_end_with_2_and_help(call: tuple[str, ...], work: Path) -> None:
    outcome = placer(*call)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: placer" in outcome.err
    assert "Traceback" not in outcome.err


WRITERS = {
    "solve": ("solve", TRACE, *CLUSTER, "-o"),
    "profile": ("profile", TRACE, "-o"),
    "import": ("trace", "import", TRACE, "-o"),
    "simulate": ("simulate", "plan.json", "--trace", TRACE, *CLUSTER, "-o"),
    "export": ("export", "plan.json", "--to", "sglang", "-o"),
}


@pytest.mark.parametrize("verb", list(WRITERS))
def test_an_output_in_a_missing_folder_is_refused_before_the_work(verb: str, work: Path) -> None:
    says = "nowhere/new.json: the folder nowhere does not exist; create it first"
    refused(2, *WRITERS[verb], "nowhere/new.json", says=says, folder=work)
    refused(2, *WRITERS[verb], "plan.json/new.json", says="does not exist", folder=work)


@pytest.mark.parametrize("verb", list(WRITERS))
def test_an_output_that_is_a_folder_is_refused(verb: str, work: Path) -> None:
    (work / "new.json").mkdir()
    refused(3, *WRITERS[verb], "new.json", says="new.json: is a folder; give the name of a file", folder=work)


@pytest.mark.parametrize("verb", list(WRITERS))
def test_an_output_with_a_name_too_long_is_refused(verb: str, work: Path) -> None:
    refused(3, *WRITERS[verb], LONG + ".json", says="File name too long", folder=work)


@pytest.mark.parametrize("verb", [verb for verb in WRITERS if verb != "export"])
def test_a_device_is_not_replaced(verb: str, work: Path) -> None:
    refused(3, *WRITERS[verb], os.devnull, says="is a device or pipe", folder=work)
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("verb", list(WRITERS))
def test_a_full_disk_leaves_the_old_file(verb: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename is what fails here; tests/core has the write itself failing."""
    (work / "new.json").write_text("old")

    def refuse(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    says = "new.json: could not be written (No space left on device)"
    refused(3, *WRITERS[verb], "new.json", says=says, folder=work)


def test_two_outputs_of_one_name_are_refused(work: Path) -> None:
    says = "is named for two outputs"
    refused(2, "trace", "split", TRACE, "--train", "a", "--test", "./a", says=says, folder=work)
    refused(2, *SIMULATE, "--chrome", "new.out", says=says, folder=work)


@pytest.mark.parametrize(
    "call",
    [
        ("trace", "import", TRACE, "-o", TRACE),
        ("trace", "split", TRACE, "--train", TRACE, "--test", "b"),
        ("solve", TRACE, "--cluster", "node4", "-o", TRACE),
        ("profile", TRACE, "-o", TRACE),
        ("export", "plan.json", "--to", "sglang", "-o", "plan.json"),
        ("simulate", "plan.json", "--trace", TRACE, "--cluster", "node4", "-o", "plan.json"),
    ],
)
def test_an_output_never_replaces_an_input(call: tuple[str, ...], work: Path) -> None:
    refused(2, *call, says="is read by this command and would be replaced", folder=work)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission(work: Path) -> None:
    Path(TRACE).chmod(0)
    refused(3, "trace", "info", TRACE, says="Permission denied")
    Path("plan.json").chmod(0)
    refused(3, "export", "plan.json", "--to", "sglang", "-o", "new.json", says="Permission denied")


def test_errors_leave_standard_output_empty_with_json_too(work: Path) -> None:
    for call in (("trace", "info", "nowhere"), (*SOLVE, "--seed", "-1"), ("compare", "plan.json")):
        outcome = placer(*call, "--json")
        assert outcome.code in (2, 3)
        assert outcome.out == ""
