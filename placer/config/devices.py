"""Devices from YAML: strict keys, as `placer device calibrate` writes them."""

from dataclasses import fields
from pathlib import Path

import yaml

from placer.config.strict import from_mapping, read_yaml
from placer.core.atomic import write_text_atomically
from placer.core.device.spec import DeviceSpec

__all__ = ["load_device", "save_device"]


def load_device(path: Path) -> DeviceSpec:
    """The device that a YAML file describes. Raises InputFileError naming the file, the key and the mend."""
    return from_mapping(DeviceSpec, read_yaml(path), where=str(path))


def save_device(path: Path, device: DeviceSpec, comments: tuple[str, ...] = ()) -> None:
    """Writes a device as YAML, whole or not at all, with comment lines above it."""
    data = device.to_dict()
    assert set(data) == {field.name for field in fields(DeviceSpec)}
    text = "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(data, sort_keys=False)
    write_text_atomically(path, text)
