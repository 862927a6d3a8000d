"""Before training: pictures and captions become features, once where that is exact, each process
its share, restartable at any moment."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import base, config, durable, engines
from limner.cache import Memory, Rows, Store
from limner.data import image, index
from limner.data.records import Tell
from limner.engine import World
from limner.family import Family
from limner.faults import Fault, InputFault, Stopped
from limner.features import Picture

if TYPE_CHECKING:
    from limner.training import Run

TEXT_BATCH = 8  # captions that a text encoder sees at once


def encode_only(job: "Run") -> Path:
    """Fill the caches ahead of time."""
    if job.cfg.data.cache in ("off", "memory"):
        raise InputFault(
            f"data.cache={job.cfg.data.cache}: nothing that is encoded ahead of time would be "
            "kept. Set data.cache to auto or to a folder."
        )
    encode(job)
    captions, pictures = requests(job)
    endless = sum(job.stream.variants(e) is None for e in job.stream.entries)
    again = (
        f"; {endless} pictures are cropped anew each time and encoded in every step (data.crops "
        "makes an end of that)"
        if endless
        else ""
    )
    job.tell(
        f"{cache_folder(job.cfg)}: {len(pictures)} pictures and "
        f"{len(captions) if job.stream.encoded.text_store else 0} captions are encoded{again}"
    )
    return cache_folder(job.cfg)


def cache_folder(cfg: config.Config) -> Path:
    """Where encoded pictures and captions are kept."""
    return durable.user_cache() if cfg.data.cache == "auto" else Path(cfg.data.cache)


def known_pictures(cfg: config.Config) -> Path | None:
    """The file that remembers which pictures were looked at; None where nothing is to be kept on
    disk."""
    return (
        None if cfg.data.cache in ("off", "memory") else cache_folder(cfg) / "known-pictures.json"
    )


def stores(
    cfg: config.Config, family: Family, opened: base.Base, process: World, tell: Tell
) -> tuple[Rows | None, Rows | None]:
    """The caches of picture and caption features, each named by what its numbers depend on; what is
    being trained is never cached.

    Raises:
        InputFault: when several processes are to keep them in memory.
    """
    if cfg.data.cache == "off":
        return None, None
    keeps_texts = bool(family.captions) and not cfg.adapt.text_encoders
    if cfg.data.cache == "memory":
        if process.world > 1:
            raise InputFault(
                f'data.cache="memory" serves one process, there are {process.world}. Give a '
                "folder, which all fill and read; one below /dev/shm is in memory."
            )
        return Memory(), Memory() if keeps_texts else None
    root, how = (
        cache_folder(cfg),
        [
            family.name,
            cfg.engine.kind,
            cfg.engine.tf32,
            cfg.data.cache_dtype,
            *engines.arithmetic(cfg.engine.kind, process),
        ],
    )
    half = process.precision if cfg.model.vae is not None else "no"

    def store(kind: str, settings: list[Any], parts: tuple[str, ...]) -> Store:
        weights = process.first(partial(opened.fingerprint, *parts))
        return Store(root / f"{kind}-{durable.digest_json([how, settings, weights])}", tell)

    captions = (
        store("caption", [cfg.data.chunks, TEXT_BATCH], (*family.captions, *family.tokenizers))
        if keeps_texts
        else None
    )
    return store("picture", [half, image.decoder(), picture_batch(cfg)], family.pictures), captions


def feature_settings(cfg: config.Config, process: World) -> dict[str, Any]:
    """How features are made."""
    return {
        "batch": picture_batch(cfg),
        "text_batch": TEXT_BATCH,
        "chunks": cfg.data.chunks,
        "dtype": cfg.data.cache_dtype,
        "threads": cfg.data.threads,
        "world": process.world,
    }


def picture_batch(cfg: config.Config) -> int:
    """Pictures that an encoder sees at once: about two million pixels, at most 8; an autoencoder in
    float32 takes 0.64 GiB for each 512x512."""
    if cfg.engine.encode_batch is not None:
        return cfg.engine.encode_batch
    side = max(
        (cfg.data.size,)
        if cfg.data.buckets is None
        else (cfg.data.size, *cfg.data.buckets.resolutions)
    )
    return max(1, min(8, 8 * 512 * 512 // (side * side)))


def encode(job: "Run") -> None:
    """Fill the caches, each process its share, and let go of the encoders when training will not
    need them."""
    stream, process = job.stream, job.process
    captions, pictures = requests(job)
    tell_long(job)
    mine = slice(process.rank, None, process.world)
    while not job.verified:
        fault: Fault | None = None
        try:
            stream.encoded.fill_texts(captions[mine], job.stop.check)
            stream.encoded.fill_images(pictures[mine], job.stop.check)
        except Stopped:  # until all have heard of it
            pass
        except Fault as error:
            fault = error
        if process.any(fault is not None):
            raise fault or silent("another process could not encode its share")
        job.stop.asked = process.any(job.stop.asked)
        job.stop.check()
        job.verified = not process.any(stream.encoded.lacks(pictures, captions))
    cached = stream.encoded.image_store is not None and all(
        stream.variants(e) is not None for e in stream.entries
    )
    texts = stream.encoded.text_store is not None
    job.engine.release(
        [
            *(job.family.pictures if cached else ()),
            *((*job.family.captions, *job.family.tokenizers) if texts else ()),
        ]
    )


def requests(job: "Run") -> tuple[list[str], list[Picture]]:
    """All captions and pictures that can be kept and that the run will ask for."""
    stream, entries = job.stream, (*job.stream.entries, *job.held_out)
    captions = list(dict.fromkeys(c for e in entries for c in e.captions)) + (
        [""] if job.cfg.data.drop_caption else []
    )
    captions = captions if job.family.captions else []
    pictures = [stream.picture(e, g) for e in stream.entries for g in stream.variants(e) or ()]
    return captions, pictures + [stream.picture(e, stream.watched(e)) for e in job.held_out]


def tell_long(job: "Run") -> None:
    """Name the captions that the text encoders will see cut."""
    parts, pairs = (
        job.engine.parts(),
        [(e.key, c) for e in (*job.stream.entries, *job.held_out) for c in e.captions],
    )
    for tokenizer in job.family.tokenizers:
        limit = job.cfg.data.chunks * (parts.limit(tokenizer) - 2) + 2
        if long := index.caption_report(pairs, partial(parts.lengths, tokenizer), limit):
            named = ", ".join(f"{o.key} ({o.tokens})" for o in long[:10])
            job.tell(
                f"{len(long)} captions have more than the {limit} tokens that the {tokenizer} "
                f"gives on and are cut: {named}"
            )


def silent(text: str) -> Fault:
    """A fault that another process tells of."""
    fault = Fault(text)
    fault.told = True
    return fault
