"""DeviceSpec: times by hand, the lines between measured points, JSON, and descriptions that are refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import LinkClass
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.errors import InputFileError, UsageError

COMPUTE = DeviceCompute(
    layer_us=100.0, layer_token_us=2.0, base_us=30.0, residual_us=10.0, ffn_tokens=(1, 4, 8), ffn_us=(5.0, 8.0, 20.0)
)
DEVICE = DeviceSpec(name="toy", memory_mib=1.5, disk=LinkClass(gbytes_per_s=0.5, alpha_us=10.0), compute=COMPUTE)


def test_times_by_hand() -> None:
    assert [COMPUTE.ffn_time_us(t) for t in (0, 1, 2, 4, 6, 8, 10)] == [0.0, 5.0, 6.0, 8.0, 14.0, 20.0, 26.0]
    assert COMPUTE.layer_ns(7) == 114_000
    assert COMPUTE.item_ns(base=True, tokens=2) == 36_000
    assert COMPUTE.item_ns(base=False, tokens=0) == 10_000
    assert DEVICE.read_ns(1000) == 10_000 + 2000
    assert DEVICE.read_ns(0) == 0
    assert DEVICE.copy_ns(1000) == 0
    hop = replace(DEVICE, to_device=LinkClass(gbytes_per_s=2.0, alpha_us=0.0))
    assert hop.copy_ns(1000) == 500
    assert DEVICE.memory_bytes == 3 * 2**19


def test_a_line_that_falls_below_nothing_stays_at_nothing() -> None:
    steep = replace(COMPUTE, ffn_tokens=(4, 8), ffn_us=(1.0, 9.0))
    assert steep.ffn_time_us(1) == 0.0


@settings(max_examples=50, deadline=None)
@given(first=st.integers(1, 40), more=st.integers(0, 40))
def test_more_tokens_never_take_less_where_the_points_rise(first: int, more: int) -> None:
    assert COMPUTE.ffn_time_us(first) <= COMPUTE.ffn_time_us(first + more)


def test_a_device_survives_json_and_its_hash_tells_devices_apart() -> None:
    full = replace(DEVICE, to_device=LinkClass(gbytes_per_s=8.0), disk_limit_mbytes_per_s=200.0)
    for device in (DEVICE, full):
        again = DeviceSpec.from_dict(json.loads(json.dumps(device.to_dict())))
        assert again == device
        assert again.sha256 == device.sha256
    assert DEVICE.sha256 != full.sha256


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("memory_mib", -1.0, "device.memory_mib is -1.0"),
        ("memory_mib", float("nan"), "device.memory_mib is nan"),
        ("memory_mib", True, "device.memory_mib is True"),
        ("name", 3, "device.name is 3"),
        ("disk", None, "device.disk is None"),
        ("to_device", 5, "device.to_device is 5"),
        ("disk_limit_mbytes_per_s", 0.0, "above 0"),
    ],
)
def test_devices_that_are_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(DEVICE, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layer_us", -1.0, "compute.layer_us is -1.0"),
        ("base_us", "3", "compute.base_us is '3'"),
        ("ffn_tokens", (1,), "give the same number"),
        ("ffn_tokens", (1, 1, 2), "ascending"),
        ("ffn_tokens", (0, 1, 2), "from 1"),
        ("ffn_us", (1.0, 2.0, float("inf")), "compute.ffn_us is inf"),
        ("io_slowdown", 0.5, "a factor, 1 or more"),
    ],
)
def test_computing_that_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(COMPUTE, **{field: value})


@pytest.mark.parametrize("field", ["name", "memory_mib", "disk", "compute"])
def test_a_file_without_a_field_is_named(field: str) -> None:
    data = DEVICE.to_dict()
    del data[field]
    with pytest.raises(InputFileError, match=r"my\.yaml: not a device description"):
        DeviceSpec.from_dict(data, where="my.yaml")


@pytest.mark.parametrize("field", ["disk", "compute", "memory_mib", "to_device", "disk_limit_mbytes_per_s", "name"])
@pytest.mark.parametrize("junk", ["x", [1], {"a": 1}, {"gbytes_per_s": "fast"}])
def test_junk_is_one_line(field: str, junk: object) -> None:
    if field == "name" and junk == "x":
        return
    with pytest.raises(InputFileError, match=r"^my\.yaml: ") as raised:
        DeviceSpec.from_dict({**DEVICE.to_dict(), field: junk}, where="my.yaml")
    assert "\n" not in str(raised.value)
