"""The study of orders runs as a script: the proof, and HEBF where it is optimal and where it is not."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_study_runs_and_its_ratios_are_those_of_orders(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    done = subprocess.run(
        [sys.executable, "examples/device/order_study.py", "--instances", "12", "--seed", "3", "--json", str(out)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["agreement"]["equal"] == found["agreement"]["instances"] == 12
    worst = {(row["family"], row["rule"]): row for row in found["worst"]}
    assert worst["uniform", "hebf"]["worst found"] == 1.0
    assert worst["resident", "hebf"]["worst found"] > 1.0
    assert worst["resident", "resident_first"]["worst found"] == 1.0
    for row in worst.values():
        assert 1.0 <= row["mean"] <= row["max"] <= row["worst found"] <= 2.0
    for row in found["gains"]:
        ours = {rule: two for rule, two in row["over the optimum"].items() if rule != "copies"}
        assert min(two["mean"] for two in ours.values()) >= 1.0
    for row in found["buffers"]:
        assert row["optimum/unlimited"]["mean"] >= 1.0
        assert min(two["mean"] for two in row["over the optimum"].values()) >= 1.0
    assert all(row["everything"]["mean"] >= row["one layer"]["mean"] >= 1.0 for row in found["ahead"])
