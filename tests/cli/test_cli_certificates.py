"""`solve --certificate`, `check --certificate`: what is proven travels, is verified, and tells when it was touched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import placer, refused, run_json

from placer.core.certificates import Certificate
from traces.certificate_store import StoredCertificate, load_certificate, save_certificate

TRACE, CLUSTER = "trace.safetensors", ("--cluster", "node4")
CHECK = ("check", "plan.json", "--trace", TRACE, *CLUSTER, "--certificate", "proof")

pytestmark = pytest.mark.usefixtures("work")


def save(path: str, certificate: Certificate, **fields: Any) -> None:
    given = {"max_par": None, "trace_sha256": load_certificate(Path("proof")).trace_sha256, **fields}
    save_certificate(StoredCertificate(certificate=certificate, **given), Path(path))


@pytest.mark.parametrize("mode", ["per_rank", "per_node", "per_expert"])
def test_what_solve_writes_check_verifies(mode: str) -> None:
    common = ("--cluster", "2x2")
    options = ("--solver", "coactivation" if mode != "per_expert" else "lpt", "--max-par", "inf")
    solved = run_json("solve", TRACE, *common, "--mode", mode, *options, "-o", "plan.json", "--certificate", "proof")
    assert solved["certificate"] == "proof"
    proof = run_json("check", "plan.json", "--trace", TRACE, *common, "--certificate", "proof")["certificate"]
    assert proof["bound"] == pytest.approx(solved["bound"])
    assert proof["objective"] == pytest.approx(solved["objective"])
    assert proof["gap"] == pytest.approx(solved["gap"])
    assert proof["objective_name"] == solved["objective_name"]
    outcome = placer("check", "plan.json", "--trace", TRACE, *common, "--certificate", "proof")
    assert "proof, verified on this trace" in outcome.out
    assert outcome.out.endswith("plan.json: legal\n")
    assert run_json("check", "plan.json", "--trace", TRACE, *common)["certificate"] is None


def test_a_bound_from_inside_a_back_end_is_said_to_leave_none() -> None:
    """An exact solver's own bound closes the gap; the file holds the weaker one that anybody can verify."""
    options = ("--solver", "cpsat", "--max-par", "inf", "-o", "plan.json", "--certificate", "proof")
    outcome = placer("solve", TRACE, *CLUSTER, *options, "--json")
    data = json.loads(outcome.out)
    assert (data["stopped_by"], data["gap"]) == ("optimal", 0.0)
    assert f"was proven inside {data['bound_by']}, which leaves none" in outcome.err
    proof = run_json(*CHECK)["certificate"]
    assert proof["bound"] <= data["bound"] + 1e-9
    assert proof["objective"] == pytest.approx(data["objective"])


def test_no_certificate_is_a_warning_and_no_file() -> None:
    outcome = placer("solve", TRACE, *CLUSTER, "--mode", "coherent", "--certificate", "proof", "--solver", "moetuner",
                     "--time", "10s", "--max-par", "inf", "--json")  # fmt: skip
    assert outcome.code == 0
    assert json.loads(outcome.out)["certificate"] is None
    assert "warning: moetuner leaves no certificate for 'slowest_pair_ns'; nothing was written" in outcome.err
    assert not Path("proof").exists()


def test_a_tampered_certificate_ends_with_6() -> None:
    run_json("solve", TRACE, *CLUSTER, "--solver", "coactivation", "-o", "plan.json", "--certificate", "proof")
    held = load_certificate(Path("proof")).certificate
    bolder = Certificate(kind="touched", objective_name=held.objective_name, bound=held.bound + 0.1, proof="trust me")
    negative = Certificate(
        kind="touched", objective_name="x", bound=0, proof="", arrays={"load_q_LE": -np.ones((2, 8))}
    )
    for certificate, says in ((bolder, "its data proves"), (negative, "0 or more")):
        save("forged", certificate)
        refused(6, *CHECK[:-1], "forged", says=says)


def test_a_certificate_of_another_trace() -> None:
    """Without multipliers its argument holds anywhere; with them they have to fit."""
    run_json("solve", "other.safetensors", *CLUSTER, "--solver", "lpt", "-o", "x.json", "--certificate", "proof")
    outcome = placer(*CHECK, "--json")
    assert outcome.code == 0
    assert "warning: the certificate was made for another trace; its bound was computed anew" in outcome.err
    own = run_json("solve", TRACE, *CLUSTER, "--solver", "lpt", "-o", "x.json")
    assert json.loads(outcome.out)["certificate"]["bound"] == pytest.approx(own["bound"])
    slopes = Certificate(
        kind="touched", objective_name="ranks_touched", bound=0, proof="", arrays={"rank_slope_HK": np.ones((7, 2))}
    )
    save("slopes", slopes)
    text = refused(4, *CHECK[:-1], "slopes", says="was made for another trace (hash ")
    assert "rank_slope_HK is (7, 2)" in text
    save("slopes", slopes, trace_sha256=load_certificate_hash(TRACE))
    refused(6, *CHECK[:-1], "slopes", says="rank_slope_HK is (7, 2)")


def load_certificate_hash(trace: str) -> str:
    return str(run_json("trace", "info", trace)["sha256"])


def test_a_bound_under_a_cap_is_not_about_a_plan_above_it() -> None:
    run_json(
        "solve", TRACE, *CLUSTER, "--solver", "linear", "--max-par", "inf", "-o", "plan.json", "--certificate", "proof"
    )
    held = load_certificate(Path("proof")).certificate
    save("capped", held, max_par=1.05, trace_sha256=load_certificate_hash(TRACE))
    outcome = placer(*CHECK[:-1], "capped", "--json")
    assert outcome.code == 0
    assert "above 1.05: the bound is about plans that keep that cap" in outcome.err
    assert json.loads(outcome.out)["certificate"]["gap"] is None


def test_bad_files_and_names() -> None:
    refused(3, *CHECK, says="proof: ")
    refused(3, *CHECK[:-1], TRACE, says="is not a placer certificate")
    refused(2, "solve", TRACE, *CLUSTER, "-o", "x", "--certificate", "x", says="two outputs")
    refused(2, "solve", TRACE, *CLUSTER, "--certificate", TRACE, says="would be replaced")
    refused(2, "solve", TRACE, *CLUSTER, "--certificate", "no/where", says="does not exist")
