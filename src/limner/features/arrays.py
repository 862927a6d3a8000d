"""Text features as numpy arrays: what all frozen encoders do with them alike."""

import numpy as np


class NumpyFeatures:
    """The half of ``protocols.TextEncoders`` that needs no network."""

    def concat(self, arrays: list[np.ndarray], axis: int) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return np.concatenate(arrays, axis=axis)

    def pad_width(self, array: np.ndarray, width: int) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])
