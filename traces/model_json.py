"""A ModelSpec from JSON text, with every type looked at: what a store's header is trusted with."""

import json
from dataclasses import fields
from typing import Any

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec

__all__ = ["model_from_json"]

TEXTS = ("name", "router_revision", "module")
REALS = ("weight_bytes", "activation_bytes")


def model_from_json(text: str, *, where: str) -> ModelSpec:
    """The model that `ModelSpec.to_dict` was written from. Raises InputFileError naming `where` and the field."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{where}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputFileError(f"{where}: is not a table")
    model = ModelSpec.from_dict(data, where=where)
    owners: list[tuple[str, Any]] = [("model", model), *((f"site {row}", site) for row, site in enumerate(model.sites))]
    for owner, item in owners:
        for field in fields(item):
            value = getattr(item, field.name)
            if field.name != "sites" and not _fits(field.name, value):
                raise InputFileError(f"{where}: {owner}.{field.name} is {value!r}, of a wrong type")
    return model


def _fits(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    if name in REALS:
        return type(value) in (int, float) and 0 < value < 1e6
    if name == "pool" and value is None:
        return True
    return type(value) is int and 0 <= value < 2**40
