"""Which caches a run uses, each named by all that its numbers depend on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.data import image
from limner.errors import InputError
from limner.families.family import Family
from limner.features.encoder import FeatureEncoder
from limner.features.store import DiskStore, FeatureStore, MemoryStore
from limner.protocols import Encoders, ProcessGroup, Report
from limner.storage import atomic

TEXT_BATCH = 8  # captions that a text encoder sees at once
# How an engine reads tokens, where captions that were encoded otherwise may be about.
TOKEN_RULES = {"jax": ["special tokens of all files"]}


def cache_folder(config: Config) -> Path:
    """Where encoded pictures and captions are kept."""
    return atomic.user_cache_folder() if config.data.cache == "auto" else Path(config.data.cache)


def known_pictures_file(config: Config) -> Path | None:
    """The file that remembers which pictures were decoded well; None: nothing is kept on disk."""
    if config.data.cache in ("off", "memory"):
        return None
    return cache_folder(config) / "known-pictures.json"


def open_stores(
    config: Config, family: Family, base: BaseModel, process: ProcessGroup, report: Report
) -> tuple[FeatureStore | None, FeatureStore | None]:
    """Open the caches of picture and caption features. What is being trained is never cached.

    Raises:
        InputError: when several processes are to keep them in memory.
    """
    data = config.data
    if data.cache == "off":
        return None, None
    caches_text = bool(family.text.components) and not config.adapter.text_encoders
    if data.cache == "memory":
        if process.world_size > 1:
            raise InputError(
                f'data.cache="memory" serves one process, there are {process.world_size}. Give a '
                "folder, which all fill and read; one below /dev/shm is in memory."
            )
        return MemoryStore(), MemoryStore() if caches_text else None
    # All that the last bits of features depend on, besides the encoders' bytes.
    arithmetic: list[object] = [
        family.name,
        config.engine.kind,
        config.engine.tf32,
        data.cache_dtype,
        *process.arithmetic_versions(),
    ]
    if config.engine.deterministic:
        arithmetic.append("deterministic")

    def open_store(kind: str, settings: list[object], components: tuple[str, ...]) -> DiskStore:
        weights = process.first(partial(base.fingerprint, *components))
        name = f"{kind}-{atomic.digest_json([arithmetic, settings, weights])}"
        return DiskStore(cache_folder(config) / name, report)

    # Only another autoencoder than the base's runs in the recipe's precision.
    precision = process.precision if config.model.vae is not None else "no"
    picture_settings = [precision, image.decoder_versions(), image_batch_size(config)]
    texts = None
    if caches_text:
        components = (*family.text.components, *family.text.tokenizers)
        rules = TOKEN_RULES.get(config.engine.kind, [])
        texts = open_store("caption", [data.caption_chunks, TEXT_BATCH, *rules], components)
    return open_store("picture", picture_settings, family.images.components), texts


def open_feature_encoder(
    config: Config,
    family: Family,
    process: ProcessGroup,
    get_encoders: Callable[[], Encoders],
    image_store: FeatureStore | None,
    text_store: FeatureStore | None,
) -> FeatureEncoder:
    """Open what makes features as the recipe says, and reads them from the stores."""
    return FeatureEncoder(
        family,
        get_encoders,
        image_store,
        text_store,
        batch=image_batch_size(config),
        text_batch=TEXT_BATCH,
        chunks=config.data.caption_chunks,
        dtype=config.data.cache_dtype,
        threads=config.data.threads,
        world_size=process.world_size,
    )


def image_batch_size(config: Config) -> int:
    """Pictures that an encoder sees at once: about two million pixels, at most 8.

    An autoencoder in float32 takes 0.64 GiB for each 512x512.
    """
    if config.engine.encode_batch is not None:
        return config.engine.encode_batch
    sides = [config.data.size]
    if config.data.buckets is not None:
        sides += config.data.buckets.resolutions
    side = max(sides)
    return max(1, min(8, 8 * 512 * 512 // (side * side)))
