"""ClusterSpec, ModelSpec and Profile: what they refuse, what they compute, and their JSON forms.

Legend: E experts, L sites, W windows, F folds, S source ranks, H sets, K top-k.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from core_cases import load_profile_of, make_cluster, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.errors import InputFileError, PlacerError, UsageError
from placer.core.model import ModelSpec, Site
from placer.core.profile import ExpertSets, Profile

NAN, INF = float("nan"), float("inf")
NOT_POSITIVE = [0, -1, NAN, INF, -INF, True, "1", None, [1], 1e300, 1e-300]
NOT_MICROSECONDS = [-1e-9, NAN, INF, True, "1", None, 1e300]
NOT_COUNTS = [0, -1, 1.0, 1.5, NAN, True, "1", None, 2**60]


def refused(kind: Any, text: str, **fields: Any) -> None:
    with pytest.raises(UsageError) as caught:
        kind(**fields)
    assert text in str(caught.value)
    assert "give" in str(caught.value) or "use" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_rates_and_memory_must_be_positive(value: Any) -> None:
    refused(LinkClass, "link.gbytes_per_s is", gbytes_per_s=value)
    refused(Compute, "compute.tflops is", tflops=value, weight_read_gbytes_per_s=1.0)
    refused(Compute, "compute.weight_read_gbytes_per_s is", tflops=1.0, weight_read_gbytes_per_s=value)
    refused(make_cluster, "cluster.memory_gib is", memory_gib=value)


@pytest.mark.parametrize("value", NOT_MICROSECONDS)
def test_fixed_costs_must_not_be_negative(value: Any) -> None:
    refused(LinkClass, "link.alpha_us is", gbytes_per_s=1.0, alpha_us=value)
    refused(Compute, "compute.launch_us is", tflops=1.0, weight_read_gbytes_per_s=1.0, launch_us=value)


@pytest.mark.parametrize("value", NOT_COUNTS[:-1])
def test_clusters_have_whole_numbers_of_ranks(value: Any) -> None:
    refused(make_cluster, "cluster.nodes is", nodes=value)
    refused(make_cluster, "cluster.ranks_per_node is", ranks_per_node=value)


@pytest.mark.parametrize("field", ["intra", "inter", "compute", "uplink"])
def test_clusters_have_links_of_the_right_kind(field: str) -> None:
    refused(make_cluster, f"cluster.{field} is 5", **{field: 5})
    if field != "uplink":
        refused(make_cluster, f"cluster.{field} is None", **{field: None})
    refused(make_cluster, "cluster.name is 3", name=3)


def test_what_a_cluster_says_about_itself() -> None:
    cluster = make_cluster(2, 3, memory_gib=0.5)
    assert cluster.num_ranks == 6
    assert cluster.memory_bytes == 2**29
    assert cluster.node_R.tolist() == [0, 0, 0, 1, 1, 1]
    assert LinkClass(gbytes_per_s=1.0, alpha_us=2.5).alpha_ns == 2500
    assert Compute(tflops=1.5, weight_read_gbytes_per_s=1.0).flops_per_ns == 1500


@pytest.mark.parametrize("uplink", [None, LinkClass(gbytes_per_s=3.0, alpha_us=1.0)])
def test_clusters_survive_json(uplink: LinkClass | None) -> None:
    cluster = make_cluster(2, 3, uplink=uplink)
    again = ClusterSpec.from_dict(json.loads(json.dumps(cluster.to_dict())))
    assert again == cluster
    assert again.sha256 == cluster.sha256
    assert dataclasses.replace(cluster, name="other").sha256 != cluster.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 0}, {"nodes": "2"}, {"compute": None}, {"compute": {"tflops": 1}}, {"intra": 5}, {"intra": None},
        {"inter": {"gbytes_per_s": NAN}}, {"uplink": {"alpha_us": 1}}, {"surprise": 1}, {"intra": {"speed": 1}},
        {"memory_gib": "60"}, {"compute": [1]}, {"intra": {"gbytes_per_s": 1, "alpha_us": "x"}},
    ],
)  # fmt: skip
def test_wrong_cluster_tables_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputFileError, match=r"^here\.yaml: "):
        ClusterSpec.from_dict(make_cluster().to_dict() | change, where="here.yaml")


def test_missing_cluster_fields_are_named() -> None:
    for field in ("name", "nodes", "intra", "compute"):
        table = {key: value for key, value in make_cluster().to_dict().items() if key != field}
        with pytest.raises(InputFileError, match=field):
            ClusterSpec.from_dict(table)


@pytest.mark.parametrize("value", NOT_COUNTS)
def test_models_have_whole_sizes(value: Any) -> None:
    for field in ("num_hidden_layers", "top_k", "hidden_size", "moe_intermediate_size", "matrices_per_expert"):
        refused(lambda **f: dataclasses.replace(make_model(), **f), f"model.{field} is", **{field: value})


@pytest.mark.parametrize("value", [v for v in NOT_COUNTS if v != 0 or isinstance(v, bool)])
def test_models_have_whole_extras(value: Any) -> None:
    for field in ("shared_intermediate_size", "attention_params"):
        refused(lambda **f: dataclasses.replace(make_model(), **f), f"model.{field} is", **{field: value})


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, True, "2", None, 1e10])
def test_models_have_positive_bytes(value: Any) -> None:
    for field in ("weight_bytes", "activation_bytes"):
        refused(lambda **f: dataclasses.replace(make_model(), **f), f"model.{field} is", **{field: value})


@pytest.mark.parametrize("value", [-1, 1.0, True, "0", None, 2**60])
def test_sites_have_whole_numbers(value: Any) -> None:
    for field in ("layer", "num_experts", "round", "num_null_experts"):
        refused(Site, f"site.{field} is", **{"layer": 0, "num_experts": 4} | {field: value})
    if value is not None:
        refused(Site, "site.pool is", layer=0, num_experts=4, pool=value)
    refused(Site, "site.num_experts is 0", layer=0, num_experts=0)
    refused(Site, "site.module is 'mlp'; use one of ffn, attn", layer=0, num_experts=4, module="mlp")


def test_models_need_sites_within_their_layers() -> None:
    with pytest.raises(UsageError, match=r"model\.sites is empty"):
        make_model(moe_layers=(), layers=2)
    with pytest.raises(UsageError, match=r"model\.sites has layer 2; num_hidden_layers is 2"):
        make_model(moe_layers=(0, 2), layers=2)
    with pytest.raises(UsageError, match="give moe_layers or num_hidden_layers"):
        ModelSpec.uniform("x", num_experts=4, top_k=1)


def test_what_a_model_says_about_itself() -> None:
    model = make_model(moe_layers=(1, 3), layers=5, experts=6, weight_bytes=0.53, activation_bytes=1.5)
    assert (model.num_sites, model.num_experts, model.moe_layers, model.is_uniform) == (2, 6, (1, 3), True)
    assert model.expert_params == 3 * 10 * 4
    assert model.expert_bytes == 64  # 120 x 0.53 = 63.6
    assert model.token_bytes == 15
    assert ModelSpec.uniform("x", num_experts=2, top_k=1, moe_layers=(0, 4)).num_hidden_layers == 5
    null = dataclasses.replace(model, sites=(Site(layer=1, num_experts=6, num_null_experts=2),))
    assert (null.num_experts, null.num_ids) == (6, 8)


def test_models_survive_json() -> None:
    sites = (Site(layer=0, num_experts=4, pool=1), Site(layer=1, num_experts=8, round=2, num_null_experts=3))
    model = dataclasses.replace(make_model(), sites=sites, router_revision="abc")
    again = ModelSpec.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again == model
    assert again.sha256 == model.sha256
    assert dataclasses.replace(model, top_k=1).sha256 != model.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"sites": None}, {"sites": 3}, {"sites": [3]}, {"sites": [{}]}, {"sites": [{"layer": 0, "experts": 3}]},
        {"sites": "ab"}, {"sites": []}, {"top_k": "2"}, {"surprise": 1}, {"weight_bytes": "2"},
        {"hidden_size": 10**400}, {"sites": [{"layer": 0.5, "num_experts": 3}]},
        {"sites": [{"layer": 0, "num_experts": 3, "module": []}]},
    ],
)  # fmt: skip
def test_wrong_model_tables_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputFileError, match=r"^config: "):
        ModelSpec.from_dict(make_model().to_dict() | change, where="config")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tables_raise_nothing_else(data: st.DataObject) -> None:
    """What is taken can be hashed and measured; what is not is InputFileError."""
    kind, table = data.draw(
        st.sampled_from([(ModelSpec, make_model().to_dict()), (ClusterSpec, make_cluster().to_dict())])
    )
    field = data.draw(st.sampled_from(sorted(table)))
    value = data.draw(JSON)
    if isinstance(table[field], dict) and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(table[field])))
        value = table[field] | {inner: value}
    try:
        made = kind.from_dict(table | {field: value})
    except InputFileError:
        return
    assert len(made.sha256) == 64
    if isinstance(made, ModelSpec):
        assert made.expert_bytes > 0
        assert made.token_bytes > 0
    else:
        assert made.memory_bytes >= 0
        assert made.num_ranks >= 1


COUNTS = {
    "load_WLE": np.ones((3, 2, 8), dtype=np.int64),
    "load_FLE": np.ones((4, 2, 8), dtype=np.int64),
    "coactivation_LEE": np.ones((2, 8, 8), dtype=np.int64),
    "transition_LEE": np.ones((1, 8, 8), dtype=np.int64),
    "load_SLE": np.ones((5, 2, 8), dtype=np.int64),
}


def make_profile(**changes: Any) -> Profile:
    return dataclasses.replace(load_profile_of(np.ones((3, 2, 8)), make_model(2, 8)), **COUNTS | changes)


def test_a_profile_of_all_counts() -> None:
    assert make_profile().load_LE.tolist() == [[3] * 8] * 2


@pytest.mark.parametrize("name", list(COUNTS))
def test_profiles_hold_whole_counts_of_the_models_shape(name: str) -> None:
    array = COUNTS[name]
    with pytest.raises(UsageError, match=f"profile.{name} has negative counts"):
        make_profile(**{name: -array})
    with pytest.raises(UsageError, match=f"profile.{name} is float64; give whole counts"):
        make_profile(**{name: np.full(array.shape, np.nan)})
    for wrong in (array[:, :, :7], array[:, :1], array[0], array[..., None]):
        with pytest.raises(UsageError, match=f"profile.{name} is"):
            make_profile(**{name: wrong})


def test_sets_fit_their_weights_and_the_layers() -> None:
    sets = ExpertSets(np.zeros((2, 3), dtype=np.int16), np.ones(2, dtype=np.int64))
    make_profile(sets=(sets, sets))
    with pytest.raises(UsageError, match=r"profile\.sets has 1 layers; the model has 2"):
        make_profile(sets=(sets,))
    with pytest.raises(UsageError, match="do not match"):
        ExpertSets(np.zeros((2, 3), dtype=np.int16), np.ones(3, dtype=np.int64))
    with pytest.raises(UsageError, match="do not match"):
        ExpertSets(np.zeros(3, dtype=np.int16), np.ones(3, dtype=np.int64))


def test_specs_are_frozen() -> None:
    for thing in (make_cluster(), make_model(), LinkClass(gbytes_per_s=1.0), make_profile()):
        for field in dataclasses.fields(thing):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field.name, getattr(thing, field.name))
        assert not hasattr(thing, "__dict__")
    assert issubclass(UsageError, PlacerError)
