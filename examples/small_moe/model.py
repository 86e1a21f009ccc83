"""A Mixtral-shaped mixture of experts small enough to train on one CPU thread.

The arithmetic is that of Hugging Face's ``MixtralForCausalLM`` and `save_checkpoint` writes that class's files, so
whatever reads Mixtral checkpoints reads this one. In memory the experts of a layer are stacked in one tensor.

Shapes: B prompt in the batch, S position, T token (B times S), V vocabulary, D hidden, H head, A width of a head,
L layer, E expert, K top-k, F inner width of an expert, X routed row (T times K, sorted by expert).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ModelConfig", "SmallMoE", "load_checkpoint", "route", "save_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the model under Mixtral's own names; the defaults have 8.0 million parameters."""

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 96
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.06


class RMSNorm(nn.Module):
    """Scales each row to unit root mean square."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x_BSD: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
        q_BHSA, k_BHSA, v_BHSA = (
            projection(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHSA = _rotate(q_BHSA, cos_SA, sin_SA)
        k_BHSA = _rotate(k_BHSA, cos_SA, sin_SA)
        mixed_BHSA = functional.scaled_dot_product_attention(q_BHSA, k_BHSA, v_BHSA, is_causal=True)
        return functional.linear(mixed_BHSA.transpose(1, 2).flatten(2), self.o_proj.weight)


class Experts(nn.Module):
    """All SwiGLU experts of a layer: gate and up projections stacked in one tensor, down projections in another."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, size, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.empty(experts, size, inner))

    def forward(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        experts, top_k = self.gate_up_proj.shape[0], expert_TK.shape[1]
        order_X = expert_TK.flatten().argsort()
        token_X = order_X // top_k
        rows_E = torch.bincount(expert_TK.flatten(), minlength=experts).tolist()
        # unbind once: indexing per expert would make autograd allocate the whole stack's gradient for every expert.
        gate_up_E, down_E = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        inputs_E = x_TD[token_X].split(rows_E)
        gate_up_XF = torch.cat([functional.linear(rows, w) for rows, w in zip(inputs_E, gate_up_E, strict=True)])
        gate_XF, up_XF = gate_up_XF.chunk(2, dim=-1)
        inner_E = (functional.silu(gate_XF) * up_XF).split(rows_E)
        out_XD = torch.cat([functional.linear(rows, w) for rows, w in zip(inner_E, down_E, strict=True)])
        out_XD = out_XD * weight_TK.flatten()[order_X, None]
        return torch.zeros_like(x_TD).index_add(0, token_X, out_XD)


class MoE(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output (T, D) and its router logits (T, E)."""
        logits_TE = functional.linear(x_TD, self.gate.weight)
        weight_TK, expert_TK = route(logits_TE, self.top_k)
        return self.experts(x_TD, weight_TK, expert_TK), logits_TE


class Layer(nn.Module):
    """Attention, then the mixture of experts, each with its norm and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.block_sparse_moe = MoE(config)

    def forward(self, x_BSD: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SA, sin_SA)
        moe_TD, logits_TE = self.block_sparse_moe(self.post_attention_layernorm(x_BSD).flatten(0, 1))
        return x_BSD + moe_TD.view_as(x_BSD), logits_TE


class SmallMoE(nn.Module):
    """The language model; its output projection is the transposed embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, token_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next-token logits (B, S, V) and the router logits (L, T, E)."""
        cos_SA, sin_SA = _rotary_tables(token_BS.shape[1], self.config)
        x_BSD = self.embed_tokens(token_BS)
        router_logits: list[Tensor] = []
        for layer in self.layers:
            x_BSD, logits_TE = layer(x_BSD, cos_SA, sin_SA)
            router_logits.append(logits_TE)
        return functional.linear(self.norm(x_BSD), self.embed_tokens.weight), torch.stack(router_logits)


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return weights (T, K), descending and summing to one, and expert ids (T, K): softmax, top k, renormalise."""
    weight_TK, expert_TK = logits_TE.softmax(dim=-1).topk(top_k, dim=-1)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), expert_TK


def _rotary_tables(positions: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (S, A) of rotary positions."""
    width = config.hidden_size // config.num_attention_heads
    frequency_A = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)
    angle_SA = torch.outer(torch.arange(positions).float(), frequency_A).repeat(1, 2)
    return angle_SA.cos(), angle_SA.sin()


def _rotate(x_BHSA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """Return queries or keys turned by their position, first half of a head paired with its second half."""
    first, second = x_BHSA.chunk(2, dim=-1)
    return x_BHSA * cos_SA + torch.cat((-second, first), dim=-1) * sin_SA


def save_checkpoint(model: SmallMoE, folder: Path) -> None:
    """Write config.json and model.safetensors in MixtralForCausalLM's layout on disk: three matrices per expert."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path, _, kind = f"model.{name}".rpartition(".")
        for expert, matrix in enumerate(value.unbind(0)) if path.endswith("experts") else ():
            if kind == "gate_up_proj":
                gate_FD, up_FD = matrix.chunk(2)
                tensors[f"{path}.{expert}.w1.weight"] = gate_FD.clone()
                tensors[f"{path}.{expert}.w3.weight"] = up_FD.clone()
            else:
                tensors[f"{path}.{expert}.w2.weight"] = matrix.clone()
        if not path.endswith("experts"):
            tensors[f"model.{name}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    description = asdict(model.config) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_key_value_heads": model.config.num_attention_heads,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> SmallMoE:
    """Return the model that `save_checkpoint` wrote in folder."""
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(**{field: description[field] for field in ModelConfig.__dataclass_fields__})
    tensors = load_file(folder / "model.safetensors")
    model = SmallMoE(config)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        path, _, kind = f"model.{name}".rpartition(".")
        experts = range(config.num_local_experts)
        if kind == "gate_up_proj":
            pairs = [(tensors[f"{path}.{e}.w1.weight"], tensors[f"{path}.{e}.w3.weight"]) for e in experts]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif kind == "down_proj":
            state[name] = torch.stack([tensors[f"{path}.{e}.w2.weight"] for e in experts])
        else:
            state[name] = tensors[f"model.{name}"]
    model.load_state_dict(state)
    return model
