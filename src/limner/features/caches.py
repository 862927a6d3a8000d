"""Which caches a run uses, each named by all that its numbers depend on."""

from functools import partial
from pathlib import Path
from typing import Any

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.data import image
from limner.errors import InputError
from limner.families.family import Family
from limner.features.store import DiskStore, FeatureStore, MemoryStore
from limner.protocols import ProcessGroup, Report
from limner.storage import atomic

TEXT_BATCH = 8  # captions that a text encoder sees at once


def cache_folder(config: Config) -> Path:
    """Where encoded pictures and captions are kept."""
    return atomic.user_cache_folder() if config.data.cache == "auto" else Path(config.data.cache)


def known_pictures_file(config: Config) -> Path | None:
    """The file that remembers which pictures were looked at; None where nothing is to be kept on
    disk."""
    return (
        None
        if config.data.cache in ("off", "memory")
        else cache_folder(config) / "known-pictures.json"
    )


def open_stores(
    config: Config, family: Family, opened: BaseModel, process: ProcessGroup, report: Report
) -> tuple[FeatureStore | None, FeatureStore | None]:
    """The caches of picture and caption features, each named by what its numbers depend on; what is
    being trained is never cached.

    Raises:
        InputError: when several processes are to keep them in memory.
    """
    if config.data.cache == "off":
        return None, None
    keeps_texts = bool(family.text_components) and not config.adapter.text_encoders
    if config.data.cache == "memory":
        if process.world_size > 1:
            raise InputError(
                f'data.cache="memory" serves one process, there are {process.world_size}. Give a '
                "folder, which all fill and read; one below /dev/shm is in memory."
            )
        return MemoryStore(), MemoryStore() if keeps_texts else None
    root, how = (
        cache_folder(config),
        [
            family.name,
            config.engine.kind,
            config.engine.tf32,
            config.data.cache_dtype,
            *process.arithmetic_versions(),
        ],
    )
    half = process.precision if config.model.vae is not None else "no"

    def store(kind: str, settings: list[Any], parts: tuple[str, ...]) -> DiskStore:
        weights = process.first(partial(opened.fingerprint, *parts))
        return DiskStore(root / f"{kind}-{atomic.digest_json([how, settings, weights])}", report)

    captions = (
        store(
            "caption",
            [config.data.caption_chunks, TEXT_BATCH],
            (*family.text_components, *family.tokenizers),
        )
        if keeps_texts
        else None
    )
    return store(
        "picture",
        [half, image.decoder_versions(), image_batch_size(config)],
        family.image_components,
    ), captions


def feature_settings(config: Config, process: ProcessGroup) -> dict[str, Any]:
    """How features are made."""
    return {
        "batch": image_batch_size(config),
        "text_batch": TEXT_BATCH,
        "chunks": config.data.caption_chunks,
        "dtype": config.data.cache_dtype,
        "threads": config.data.threads,
        "world": process.world_size,
    }


def image_batch_size(config: Config) -> int:
    """Pictures that an encoder sees at once: about two million pixels, at most 8; an autoencoder in
    float32 takes 0.64 GiB for each 512x512."""
    if config.engine.encode_batch is not None:
        return config.engine.encode_batch
    side = max(
        (config.data.size,)
        if config.data.buckets is None
        else (config.data.size, *config.data.buckets.resolutions)
    )
    return max(1, min(8, 8 * 512 * 512 // (side * side)))
