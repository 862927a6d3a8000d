"""Limner fine-tunes text-to-image diffusion models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limner.config.schema import Config
    from limner.data.source import Source


__all__ = ["Record", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``limner.Record``, without making every command wait for what it imports."""
    if name == "Record":
        from limner.data.source import Record

        return Record
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train(
    recipe: "str | Path | Config", overrides: Sequence[str] = (), *, records: "Source | None" = None
) -> Path:
    """Train as a recipe says, or go on with a run that was begun; returns the run's folder, which
    holds the result.

    Args:
        recipe: path of a TOML file, or a ``limner.config.Config``.
        overrides: ``section.key=value`` settings that replace the recipe's.
        records: pictures and captions of one's own, instead of ``data.folder`` and ``data.hub``:
            any object with ``len(records)`` and ``records[i] -> limner.Record``; the same ``i``
            must always give the same record.

    Raises:
        limner.errors.LimnerError: of the kind that fits, with a message for the user.
    """
    from limner.config import toml
    from limner.config.schema import Config
    from limner.training import loop

    if isinstance(recipe, Config):
        config = toml.build(Config, toml.apply_overrides(toml.to_plain(recipe), overrides))
    else:
        config = toml.load_recipe(Path(recipe), overrides)
    return loop.run_training(config, records)
