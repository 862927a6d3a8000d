"""Configs of published models, cut to what the shapes of arrays depend on.

The trained networks have 859,520,964 (sd), 2,567,463,684 (sdxl), 1,026,225,920 (kandinsky22-prior)
and 1,253,057,288 (kandinsky22-decoder) parameters.
"""

import json
from pathlib import Path

import numpy as np

from limner.protocols import BaseConfigs


def load_published(family: str) -> BaseConfigs | None:
    """The component configs of the published model of a family; None where there are none."""
    path = Path(__file__).with_name(f"{family}.json")
    if not path.is_file():
        return None
    components = json.loads(path.read_text(encoding="utf-8"))
    model_index = components.pop("model_index")
    # A statistic is written as its shape and the number that fills it.
    statistics = {
        name: np.full(one["shape"], one["fill"], np.float32)
        for name, one in components.pop("statistics", {}).items()
    }
    return BaseConfigs(model_index, components, statistics)
