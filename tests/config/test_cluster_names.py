"""Clusters by name, by shape and from YAML files, and every way a file can be wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.config import cluster_names, load_cluster
from placer.core.cluster import ClusterSpec
from placer.core.errors import InputFileError, UsageError

TOY: dict[str, Any] = {
    "name": "toy",
    "nodes": 2,
    "ranks_per_node": 4,
    "memory_gib": 16,
    "intra": {"gbytes_per_s": 100, "alpha_us": 3},
    "inter": {"gbytes_per_s": 25, "alpha_us": 8},
    "compute": {"tflops": 100, "weight_read_gbytes_per_s": 1000, "launch_us": 5},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def refused(path: Path, content: str | bytes, *texts: str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputFileError) as caught:
        load_cluster(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    for text in texts:
        assert text in message
    assert "\n" not in message
    assert len(message) < 600, "a message does not repeat a whole file"
    return message


def toy_yaml(**changes: Any) -> str:
    return yaml.safe_dump({key: value for key, value in (TOY | changes).items() if value != "left out"})


@pytest.mark.parametrize("name", cluster_names())
def test_every_preset_loads_under_its_own_name(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.num_ranks == cluster.nodes * cluster.ranks_per_node > 0


def test_the_presets_that_the_design_names_are_there() -> None:
    assert {"h100", "h200-2x8", "gb200-nvl72"} <= set(cluster_names())
    assert (load_cluster("h200-2x8").nodes, load_cluster("h200-2x8").ranks_per_node) == (2, 8)
    assert load_cluster("gb200-nvl72").num_ranks == 72


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 99_999))
def test_node_n_is_one_node_of_n_ranks(ranks: int) -> None:
    cluster = load_cluster(f"node{ranks}")
    assert (cluster.name, cluster.nodes, cluster.ranks_per_node) == (f"node{ranks}", 1, ranks)


@settings(max_examples=60, deadline=None)
@given(nodes=st.integers(1, 99_999), ranks=st.integers(1, 99_999))
def test_n_by_m_is_n_nodes_of_m_ranks(nodes: int, ranks: int) -> None:
    cluster = load_cluster(f"{nodes}x{ranks}")
    assert (cluster.name, cluster.nodes, cluster.ranks_per_node) == (f"{nodes}x{ranks}", nodes, ranks)


def test_generic_shapes_have_the_speeds_of_h100() -> None:
    base = dataclasses.replace(load_cluster("h100"), name="4x8", nodes=4, ranks_per_node=8)
    assert load_cluster("4x8") == base
    for name in ("node4", "node8", "node16", "2x8", "4x8", "8x8", "32x8"):
        assert load_cluster(name).intra == base.intra


@pytest.mark.parametrize(
    "name",
    ["node0", "node", "node-1", "node08", "0x8", "8x0", "8x", "x8", "2x8x2", "node1e3", "H100", "a100", "8", "٣x٤"],
)
def test_unknown_names_list_what_is_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_cluster(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "nodeN" in message
    assert all(preset in message for preset in cluster_names())


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000])
def test_a_name_too_long_for_the_file_system_is_just_unknown(name: str) -> None:
    with pytest.raises(UsageError, match="is not known"):
        load_cluster(name)


def test_a_file_is_what_it_says(path: Path) -> None:
    path.write_text(toy_yaml(uplink={"gbytes_per_s": 50}))
    cluster = load_cluster(str(path))
    assert cluster == ClusterSpec.from_dict(TOY | {"uplink": {"gbytes_per_s": 50}})


def test_a_file_may_have_any_name_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.conf").write_text(toy_yaml())
    assert load_cluster("cluster.conf").name == "toy"


def test_what_to_dict_gives_is_a_file(path: Path) -> None:
    for name in cluster_names():
        path.write_text(yaml.safe_dump(load_cluster(name).to_dict()))
        assert load_cluster(str(path)) == load_cluster(name)


@pytest.mark.parametrize(
    ("key", "near"),
    [("node", "nodes"), ("rank_per_node", "ranks_per_node"), ("memory_gb", "memory_gib"), ("Intra", "intra"),
     ("uplinks", "uplink"), ("computes", "compute")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(key: str, near: str, path: Path) -> None:
    refused(path, toy_yaml(**{key: 1}), f"unknown key {key!r}; did you mean {near!r}?")


def test_an_unknown_key_inside_a_link_is_named_with_its_path(path: Path) -> None:
    refused(
        path,
        toy_yaml(intra={"gbyte_per_s": 1}),
        "unknown key 'intra.gbyte_per_s'; did you mean 'gbytes_per_s'?",
    )


def test_a_key_like_no_other_lists_the_known_ones(path: Path) -> None:
    refused(path, toy_yaml(zzz=1), "unknown key 'zzz'; known keys: name, nodes, ranks_per_node")


@pytest.mark.parametrize("key", [3, True, None, 2.5])
def test_keys_that_are_no_texts(key: Any, path: Path) -> None:
    refused(path, yaml.dump(TOY | {key: 1}, Dumper=yaml.SafeDumper), "unknown key")


def test_a_list_is_no_key(path: Path) -> None:
    refused(path, f"? [1, 2]\n: 3\n{toy_yaml()}", "line 1 is not YAML (found unhashable key)")


def test_a_very_long_key_is_cut(path: Path) -> None:
    refused(path, toy_yaml(**{"nodes" * 10_000: 1}), "unknown key 'nodesnodes")


@pytest.mark.parametrize("key", ["name", "nodes", "ranks_per_node", "memory_gib", "intra", "inter", "compute"])
def test_a_missing_key_is_named(key: str, path: Path) -> None:
    refused(path, toy_yaml(**{key: "left out"}), f"key {key!r} is missing; add it")


def test_a_missing_key_inside_a_link_is_named(path: Path) -> None:
    refused(path, toy_yaml(intra={"alpha_us": 1}), "key 'intra.gbytes_per_s' is missing")
    refused(path, toy_yaml(compute={"tflops": 1}), "key 'compute.weight_read_gbytes_per_s' is missing")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nodes": "two"}, "nodes"),
        ({"nodes": 2.5}, "nodes"),
        ({"nodes": True}, "nodes"),
        ({"nodes": None}, "nodes"),
        ({"nodes": 0}, "cluster.nodes is 0"),
        ({"nodes": -2}, "cluster.nodes is -2"),
        ({"name": 5}, "name"),
        ({"memory_gib": "60 GB"}, "memory_gib"),
        ({"memory_gib": float("nan")}, "cluster.memory_gib is nan"),
        ({"memory_gib": float("inf")}, "cluster.memory_gib is inf"),
        ({"memory_gib": -1}, "cluster.memory_gib is -1"),
        ({"memory_gib": [1]}, "memory_gib"),
        ({"intra": 100}, "intra must be a mapping of keys to values, got a int"),
        ({"intra": "fast"}, "intra must be a mapping"),
        ({"intra": []}, "intra must be a mapping"),
        ({"intra": None}, "intra"),
        ({"intra": {"gbytes_per_s": float("nan")}}, "link.gbytes_per_s is nan"),
        ({"inter": {"gbytes_per_s": 0}}, "link.gbytes_per_s is 0"),
        ({"inter": {"gbytes_per_s": 1, "alpha_us": -3}}, "link.alpha_us is -3"),
        ({"compute": {"tflops": "1e3", "weight_read_gbytes_per_s": 1}}, "compute.tflops"),
        ({"compute": {"tflops": float("-inf"), "weight_read_gbytes_per_s": 1}}, "compute.tflops is -inf"),
        ({"uplink": {"gbytes_per_s": {}}}, "uplink.gbytes_per_s"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], text: str, path: Path) -> None:
    refused(path, toy_yaml(**changes), text)


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "---\n", "null\n", "~"])
def test_an_empty_file_says_what_to_give(content: str, path: Path) -> None:
    refused(path, content, "is empty; give name, nodes, ranks_per_node, memory_gib, intra, inter, compute")


@pytest.mark.parametrize("content", ["[]", "3", "nodes", "- name: x", "2026-11-22", "false", "0"])
def test_a_file_that_is_no_mapping(content: str, path: Path) -> None:
    refused(path, content, "the file must be a mapping of keys to values, got a ")


@pytest.mark.parametrize(
    "content",
    [b"\x00\x01\x02", b"\xff\xfe\x00", bytes(range(256)), b"\x80\x04\x95", b"PK\x03\x04\x14\x00", b"\x89PNG\r\n\x1a\n"],
    ids=["control", "utf-16", "all bytes", "pickle", "zip", "png"],
)
def test_a_binary_file(content: bytes, path: Path) -> None:
    refused(path, content, "is not")


@pytest.mark.parametrize(
    "content",
    ["a: b: c", "{", "- [1", "a: 'x", "a: *b", "!!python/object/apply:os.system [ls]", "a: !x 1", "\t- a", "&a"],
)
def test_broken_yaml_names_the_line(content: str, path: Path) -> None:
    message = refused(path, f"# a comment\n{content}\n")
    assert " line " in message or "is empty" in message or "mapping" in message


def test_a_huge_file_is_not_read_into_yaml(path: Path) -> None:
    refused(path, b"a: 1\n" * 100_000, "500000 bytes is no configuration")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
"""Nine to the thirteenth: 600 bytes of aliases whose text would be a terabyte."""


def test_aliases_that_multiply_are_not_written_out(path: Path) -> None:
    refused(path, BOMB, "unknown key 'a'")
    refused(path, BOMB + "nodes: *m\n", "unknown key")
    tail = yaml.safe_dump({key: value for key, value in TOY.items() if key != "intra"})
    head = BOMB.split("\n", 12)
    bomb = "\n".join(f"  - {line.split(': ', 1)[1]}" for line in head[:12])
    refused(path, f"intra:\n{bomb}\n{tail}", "intra must be a mapping of keys to values, got a list")
    refused(path, f"nodes:\n{bomb}\n{toy_yaml(nodes='left out')}", "nodes")
    refused(path, f"? {{x: 1}}\n: 1\n{tail}")


def test_aliases_that_contain_themselves_are_refused(path: Path) -> None:
    refused(path, "&a {name: *a, nodes: 1}", "")
    refused(path, "&a [*a]", "the file must be a mapping")


def test_deep_nesting_is_refused(path: Path) -> None:
    refused(path, "[" * 2_000, "is not YAML")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        load_cluster(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(InputFileError, match="cannot be read"):
        load_cluster(str(tmp_path))


def test_ranks_that_differ_go_through_yaml(path: Path) -> None:
    speed, memory = [1.0, 1, 1, 1, 2, 2, 2, 2.5], [16, 16, 16, 16, 8.5, 8, 8, 8]
    path.write_text(toy_yaml(rank_speed=speed, rank_memory_gib=memory))
    cluster = load_cluster(str(path))
    assert cluster.rank_speed == tuple(speed)
    assert cluster.memory_bytes_R.tolist() == [int(gib * 2**30) for gib in memory]
    assert cluster.speed_R is not None
    assert cluster.speed_R.tolist() == speed
    assert cluster.kind_R.tolist()[:4] == [cluster.kind_R[0]] * 4
    assert len(set(cluster.kind_R.tolist())) == 4
    path.write_text(yaml.safe_dump(cluster.to_dict()))
    assert load_cluster(str(path)) == cluster == ClusterSpec.from_dict(cluster.to_dict())
    plain = dataclasses.replace(cluster, rank_speed=(), rank_memory_gib=())
    assert plain.sha256 != cluster.sha256


def test_equal_ranks_keep_their_hash() -> None:
    """Plans remember the hash of their cluster: it is what it was before ranks could differ."""
    assert "rank_speed" not in load_cluster("h100").to_dict()
    assert "rank_memory_gib" not in load_cluster("h100").to_dict()
    assert load_cluster("node4").sha256.startswith("4935d9c9ee468ec2")
    assert load_cluster("2x8").sha256.startswith("44b5e4305d83b361")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rank_speed", [1.0, 2.0], "rank_speed has 2 numbers for 8 ranks"),
        ("rank_speed", [1.0] * 7 + [0.0], "rank_speed[7] is 0.0"),
        ("rank_memory_gib", [1.0] * 7 + [-1.0], "rank_memory_gib[7] is -1.0"),
        ("rank_memory_gib", [1.0] * 7 + ["x"], "rank_memory_gib"),
        ("rank_speed", 2.0, "rank_speed"),
    ],
)
def test_ranks_that_differ_are_looked_at(path: Path, key: str, value: Any, told: str) -> None:
    refused(path, toy_yaml(**{key: value}), told)
