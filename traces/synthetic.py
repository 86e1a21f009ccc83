"""Seeded synthetic routing with the traits of real traces, each on its own knob.

Legend: L layers, T tokens, K top-k, E experts, C topics (each with a cluster of experts per layer), R requests.

A token has a hidden topic, drawn from its request's mix and kept from layer to layer with probability `affinity`. Each
topic has a cluster of experts in every layer; the token's first expert comes from its topic's cluster, each further one
does with probability `coactivation` and comes from the whole layer otherwise. Within cluster and layer, experts are as
popular as a lognormal says. Requests' mixes differ, and wander over time, by `drift`. Expert ids are shuffled in every
layer, so that an id says nothing about hotness or cluster.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from placer.core.model import ModelSpec, Site
from traces.ids import convert_ids, generator, id_dtype
from traces.trace import RoutingTrace

__all__ = ["dynamic_top_p", "synthesize"]

DRIFT_SCALE = 12.0
TOPIC_SIGMA_SHARE = 0.5
SLOW_WAVES = 3
TOP_P_CHUNK = 4096
CLUSTER_LOGIT = 2.0
FIRST_LAYER_SHARPNESS = 0.7


def synthesize(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    num_requests: int,
    seed: int,
    popularity_sigma: float = 0.7,
    affinity: float = 0.6,
    coactivation: float = 0.5,
    drift: float = 0.2,
    null_experts: int = 0,
    null_share: float = 0.25,
    top_p: float | None = None,
    source_ranks: int = 0,
    model: ModelSpec | None = None,
) -> RoutingTrace:
    """A trace of `num_tokens` tokens in `num_requests` requests (lognormal lengths); same arguments, same bytes.

    null_experts  ids from num_experts on that cost nothing; each pick is one with probability `null_share` (MoE++,
                  AdaMoE), so that a token may end up without any real expert
    top_p         the number of experts varies: the fewest whose router probabilities exceed `top_p` (Harder Tasks,
                  arXiv 2403.07652, section 3.2); top_k is then only the model's nominal figure
    source_ranks  requests are spread over so many source ranks, round robin; 0 for none
    model         takes the place of a plain model of these sizes, which it must have
    Raises UsageError.
    """
    _check(num_layers, num_experts, top_k, num_tokens, num_requests, null_experts, source_ranks)
    shares = {"affinity": affinity, "coactivation": coactivation, "null_share": null_share}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} is {value!r}; give a share between 0 and 1")
    if not (0 <= popularity_sigma <= 20 and 0 <= drift <= 20):
        raise UsageError(f"popularity_sigma {popularity_sigma!r} and drift {drift!r} must lie between 0 and 20")
    if top_p is not None and (null_experts or not top_p > 0):
        raise UsageError(f"top_p is {top_p!r}; give a positive threshold, and no null_experts with it")
    if model is None:
        model = _model(num_layers, num_experts, top_k, null_experts)
    sizes = (model.num_sites, model.num_experts, model.num_ids)
    if sizes != (num_layers, num_experts, num_experts + null_experts):
        raise UsageError(f"model {model.name!r} has {sizes[0]} sites of {sizes[1]} experts; the trace asks for others")
    layout_rng, mix_rng, length_rng, router_rng = generator(seed).spawn(4)
    topics = min(num_experts, max(2, num_experts // max(2, top_k)))
    request_id_T, position_T, phase_T = _requests(num_tokens, num_requests, length_rng)
    mix_RC = _mixes(num_requests, topics, drift, TOPIC_SIGMA_SHARE * popularity_sigma, mix_rng)
    cumulative_RC = np.cumsum(mix_RC, axis=1)
    dtype = id_dtype(model.num_ids)
    keys = router_rng.integers(0, 2**63, size=num_layers, dtype=np.uint64)
    topic_T = np.zeros(num_tokens, dtype=np.int32)
    layers: list[npt.NDArray[Any]] = []
    for layer in range(num_layers):
        popularity_E = layout_rng.lognormal(0.0, popularity_sigma, num_experts)
        order_E = layout_rng.permutation(num_experts)
        stop_C = (np.arange(1, topics + 1) * num_experts) // topics
        # experts in cluster order: expert order_E[i] has the popularity of place i
        cumulative_E = np.cumsum(popularity_E / popularity_E.sum())
        keep = affinity if layer else 0.0
        _next_topic(topic_T, request_id_T, cumulative_RC, keep, keys[layer])
        if top_p is not None:
            sharpness = FIRST_LAYER_SHARPNESS + (1 - FIRST_LAYER_SHARPNESS) * layer / max(1, num_layers - 1)
            rng = np.random.default_rng(int(keys[layer]))
            layers.append(_top_p_layer(topic_T, popularity_E, order_E, stop_C, coactivation, sharpness, top_p, rng))
            continue
        expert_TK = np.full((num_tokens, top_k), np.iinfo(dtype).max, dtype=dtype)
        _choose(
            expert_TK, topic_T, cumulative_E, order_E, stop_C, coactivation, num_experts, null_experts, null_share,
            keys[layer] ^ np.uint64(0x5851F42D4C957F2D),
        )  # fmt: skip
        layers.append(expert_TK)
    columns = max(part.shape[1] for part in layers)
    expert_LTK = np.full((num_layers, num_tokens, columns), np.iinfo(dtype).max, dtype=dtype)
    for layer, part in enumerate(layers):
        expert_LTK[layer, :, : part.shape[1]] = convert_ids(part, dtype)
    return RoutingTrace(
        model=model,
        expert_LTK=expert_LTK,
        request_id_T=request_id_T,
        position_T=position_T,
        phase_T=phase_T,
        source_rank_T=(request_id_T % source_ranks).astype(np.int32) if source_ranks else None,
        provenance=f"synthetic seed {seed}",
        notes=(
            f"synthetic: popularity_sigma {popularity_sigma:g}, affinity {affinity:g}, coactivation {coactivation:g}, "
            f"drift {drift:g}",
        ),
        checked=True,
    )


def dynamic_top_p(prob_TE: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.int64]:
    """How many experts each token takes, (T,): the fewest, by falling probability, whose sum exceeds `threshold`.

    Where no sum does (a threshold of 1 or more), all experts: nothing is masked in the authors' code (arXiv
    2403.07652), which a reader of the formula alone would not expect.
    """
    falling_TE = -np.sort(-prob_TE, axis=1)
    exceeds_TE = np.cumsum(falling_TE, axis=1) > threshold
    return np.where(exceeds_TE.any(axis=1), exceeds_TE.argmax(axis=1) + 1, prob_TE.shape[1])


def _check(
    layers: int, experts: int, top_k: int, tokens: int, requests: int, null_experts: int, source_ranks: int
) -> None:
    positive = {
        "num_layers": layers,
        "num_experts": experts,
        "top_k": top_k,
        "num_tokens": tokens,
        "num_requests": requests,
    }
    for name, value in positive.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    if null_experts < 0 or source_ranks < 0:
        raise UsageError(f"null_experts {null_experts} and source_ranks {source_ranks} cannot be negative")
    if top_k > experts:
        raise UsageError(f"top_k is {top_k} of {experts} experts; give at most as many")
    if requests > tokens:
        raise UsageError(f"{requests} requests of {tokens} tokens; every request needs a token")


def _model(num_layers: int, num_experts: int, top_k: int, null_experts: int) -> ModelSpec:
    sites = tuple(Site(layer=i, num_experts=num_experts, num_null_experts=null_experts) for i in range(num_layers))
    return ModelSpec(
        name=f"synthetic-{num_layers}x{num_experts}-top{top_k}",
        num_hidden_layers=num_layers,
        sites=sites,
        top_k=top_k,
        hidden_size=4096,
        moe_intermediate_size=2048,
    )


def _requests(
    tokens: int, requests: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Request, position and phase of each token; lengths are lognormal and add up, the first 60 % is prefill."""
    share_R = rng.lognormal(0.0, 0.6, requests)
    length_R = 1 + rng.multinomial(tokens - requests, share_R / share_R.sum())
    start_R = np.cumsum(length_R) - length_R
    position_T = np.arange(tokens) - np.repeat(start_R, length_R)
    prompt_T = np.repeat(np.maximum(1, (0.6 * length_R).astype(np.int64)), length_R)
    request_id_T = np.repeat(np.arange(requests, dtype=np.int32), length_R)
    return request_id_T, position_T.astype(np.int32), (position_T >= prompt_T).astype(np.uint8)


def _mixes(requests: int, topics: int, drift: float, sigma: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Each request's mix of topics, (R, C): a common lognormal, its own taste, and slow waves over the trace."""
    common_C = sigma * rng.standard_normal(topics)
    taste_RC = rng.standard_normal((requests, topics))
    time_R1 = np.linspace(0.0, 1.0, requests)[:, None]
    wave_RC = np.zeros((requests, topics))
    for wave in range(1, SLOW_WAVES + 1):
        phase_C = rng.uniform(0, 2 * np.pi, topics)
        wave_RC += np.sin(2 * np.pi * wave * time_R1 + phase_C) / wave
    logit_RC = common_C + DRIFT_SCALE * drift * (taste_RC + wave_RC) / np.sqrt(2)
    weight_RC = np.exp(logit_RC - logit_RC.max(axis=1, keepdims=True))
    return np.asarray(weight_RC / weight_RC.sum(axis=1, keepdims=True))


def _top_p_layer(
    topic_T: npt.NDArray[np.int32],
    popularity_E: npt.NDArray[np.float64],
    order_E: npt.NDArray[np.int64],
    stop_C: npt.NDArray[np.int64],
    coactivation: float,
    sharpness: float,
    threshold: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    """Ids (T, most experts of a token) of one layer under dynamic top-p; higher layers are surer of their choice."""
    tokens, experts = len(topic_T), len(popularity_E)
    cluster_E = np.searchsorted(stop_C, np.arange(experts), side="right")
    base_E = np.log(popularity_E)
    parts = []
    for start in range(0, tokens, TOP_P_CHUNK):
        topic = topic_T[start : start + TOP_P_CHUNK]
        logit_TE = base_E + 2 * CLUSTER_LOGIT * coactivation * (topic[:, None] == cluster_E)
        logit_TE = sharpness * (logit_TE + rng.gumbel(size=(len(topic), experts)))
        prob_TE = np.exp(logit_TE - logit_TE.max(axis=1, keepdims=True))
        prob_TE /= prob_TE.sum(axis=1, keepdims=True)
        count_T = dynamic_top_p(prob_TE, threshold)
        chosen_TK = order_E[np.argsort(-prob_TE, axis=1, kind="stable")[:, : count_T.max()]].astype(np.uint16)
        chosen_TK[np.arange(chosen_TK.shape[1]) >= count_T[:, None]] = 65535
        parts.append(chosen_TK)
    columns = max(part.shape[1] for part in parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, columns - part.shape[1])), constant_values=65535) for part in parts]
    )


@njit(cache=True, nogil=True)
def _uniform(key: np.uint64, counter: np.uint64) -> float:
    """A number in [0, 1) of a stream that needs no state: splitmix64 of key and counter."""
    mixed = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, nogil=True)
def _next_topic(
    topic_T: npt.NDArray[np.int32],
    request_id_T: npt.NDArray[np.int32],
    cumulative_RC: npt.NDArray[np.float64],
    keep: float,
    key: np.uint64,
) -> None:
    topics = cumulative_RC.shape[1]
    for token in range(len(topic_T)):
        if _uniform(key, np.uint64(2 * token)) >= keep:
            point = _uniform(key, np.uint64(2 * token + 1))
            topic_T[token] = min(topics - 1, np.searchsorted(cumulative_RC[request_id_T[token]], point, side="right"))


@njit(cache=True, nogil=True)
def _choose(
    expert_TK: npt.NDArray[np.uint8],
    topic_T: npt.NDArray[np.int32],
    cumulative_E: npt.NDArray[np.float64],
    order_E: npt.NDArray[np.int64],
    stop_C: npt.NDArray[np.int64],
    coactivation: float,
    num_experts: int,
    null_experts: int,
    null_share: float,
    key: np.uint64,
) -> None:
    """Fills every row with different ids; a pick that was taken is drawn again, and at last the next free one."""
    top_k = expert_TK.shape[1]
    tries = 24
    for token in range(len(topic_T)):
        topic = topic_T[token]
        first = stop_C[topic - 1] if topic else 0
        low = cumulative_E[first - 1] if first else 0.0
        high = cumulative_E[stop_C[topic] - 1]
        counter = np.uint64(token) * np.uint64(top_k * (tries + 2))
        for k in range(top_k):
            expert = -1
            if null_experts and _uniform(key, counter) < null_share:
                expert = num_experts + int(_uniform(key, counter + np.uint64(1)) * null_experts)
                for earlier in range(k):
                    if expert_TK[token, earlier] == expert:
                        expert = -1
                        break
            near = k == 0 or _uniform(key, counter + np.uint64(1)) < coactivation
            for attempt in range(tries):
                if expert >= 0:
                    break
                point = _uniform(key, counter + np.uint64(2 + attempt))
                # a cluster of hot experts may be used up: half of the tries, then the whole layer
                if near and attempt < tries // 2:
                    point = low + point * (high - low)
                place = min(num_experts - 1, np.searchsorted(cumulative_E, point, side="right"))
                expert = order_E[place]
                for earlier in range(k):
                    if expert_TK[token, earlier] == expert:
                        expert = -1
                        break
            if expert < 0:
                for place in range(num_experts):
                    expert = order_E[place]
                    for earlier in range(k):
                        if expert_TK[token, earlier] == expert:
                            expert = -1
                            break
                    if expert >= 0:
                        break
            expert_TK[token, k] = expert
            counter += np.uint64(tries + 2)
