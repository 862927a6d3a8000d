"""Before training: pictures and captions become features, once where that is exact, each process
its share, restartable at any moment."""

from functools import partial
from pathlib import Path

from limner.data import index
from limner.errors import InputError, LimnerError, Stopped
from limner.features.caches import cache_folder
from limner.features.encoder import ImageRequest
from limner.training.setup import Setup


def encode_only(setup: Setup) -> Path:
    """Fill the caches ahead of time."""
    if setup.config.data.cache in ("off", "memory"):
        raise InputError(
            f"data.cache={setup.config.data.cache}: nothing that is encoded ahead of time would be "
            "kept. Set data.cache to auto or to a folder."
        )
    fill_caches(setup)
    captions, pictures = all_requests(setup)
    endless = sum(setup.stream.variants(e) is None for e in setup.stream.entries)
    again = (
        f"; {endless} pictures are cropped anew each time and encoded in every step "
        "(data.crop_variants "
        "makes an end of that)"
        if endless
        else ""
    )
    setup.report(
        f"{cache_folder(setup.config)}: {len(pictures)} pictures and "
        f"{len(captions) if setup.stream.features.text_store else 0} captions are encoded{again}"
    )
    return cache_folder(setup.config)


def fill_caches(setup: Setup) -> None:
    """Fill the caches, each process its share, and let go of the encoders when training will not
    need them."""
    stream, process = setup.stream, setup.process
    captions, pictures = all_requests(setup)
    report_truncated_captions(setup)
    mine = slice(process.rank, None, process.world_size)
    while not setup.caches_verified:
        fault: LimnerError | None = None
        try:
            stream.features.fill_texts(captions[mine], setup.stop.check)
            stream.features.fill_images(pictures[mine], setup.stop.check)
        except Stopped:  # until all have heard of it
            pass
        except LimnerError as error:
            fault = error
        if process.any(fault is not None):
            raise fault or already_reported("another process could not encode its share")
        setup.stop.asked = process.any(setup.stop.asked)
        setup.stop.check()
        setup.caches_verified = not process.any(stream.features.is_incomplete(pictures, captions))
    cached = stream.features.image_store is not None and all(
        stream.variants(e) is not None for e in stream.entries
    )
    texts = stream.features.text_store is not None
    setup.engine.release_encoders(
        [
            *(setup.family.image_components if cached else ()),
            *((*setup.family.text_components, *setup.family.tokenizers) if texts else ()),
        ]
    )


def all_requests(setup: Setup) -> tuple[list[str], list[ImageRequest]]:
    """All captions and pictures that can be kept and that the run will ask for."""
    stream, entries = setup.stream, (*setup.stream.entries, *setup.validation_entries)
    captions = list(dict.fromkeys(c for e in entries for c in e.captions)) + (
        [""] if setup.config.data.drop_caption else []
    )
    captions = captions if setup.family.text_components else []
    pictures = [
        stream.image_request(e, g) for e in stream.entries for g in stream.variants(e) or ()
    ]
    return captions, pictures + [
        stream.image_request(e, stream.validation_crop(e)) for e in setup.validation_entries
    ]


def report_truncated_captions(setup: Setup) -> None:
    """Name the captions that the text encoders will see cut."""
    parts, pairs = (
        setup.engine.get_encoders(),
        [
            (e.key, c)
            for e in (*setup.stream.entries, *setup.validation_entries)
            for c in e.captions
        ],
    )
    for tokenizer in setup.family.tokenizers:
        limit = setup.config.data.caption_chunks * (parts.max_tokens(tokenizer) - 2) + 2
        if long := index.caption_report(pairs, partial(parts.count_tokens, tokenizer), limit):
            named = ", ".join(f"{o.key} ({o.tokens})" for o in long[:10])
            setup.report(
                f"{len(long)} captions have more than the {limit} tokens that the {tokenizer} "
                f"gives on and are cut: {named}"
            )


def already_reported(text: str) -> LimnerError:
    """A fault that another process tells of."""
    fault = LimnerError(text)
    fault.reported = True
    return fault
