"""CLIP's text encoder (arXiv:2103.00020), with and without projection.

It is a pure function of its arrays and the component's config.json.
"""

from typing import Any

import jax.numpy as jnp

from limner.engines.jax.attention import Array
from limner.engines.jax.nn import ACTIVATIONS, Params, attention, layer_norm, linear, list_shapes
from limner.engines.jax.settings import complete, find_unserved

# The values of settings that there is code for; the class's first.
SERVED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": tuple(ACTIVATIONS),
    # Some stock pipelines then hide the padding.
    "use_attention_mask": (False, None),
}
# What the class says where a config does not.
DEFAULTS: dict[str, Any] = {
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "vocab_size": 49408,
}


def find_unsupported(config: dict[str, Any]) -> list[str]:
    """Say which settings of a config there is no code for."""
    return find_unserved(complete(config, DEFAULTS), SERVED_SETTINGS, DEFAULTS)


def encode_text(
    p: Params,
    config: dict[str, Any],
    ids: Array,
    skip: int = 0,
    projection: bool = False,
    dtype: Any = jnp.float32,
) -> tuple[Array, Array]:
    """Encode token ids [n, tokens]; see ``protocols.TextEncoders``.

    Args:
        projection: whether the pooled embedding is projected (``CLIPTextModelWithProjection``).
        dtype: the type of activations.

    Returns:
        Hidden states [n, tokens, width] and pooled embedding [n, width].
    """
    config = complete(config, DEFAULTS)
    eps = config["layer_norm_eps"]
    model = p / "text_model"
    x = embed_tokens(model / "embeddings", config, ids).astype(dtype)
    states = [x]
    for i in range(config["num_hidden_layers"]):
        x = encoder_layer(model / "encoder" / "layers" / i, config, x)
        states.append(x)
    last = layer_norm(model / "final_layer_norm", x, eps)
    end = config["eos_token_id"]
    # Old configs say 2, and mean the highest id.
    position = ids.argmax(-1) if end == 2 else (ids == end).argmax(-1)
    pooled = last[jnp.arange(len(ids)), position]
    if projection:
        width = config["projection_dim"]
        pooled = linear(p / "text_projection", pooled, width, bias=False)
    return states[-1 - skip] if skip else last, pooled


def embed_tokens(p: Params, config: dict[str, Any], ids: Array) -> Array:
    """Embed token ids and their positions: [n, tokens, width]."""
    width = config["hidden_size"]
    words = p("token_embedding.weight", config["vocab_size"], width)
    max_tokens = config["max_position_embeddings"]
    positions = p("position_embedding.weight", max_tokens, width)
    return words[ids] + positions[: ids.shape[1]]


def encoder_layer(p: Params, config: dict[str, Any], x: Array) -> Array:
    """Apply causal self-attention and two linear layers to x [n, tokens, width]."""
    eps, width = config["layer_norm_eps"], x.shape[-1]
    activation = ACTIVATIONS[config["hidden_act"]]
    h = layer_norm(p / "layer_norm1", x, eps)
    layer = p / "self_attn"
    q, k, v = (linear(layer / name, h, width) for name in ("q_proj", "k_proj", "v_proj"))
    attended = attention(q, k, v, config["num_attention_heads"], causal=True)
    x = x + linear(layer / "out_proj", attended, width)
    h = layer_norm(p / "layer_norm2", x, eps)
    h = activation(linear(p / "mlp" / "fc1", h, config["intermediate_size"]))
    return x + linear(p / "mlp" / "fc2", h, width)


def list_text_encoder_shapes(
    config: dict[str, Any], projection: bool
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every array."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return list_shapes(lambda p: encode_text(p, config, ids, projection=projection))
