"""Encode pictures and captions before training, once where that is exact.

Each process encodes its share, and any of them may be stopped and started again.
"""

from functools import partial
from pathlib import Path

from limner.errors import InputError, LimnerError, Stopped, say_count
from limner.features.caches import cache_folder
from limner.features.caption_lengths import find_truncated_captions, report_cut_prompts
from limner.features.encoder import ImageRequest
from limner.training.setup import Setup


def encode_only(setup: Setup) -> Path:
    """Fill the caches ahead of time, and return their folder.

    Raises:
        InputError: when the recipe keeps no cache on disk.
    """
    cache = setup.config.data.cache
    if cache in ("off", "memory"):
        raise InputError(
            f"data.cache={cache}: nothing that is encoded ahead of time would be kept. Set "
            "data.cache to auto or to a folder."
        )
    fill_caches(setup)
    stream, folder = setup.stream, cache_folder(setup.config)
    captions, pictures = list_requests(setup)
    count = len(captions) if stream.features.text_store else 0
    endless = sum(stream.crops.list_variants(entry) is None for entry in stream.entries)
    anew = ""
    if endless:
        anew = (
            f"; {say_count(endless, 'picture is', 'pictures are')} cropped anew each time and "
            "encoded in every step "
            "(data.crop_variants makes an end of that)"
        )
    what = say_count(len(pictures), "picture", "pictures")
    what += f" and {say_count(count, 'caption', 'captions')}"
    setup.report(f"{folder}: {what} are encoded{anew}")
    return folder


def fill_caches(setup: Setup) -> None:
    """Fill the caches, each process its share, and release the encoders that training will not
    need.

    Raises:
        LimnerError: when a process cannot encode its share; all raise it together.
        Stopped: when a process was told to stop; all stop together.
    """
    features, process = setup.stream.features, setup.process
    captions, pictures = list_requests(setup)
    report_truncated_captions(setup)
    share = slice(process.rank, None, process.world_size)
    # Another process may find damaged rows that this one had written: again until all agree.
    while not setup.caches_verified:
        error: LimnerError | None = None
        try:
            features.fill_texts(captions[share], setup.stop.check)
            features.fill_images(pictures[share], setup.stop.check)
        except Stopped:
            # It leaves with the others below, who would wait for it for ever.
            pass
        except LimnerError as own:
            error = own
        if process.any(error is not None):
            raise error or make_reported("another process could not encode its share")
        setup.stop.asked = process.any(setup.stop.asked)
        setup.stop.check()
        setup.caches_verified = not process.any(features.is_incomplete(pictures, captions))
    release_encoders(setup)


def release_encoders(setup: Setup) -> None:
    """Let go of the encoders whose features are all cached."""
    stream, family = setup.stream, setup.family
    unneeded: list[str] = []
    endless = any(stream.crops.list_variants(entry) is None for entry in stream.entries)
    if stream.features.image_store is not None and not endless:
        unneeded += family.images.components
    if stream.features.text_store is not None:
        unneeded += [*family.text.components, *family.text.tokenizers]
    setup.engine.release_encoders(unneeded)


def list_requests(setup: Setup) -> tuple[list[str], list[ImageRequest]]:
    """All captions and pictures that can be cached and that the run will ask for."""
    stream, validation = setup.stream, setup.validation_entries
    captions: list[str] = []
    if setup.family.text.inputs:
        captions = stream.captions.list_variants((*stream.entries, *validation))
    pictures = [
        stream.crops.make_request(entry, crop)
        for entry in stream.entries
        for crop in stream.crops.list_variants(entry) or ()
    ]
    pictures += [
        stream.crops.make_request(entry, stream.crops.place_for_validation(entry))
        for entry in validation
    ]
    return captions, pictures


def report_truncated_captions(setup: Setup) -> None:
    """Name the captions, and the prompts of previews, that the text encoders will see cut."""
    encoders = setup.engine.get_encoders()
    entries = (*setup.stream.entries, *setup.validation_entries)
    pairs = [(entry.key, caption) for entry in entries for caption in entry.captions]
    for one in setup.family.text.inputs:
        limit = one.count_limit(encoders, setup.config.data.caption_chunks)
        long = find_truncated_captions(pairs, partial(one.count_tokens, encoders), limit)
        if long:
            named = ", ".join(f"{cut.key} ({cut.tokens})" for cut in long[:10])
            captions = say_count(len(long), "caption is", "captions are")
            setup.report(
                f"{captions} cut, with more than the {limit} tokens that the {one.tokenizer} gives "
                f"on: {named}"
            )
    report_cut_prompts(setup.family.text, encoders, setup.config.preview.prompts, setup.report)


def make_reported(text: str) -> LimnerError:
    """An error that another process reports."""
    error = LimnerError(text)
    error.reported = True
    return error
