"""Random features of the right shapes, in place of encoders that are not loaded."""

import numpy as np

from limner import rng
from limner.families.family import Family
from limner.features.arrays import NumpyFeatures
from limner.protocols import BaseConfigs, Features


class StandInEncoders(NumpyFeatures):
    """Stand in for the frozen encoders with random numbers of the shapes that configs promise."""

    def __init__(self, configs: BaseConfigs):
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
        config = self.configs[name]
        # T5's name for it comes second.
        hidden_size = config.get("hidden_size") or config["d_model"]
        width = config.get("projection_dim") or hidden_size
        return self.draws.standard_normal(
            (*ids.shape, hidden_size), np.float32
        ), self.draws.standard_normal((len(ids), width), np.float32)

    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        config = self.configs[name]
        sides = (side >> (len(config["block_out_channels"]) - 1) for side in pixels.shape[2:])
        return self.draws.standard_normal(
            (len(pixels), config["latent_channels"], *sides), np.float32
        )

    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        return self.draws.standard_normal(
            (len(pixels), self.configs[name]["projection_dim"]), np.float32
        )

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        """See ``protocols.Encoders``: a start and an end, whatever the text."""
        return [[0, 1]] * len(texts)

    def pad_token(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return 1

    def max_tokens(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return min(self.configs[tokenizer].get("model_max_length") or 77, 77)


def make_image_features(
    family: Family, parts: StandInEncoders, rows: int, shape: tuple[int, int]
) -> Features:
    """Make random image features of pictures that are cut to ``shape`` (height, width)."""
    side = family.images.clip_size(parts.configs)
    shapes = {"crop": shape, "center_square": (side, side)}
    return family.images.encode(
        parts, *(np.zeros((rows, 3, *shapes[view]), np.float32) for view in family.images.views)
    )
