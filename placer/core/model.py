"""ModelSpec: the shape of a Mixture-of-Experts model, as placement needs it.

Legend: L routing sites (usually one per MoE layer), E logical experts, K top-k.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from placer.core.errors import InputFileError, UsageError

__all__ = ["ModelSpec", "Site"]

MODULES = ("ffn", "attn")
LARGEST = 2**40


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < LARGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One routing decision of the model: row l of every array with an L axis.

    `round` counts repeated routing inside one layer (Chain-of-Experts) or repeated visits of a layer (Dr.LLM).
    `pool` names the layer whose experts are called; it differs from `layer` where experts are shared between
    layers (ReXMoE). Ids num_experts .. num_experts + num_null_experts - 1 are null, copy or constant experts
    (MoE++, AdaMoE): legal in a trace, free of cost, never placed.
    """

    layer: int
    num_experts: int
    module: str = "ffn"
    round: int = 0
    pool: int | None = None
    num_null_experts: int = 0

    def __post_init__(self) -> None:
        for field, least in (("layer", 0), ("num_experts", 1), ("round", 0), ("num_null_experts", 0), ("pool", 0)):
            value = getattr(self, field)
            if not _whole(value, least) and not (field == "pool" and value is None):
                raise UsageError(f"site.{field} is {value!r} at layer {self.layer!r}; give an integer, {least} or more")
        if self.module not in MODULES:
            raise UsageError(f"site.module is {self.module!r}; use one of {', '.join(MODULES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and byte sizes of one MoE model. Sizes are counts of elements unless the name says bytes.

    `weight_bytes` and `activation_bytes` are bytes per element (weights may be fractional: 0.53 for 4-bit with scales).
    `attention_params` counts the non-expert parameters of one layer that every token passes through.
    """

    name: str
    num_hidden_layers: int
    sites: tuple[Site, ...]
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    matrices_per_expert: int = 3
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    shared_intermediate_size: int = 0
    attention_params: int = 0
    router_revision: str = ""

    def __post_init__(self) -> None:
        for field in ("num_hidden_layers", "top_k", "hidden_size", "moe_intermediate_size", "matrices_per_expert"):
            value = getattr(self, field)
            if not _whole(value, 1):
                raise UsageError(f"model.{field} is {value!r}; give a positive integer")
        for field in ("shared_intermediate_size", "attention_params"):
            value = getattr(self, field)
            if not _whole(value, 0):
                raise UsageError(f"model.{field} is {value!r}; give an integer, 0 or more")
        for field in ("weight_bytes", "activation_bytes"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1024:
                raise UsageError(f"model.{field} is {value!r}; give a positive number of bytes per element")
        if not self.sites:
            raise UsageError("model.sites is empty; an MoE model has at least one MoE layer")
        for site in self.sites:
            if site.layer >= self.num_hidden_layers:
                raise UsageError(f"model.sites has layer {site.layer}; num_hidden_layers is {self.num_hidden_layers}")

    @classmethod
    def uniform(
        cls,
        name: str,
        *,
        num_experts: int,
        top_k: int,
        moe_layers: tuple[int, ...] | None = None,
        num_hidden_layers: int | None = None,
        hidden_size: int = 4096,
        moe_intermediate_size: int = 2048,
        **rest: Any,
    ) -> "ModelSpec":
        """A model with the same number of experts in every MoE layer (all layers unless `moe_layers` says which)."""
        if moe_layers is None:
            if num_hidden_layers is None:
                raise UsageError("model: give moe_layers or num_hidden_layers")
            moe_layers = tuple(range(num_hidden_layers))
        layers = num_hidden_layers if num_hidden_layers is not None else max(moe_layers, default=0) + 1
        sites = tuple(Site(layer=layer, num_experts=num_experts) for layer in moe_layers)
        return cls(
            name=name,
            num_hidden_layers=layers,
            sites=sites,
            top_k=top_k,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            **rest,
        )

    @property
    def num_sites(self) -> int:
        """L, the number of routing sites."""
        return len(self.sites)

    @property
    def num_experts(self) -> int:
        """E, the largest number of placeable experts over the sites."""
        return max(site.num_experts for site in self.sites)

    @property
    def num_ids(self) -> int:
        """The largest number of ids a trace of this model may contain (null experts included)."""
        return max(site.num_experts + site.num_null_experts for site in self.sites)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute layer id of each site, length L."""
        return tuple(site.layer for site in self.sites)

    @property
    def is_uniform(self) -> bool:
        """Whether every site has its own E experts once, in the feed-forward block: what serving engines can place."""
        plain = all(s.module == "ffn" and s.round == 0 and s.pool in (None, s.layer) for s in self.sites)
        return plain and all(s.num_experts == self.num_experts for s in self.sites)

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return self.matrices_per_expert * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert's weights, rounded up."""
        return -int(-self.expert_params * self.weight_bytes // 1)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state, as dispatched."""
        return -int(-self.hidden_size * self.activation_bytes // 1)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        data = asdict(self)
        data["sites"] = [asdict(site) for site in self.sites]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "model") -> "ModelSpec":
        """Inverts `to_dict`. Raises InputFileError naming `where` when a key is missing, unknown or of a wrong type."""
        try:
            fields = dict(data)
            fields["sites"] = tuple(Site(**site) for site in fields["sites"])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InputFileError(f"{where}: not a model description ({error})") from error
        except UsageError as error:
            raise InputFileError(f"{where}: {error}") from error
