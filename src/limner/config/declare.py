"""How a setting is declared: default, meaning, unit, range, and what else depends on it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

MOST = 10**9  # of anything that is counted, where its range does not say less


@dataclass(frozen=True)
class Range:
    """The values that a setting may have, and the end of a sentence about one that it may not."""

    text: str
    contains: Callable[[Any], bool]
    refusal: str
    most: int = MOST


ABOVE_0 = Range("above 0", lambda value: value > 0, "is not above 0")
AT_LEAST_0 = Range("at least 0", lambda value: value >= 0, "is below 0")
PROBABILITY = Range("0 to 1", lambda value: 0 <= value <= 1, "is not a probability, 0 to 1")
BELOW_1 = Range("0 to below 1", lambda value: 0 <= value < 1, "is not within 0 to below 1")
DECAY = Range("0 to below 1", lambda value: 0 <= value < 1, "is not a decay, 0 to below 1")
BOTH_BELOW_1 = Range(
    "both 0 to below 1",
    lambda pair: all(0 <= value < 1 for value in pair),
    "are not both within 0 to below 1",
)
# Not a number is outside, too.
GUIDANCE = Range("0 to 1,000", lambda value: 0 <= value <= 1000, "is not within 0 to 1,000")
# A process that is busy may be silent for some beats of the watch.
PATIENCE = Range("at least 5", lambda value: value >= 5, "is below 5")
SEED = Range("0 to 2**63 - 1", lambda value: 0 <= value < 2**63, "is not within 0 to 2**63 - 1")


def up_to(most: int, above: Range = ABOVE_0) -> Range:
    """A range that ends where nobody needs more: beyond it memory or hours would be gone before
    anything is said."""
    return replace(above, text=f"{above.text}, at most {most:,}", most=most)


PIXELS = up_to(16_384)  # a side

# Whether a setting may differ from the checkpoint's when a run goes on. Free: it moves no example,
# or is compared in another way. On request: where checkpoint.allow_changes names it.
OnResume = Literal["fixed", "free", "on request"]
# What a family must have for a setting to mean something.
Need = Literal[
    "",
    "captions",
    "caption chunks",
    "spatial latents",
    "prediction types",
    "trainable text encoders",
]


@dataclass(frozen=True)
class Beside:
    """What must be given beside a setting for it to do anything: one of some settings, or one
    setting with one of some values."""

    names: tuple[str, ...]  # a name without a dot is of the same section
    text: str  # the same in words, as the end of "does nothing without ..."
    values: tuple[str, ...] = ()  # empty: any but none, 0, false and what is empty
    # Whether the setting is refused without them: whoever gives it wants another run than this
    # would be. Else a line says so.
    refused: bool = True


HUB = Beside(("hub",), "a data set of the Hub (hub)")
ONE_SET = Beside(("folder", "hub"), "data.folder or data.hub; sets have their own")
DOWNLOADS = Beside(("data.hub", "data.sets"), "data.hub", refused=False)
SOME_CAPTIONS = Beside(("caption",), "data.caption", refused=False)
DROPPED = Beside(("drop_caption",), "data.drop_caption", refused=False)
PART = Beside(("strategy",), 'the strategy "later" or "earlier"', ("later", "earlier"))
BOUNDS = Beside(("strategy",), 'the strategy "range"', ("range",))
LOGIT_NORMAL = Beside(("density",), 'the density "logit_normal"', ("logit_normal",))
MODE = Beside(("density",), 'the density "mode"', ("mode",))
LORA = Beside(("kind",), 'adapter.kind="lora"', ("lora",))
WARM_UP = Beside(
    ("schedule",),
    'a schedule that has a warm-up, such as optim.schedule="constant_with_warmup"',
    ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
)
RESTARTS = Beside(("schedule",), 'optim.schedule="cosine_with_restarts"', ("cosine_with_restarts",))
AVERAGE = Beside(("ema",), "optim.ema", refused=False)
JAX = Beside(("kind",), 'engine.kind="jax"', ("jax",))
JAX_CACHE = replace(JAX, refused=False)
PREVIEWS = Beside(("prompts", "captions"), "preview.prompts or preview.captions", refused=False)
HELD_OUT = Beside(("hold_out",), "validation.hold_out", refused=False)
TRACKERS = Beside(("to",), "log.to", refused=False)
PUSH = Beside(("hub",), "export.hub", refused=False)


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting besides its type and default."""

    about: str
    unit: str
    range: Range | None
    resume: OnResume
    path: bool  # ``~`` stands for the user's home in it
    shared: bool  # by recipes that are trained one after the other
    on_card: bool  # shown on the model card
    needs: Need
    beside: Beside | None


def setting(  # noqa: PLR0913 - what a declaration says, most of it by keyword
    default: Any,
    about: str,
    *,
    unit: str = "",
    range: Range | None = None,
    resume: OnResume = "fixed",
    path: bool = False,
    shared: bool = False,
    on_card: bool = False,
    needs: Need = "",
    beside: Beside | None = None,
) -> Any:
    """A dataclass field that carries its declaration."""
    declaration = Declaration(about, unit, range, resume, path, shared, on_card, needs, beside)
    return field(default=default, metadata={"declaration": declaration})
