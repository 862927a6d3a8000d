"""The training objective as seven numbers for each example, computed on the host in float64.

Every objective here is linear in the clean signal x0 and the noise e:

    input = a * x0 + s * e
    target = p * x0 + q * e
    loss = w * mean((prediction - target) ** 2)

Schedule, prediction type and weighting are all decided by an objective; an engine only multiplies
and adds.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class NoiseLevels:
    """The numbers of a batch, each float32 [batch]."""

    timestep: np.ndarray  # the network's argument
    signal_in: np.ndarray  # a
    noise_in: np.ndarray  # s
    signal_target: np.ndarray  # p
    noise_target: np.ndarray  # q
    weight: np.ndarray  # w
    # DREAM's lambda, sqrt(1 - alpha_bar) ** detail_preservation; 0 where DREAM is off.
    dream: np.ndarray


class Objective(Protocol):
    """What the network learns to predict, and at which noise levels."""

    @property
    def prediction_type(self) -> str | None:
        """What diffusers' scheduler configs call it; None where they have no name for it."""
        ...

    def at(self, u: np.ndarray, latent_shape: tuple[int, ...]) -> NoiseLevels:
        """Return the noise levels for uniform numbers.

        Args:
            u: in [0, 1), float64 [batch].
            latent_shape: of one example's latents.
        """
        ...
