"""Calibration end to end: synthetic samples into a known cluster, and real ranks into a file that can be read."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest

from placer.config import load_cluster, save_cluster
from placer.core.cluster import ClusterSpec, Compute, LinkClass, Software
from placer.core.cost import leg_times
from placer.core.errors import ExecutionError, InputFileError, UsageError
from placer.core.modes import DISPATCH_MODES
from placer.execute.calibrate import CalibrationJob, calibrate
from placer.execute.calibrate.assemble import _links_ns, assemble, exchange_tokens, expert_cases

EMPTY_NS, EXCHANGE_NS, TOKEN_NS, LAYER_NS = 3e5, 5e5, 8e3, 5e4
REFUSED = r"^calibration (of [a-z_ ]+ )?refused: [^\n]*$"


def samples_of(job: CalibrationJob, cluster: ClusterSpec) -> dict[str, np.ndarray]:
    """What perfect ranks of `cluster` would measure."""
    found = {f"about/{key}": np.array("none") for key in ("backend", "device", "torch")}
    for name, pattern_RR in job.patterns().items():
        copies_NRR = np.array(job.copies_N(name))[:, None, None] * pattern_RR
        found[f"link/{name}"] = leg_times(cluster, copies_NRR, job.row_bytes).slowest_W[None] + EMPTY_NS
    experts_N, rows_N = np.array(expert_cases(job), dtype=float).T
    row_ns = 2 * job.expert_params / cluster.compute.flops_per_ns
    read_ns = job.expert_bytes / cluster.compute.weight_read_gbytes_per_s
    solo_N = cluster.compute.launch_us * 1e3 + experts_N * np.maximum(read_ns, rows_N * row_ns)
    cores = cluster.software.shared_cores or job.num_ranks
    waiting = job.num_ranks / cores
    found |= {"solo": solo_N[None], "together": solo_N[None] * waiting, "layer": np.array([LAYER_NS / waiting])}
    tokens_N = np.array(exchange_tokens(job))
    for mode in DISPATCH_MODES:
        links_N = np.array([_links_ns(job, cluster, mode, count) for count in tokens_N])
        found[f"exchange/{mode}"] = (links_N + 2 * (EXCHANGE_NS + tokens_N * TOKEN_NS))[None]
    return found


def known(nodes: int, per_node: int, *, tail: float = 1.0, cores: int | None = None) -> ClusterSpec:
    return ClusterSpec(
        name="known",
        nodes=nodes,
        ranks_per_node=per_node,
        memory_gib=1,
        intra=LinkClass(gbytes_per_s=3.0, alpha_us=40, tail=tail if nodes == 1 else 1.0),
        inter=LinkClass(gbytes_per_s=0.025, alpha_us=70, tail=tail if nodes > 1 else 1.0),
        uplink=LinkClass(gbytes_per_s=0.04, alpha_us=90, tail=tail) if nodes > 1 and per_node > 1 else None,
        compute=Compute(tflops=0.1, weight_read_gbytes_per_s=3.0, launch_us=50),
        software=Software(layer_us=50, shared_cores=cores),
    )


@pytest.mark.parametrize(
    "cluster",
    [known(1, 4, tail=1.5, cores=2), known(4, 1, tail=1.25), known(3, 2, tail=1.25), known(2, 2, cores=2)],
    ids=["1x4", "4x1", "3x2", "2x2"],
)
def test_perfect_measurements_give_the_cluster_back(cluster):
    job = CalibrationJob(nodes=cluster.nodes, ranks_per_node=cluster.ranks_per_node)
    found = assemble(job, [samples_of(job, cluster)] * 2, "known").cluster
    for kind in ("intra", "inter", "uplink"):
        expected = getattr(cluster, kind)
        exists = (cluster.ranks_per_node > 1) if kind == "intra" else cluster.nodes > 1
        if expected is None:
            assert getattr(found, kind) is None
        elif exists:
            link = getattr(found, kind)
            assert link.gbytes_per_s == pytest.approx(expected.gbytes_per_s, rel=2e-3)
            assert link.alpha_us == pytest.approx(expected.alpha_us, rel=0.05)
            assert link.tail == pytest.approx(expected.tail, rel=5e-3)
    assert found.compute.tflops == pytest.approx(0.1, rel=2e-3)
    assert found.compute.weight_read_gbytes_per_s == pytest.approx(3.0, rel=2e-3)
    assert found.compute.launch_us == pytest.approx(50, rel=1e-2)
    assert found.software.layer_us == pytest.approx(50, rel=2e-3)
    assert set(found.software.exchanges) == set(DISPATCH_MODES)
    for cost in found.software.exchanges.values():
        # links that were fitted to a few promille stand between the two
        assert cost.fixed_us == pytest.approx(500, rel=0.25)
        assert cost.token_us == pytest.approx(8, rel=0.25)
    assert found.software.shared_cores == cluster.software.shared_cores


def test_a_tail_on_two_nodes_is_a_slower_uplink():
    """All that crosses an uplink to one node counts as one message, so a tail there would never be charged."""
    cluster = known(2, 2)
    job = CalibrationJob(nodes=2, ranks_per_node=2)
    samples = samples_of(job, cluster)
    samples["link/all"] = (samples["link/all"] - EMPTY_NS) * 1.2 + EMPTY_NS
    found = assemble(job, [samples], "known", software_links=False).cluster
    assert found.uplink.gbytes_per_s == pytest.approx(0.04 / 1.2, rel=5e-3)
    assert found.inter.tail == pytest.approx(1.2, rel=5e-3)


def test_a_link_that_is_no_line_is_refused_by_name():
    job = CalibrationJob(nodes=2, ranks_per_node=2)
    samples = samples_of(job, known(2, 2))
    samples["link/inter"] = samples["link/inter"][:, ::-1]
    with pytest.raises(ExecutionError, match=r"^calibration of link class inter refused: "):
        assemble(job, [samples], "known")


def test_the_file_is_read_back_and_its_block_of_qualities_is_not_the_clusters(tmp_path):
    job = CalibrationJob(nodes=3, ranks_per_node=2)
    found = assemble(job, [samples_of(job, known(3, 2))], "known")
    save_cluster(found.cluster, tmp_path / "c.yaml", calibration=found.about)
    assert load_cluster(str(tmp_path / "c.yaml")) == found.cluster
    text = (tmp_path / "c.yaml").read_text()
    for word in ("calibration:", "r2:", "max_residual:", "spread:", "backend:", "dtype: float32"):
        assert word in text
    save_cluster(found.cluster, tmp_path / "again.yaml", calibration=found.about)
    assert (tmp_path / "again.yaml").read_text() == text
    (tmp_path / "c.yaml").write_text(re.sub(r"calibration:\n(  .*\n?)+", "calibration: 3\n", text))
    with pytest.raises(InputFileError, match="calibration must be a mapping, got a int"):
        load_cluster(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks_per_node": 1}, "two ranks or more"),
        ({"message_bytes": (16, 4096, 8192, 16384)}, "calibrate.message_bytes is 16"),
        ({"message_bytes": (4096, 8192)}, "give four or more numbers"),
        ({"rows": (8, 8, 16, 32)}, "each above the last"),
        ({"dtype": "int8"}, "calibrate.dtype is 'int8'"),
        ({"hidden_size": 1, "dtype": "bfloat16"}, "needs it even"),
        ({"experts_per_rank": 1000}, "lower calibrate.experts_per_rank"),
    ],
)
def test_jobs_that_cannot_be_measured_are_refused(change, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        CalibrationJob(**{"nodes": 1, "ranks_per_node": 2} | change)


@pytest.mark.dist
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_two_real_ranks_are_calibrated_or_refused_with_numbers(tmp_path):
    """On a busy machine the times may be no line; that must then be said, and nothing else."""
    job = CalibrationJob(
        nodes=1,
        ranks_per_node=2,
        hidden_size=64,
        moe_intermediate_size=64,
        message_bytes=(65536, 262144, 1048576, 4194304),
        rows=(8, 32, 128, 512),
        experts_per_rank=2,
        tokens_per_rank=256,
        repetitions=5,
    )
    said: list[str] = []
    found, refusal = None, None
    try:
        found = calibrate(job, name="two", launches=1, timeout_s=180, progress=said.append)
    except ExecutionError as error:
        refusal = str(error)
    if found is None:
        assert re.match(REFUSED, str(refusal)), refusal
    else:
        cluster = found.cluster
        assert (cluster.nodes, cluster.ranks_per_node, cluster.uplink) == (1, 2, None)
        assert cluster.inter == replace(cluster.intra)
        assert found.about["backend"] == "gloo"
        assert found.about["intra"]["r2"] >= 0.95
        assert all(cost.token_us > 0 for cost in cluster.software.exchanges.values())
    assert said[0] == "measuring messages: empty"
    assert said[-1] == "measuring exchanges: allgather"
