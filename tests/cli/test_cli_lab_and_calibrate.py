"""`placer lab` and `placer calibrate` on the command line: what is refused before anything is made or measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runner import placer, refused, run_json

from placer.config import load_cluster
from placer.core.errors import ExecutionError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("2x2@fast", "--", "true"), "lab '2x2@fast' is not known; write NODESxRANKS@RATE"),
        (("2x2@200mbit",), "the command '' is not found; give one after `--`"),
        (("2x2", "--", "no-such-command", "--flag"), "the command 'no-such-command --flag' is not found"),
        (("2x2", "--clean"), "--clean takes no shape"),
    ],
)
def test_lab_refuses_what_makes_no_sense(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    refused(2, "lab", *arguments, says=says, folder=tmp_path)


@pytest.mark.parametrize("verb", [("lab", "2x2", "--", "true"), ("lab", "--clean"), ("calibrate", "--lab", "2x2")])
def test_who_may_not_have_a_lab_is_told_why(verb: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    output = ("-o", tmp_path / "c.yaml") if verb[0] == "calibrate" else ()
    monkeypatch.setattr("shutil.which", lambda tool: None)
    if verb[1] != "2x2":
        refused(9, *verb, *output, says="a lab needs Linux and `ip`", folder=tmp_path)
    monkeypatch.setattr("shutil.which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    refused(10, *verb, *output, says="only root may; run it as root", folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either --ranks N (this machine) or --lab SHAPE"),
        (("--ranks", "2", "--lab", "2x2"), "give either --ranks N (this machine) or --lab SHAPE"),
        (("--ranks", "1"), "two ranks or more"),
        (("--ranks", "0"), "calibrate.ranks_per_node is 0"),
        (("--lab", "2x2x2"), "lab '2x2x2' is not known"),
    ],
)
def test_calibrate_refuses_what_makes_no_sense(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    refused(2, "calibrate", *arguments, "-o", tmp_path / "c.yaml", says=says, folder=tmp_path)


def test_calibrate_refuses_settings_by_name(tmp_path: Path) -> None:
    config = tmp_path / "s.yaml"
    for text, says in (
        ("calibrate: {repetitions: 0}", "calibrate.repetitions is 0"),
        ("calibrate: {message_size: [1]}", "did you mean 'message_bytes'?"),
    ):
        config.write_text(text)
        refused(
            3, "calibrate", "--ranks", "2", "--config", config, "-o", tmp_path / "c.yaml", says=says, folder=tmp_path
        )


def test_calibrate_writes_what_cluster_reads(tmp_path: Path, monkeypatch: Any) -> None:
    """The measurement stands in here; its own tests start ranks."""
    cluster = load_cluster("cpu-4")
    fit = {"r2": 0.99, "max_residual": 0.1, "spread": 0.01}
    about = {"experts": fit, "intra": fit, "packing": {"per_expert": fit, "per_rank": fit}}
    asked: list[dict[str, Any]] = []

    def measured(**options: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(cluster=cluster, about=about)

    monkeypatch.setattr("placer.pipeline.calibrate_cluster", measured)
    output = tmp_path / "c.yaml"
    data = run_json("calibrate", "--ranks", 4, "-o", output)
    assert data == {"output": str(output), "cluster": cluster.to_dict(), "calibration": about}
    assert load_cluster(str(output)) == cluster
    assert (asked[0]["ranks"], asked[0]["lab"]) == (4, None)
    shown = placer("calibrate", "--ranks", 4, "-o", output)
    assert (shown.code, f"wrote {output}" in shown.out, "largest residual" in shown.out) == (0, True, True)


def test_a_fit_that_is_none_writes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def measured(**options: Any) -> Any:
        raise ExecutionError("calibration of link class inter refused: 39 MB/s, R2 0.770 (at least 0.95)")

    monkeypatch.setattr("placer.pipeline.calibrate_cluster", measured)
    refused(10, "calibrate", "--ranks", 4, "-o", tmp_path / "c.yaml", says="R2 0.770", folder=tmp_path)
