"""CLIP's text encoder (arXiv:2103.00020), with and without projection, as one pure function of its
arrays and its config.json."""

from typing import Any

import jax.numpy as jnp

from limner.engines.jax.attention import Array
from limner.engines.jax.nn import ACTIVATIONS, Params, attention, layer_norm, linear, list_shapes


def unsupported(config: dict[str, Any]) -> list[str]:
    """What in a config this file has no code for, in words."""
    known = config.get("hidden_act", "quick_gelu")
    return (
        []
        if known in ACTIVATIONS
        else [f"hidden_act is {known!r}, one of {', '.join(ACTIVATIONS)} is expected"]
    )


def encode_text(
    p: Params,
    config: dict[str, Any],
    ids: Array,
    skip: int = 0,
    projection: bool = False,
    kind: Any = jnp.float32,
) -> tuple[Array, Array]:
    """Hidden states [n, tokens, width] and pooled embedding [n, width] of token ids [n, tokens];
    see ``protocols.TextEncoders``.

    Args:
        projection: whether the pooled embedding is projected: a ``CLIPTextModelWithProjection``.
        kind: the type that is computed in.
    """
    width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
    m, act = p / "text_model", ACTIVATIONS[config.get("hidden_act", "quick_gelu")]
    words = m("embeddings.token_embedding.weight", config["vocab_size"], width)
    places = m(
        "embeddings.position_embedding.weight", config.get("max_position_embeddings", 77), width
    )
    x = (words[ids] + places[: ids.shape[1]]).astype(kind)
    states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = m / "encoder" / "layers" / i
        h, a = layer_norm(layer / "layer_norm1", x, eps), layer / "self_attn"
        q, k, v = (linear(a / name, h, width) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + linear(
            a / "out_proj", attention(q, k, v, config["num_attention_heads"], causal=True), width
        )
        h = act(
            linear(
                layer / "mlp" / "fc1",
                layer_norm(layer / "layer_norm2", x, eps),
                config["intermediate_size"],
            )
        )
        x = x + linear(layer / "mlp" / "fc2", h, width)
        states.append(x)
    last = layer_norm(m / "final_layer_norm", x, eps)
    end = config.get("eos_token_id", 49407)
    at = (
        ids.argmax(-1) if end == 2 else (ids == end).argmax(-1)
    )  # configs of old say 2, and mean the highest id
    pooled = last[jnp.arange(len(ids)), at]
    if projection:
        pooled = linear(
            p / "text_projection", pooled, config.get("projection_dim", 512), bias=False
        )
    return states[-1 - skip] if skip else last, pooled


def text_shapes(config: dict[str, Any], projection: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array."""
    return list_shapes(
        lambda p: encode_text(p, config, jnp.zeros((1, 1), jnp.int32), projection=projection)
    )
