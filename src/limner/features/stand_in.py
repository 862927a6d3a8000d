"""Random features of the right shapes, where no weights are at hand."""

import numpy as np

from limner import rng
from limner.config.schema import Config
from limner.diffusion.objective import Objective
from limner.families.family import Family
from limner.families.text import encode_captions, tokenize
from limner.protocols import Batch, Configs, Features


class StandInEncoders:
    """The frozen encoders' place, taken by random numbers of the shapes that their configs
    promise."""

    def __init__(self, configs: Configs):
        self.configs, self.draws = configs, rng.at(0, "bench", 0)

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.Encoders``."""
        mean = self.encode_movq(name, pixels) / np.float32(
            self.configs[name].get("scaling_factor", 0.18215)
        )
        return mean, np.zeros_like(mean)

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``."""
        known = self.configs[name]
        width = known.get("projection_dim") or known["hidden_size"]
        return self.draws.standard_normal(
            (*ids.shape, known["hidden_size"]), np.float32
        ), self.draws.standard_normal((len(ids), width), np.float32)

    def concat_features(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return np.concatenate(arrays, axis=-1)

    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        known = self.configs[name]
        sides = (side >> (len(known["block_out_channels"]) - 1) for side in pixels.shape[2:])
        return self.draws.standard_normal(
            (len(pixels), known["latent_channels"], *sides), np.float32
        )

    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        return self.draws.standard_normal(
            (len(pixels), self.configs[name]["projection_dim"]), np.float32
        )

    def tokenize(self, tokenizer: str, captions: list[str], chunks: int) -> np.ndarray:
        """See ``protocols.Encoders``."""
        return np.ones((len(captions), chunks, self.max_tokens(tokenizer)), np.int64)

    def count_tokens(self, tokenizer: str, captions: list[str]) -> list[int]:
        """See ``protocols.Encoders``."""
        return [self.max_tokens(tokenizer)] * len(captions)

    def max_tokens(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return min(self.configs[tokenizer].get("model_max_length") or 77, 77)


def make_batch(config: Config, configs: Configs, family: Family, rows: int) -> Batch:
    """A batch of random features, of the shapes that the recipe's pictures and captions would
    have."""
    parts, draws = StandInEncoders(configs), rng.at(0, "bench", 1)
    features = make_image_features(family, parts, rows, (config.data.size, config.data.size))
    x0 = family.clean_latents(features, configs, np.zeros_like(features[family.latent_features[0]]))
    noising = vars(
        Objective.from_scheduler(configs["scheduler"], config.objective).at(draws.random(rows))
    )
    kept = {name: array for name, array in features.items() if name not in family.latent_features}
    tokens = (
        tokenize(family, parts, [""] * rows, config.data.caption_chunks)
        if family.text_components
        else {}
    )
    texts = tokens if config.adapter.text_encoders else encode_captions(family, parts, tokens)
    return {
        "x0": x0,
        "noise": draws.standard_normal(x0.shape, np.float32),
        **noising,
        "size_and_crop": np.full((rows, 6), config.data.size, np.float32),
        **kept,
        **texts,
    }


def make_image_features(
    family: Family, parts: StandInEncoders, rows: int, shape: tuple[int, int]
) -> Features:
    """Random image features of pictures that are cut to ``shape`` (height, width)."""
    side = family.clip_image_size(parts.configs)
    shapes = {"crop": shape, "center_square": (side, side)}
    return family.encode_image(
        parts, *(np.zeros((rows, 3, *shapes[view]), np.float32) for view in family.image_views)
    )
