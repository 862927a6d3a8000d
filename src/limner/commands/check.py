"""``limner check``: what a recipe and its data come to, before any GPU time is spent.

The run is prepared as ``train`` prepares it, so that what ``train`` would refuse is refused here;
nothing is written, and no weight is loaded.
"""

import contextlib
import json
import statistics
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from limner import engines
from limner.commands.check_report import (
    BadRecord,
    BucketReport,
    CacheReport,
    CaptionReport,
    CheckReport,
    DataSetCount,
    EpochReport,
    PictureReport,
    RepeatedCaption,
    TokenReport,
    format_report,
)
from limner.config.rules import check_config
from limner.config.schema import Config
from limner.data import mixture
from limner.data.buckets import Shape
from limner.data.contact_sheet import wrap_text
from limner.data.index import describe_bad_records
from limner.errors import InputError
from limner.families.text import TextInput, encode_captions, tokenize
from limner.features import caches
from limner.features.caption_lengths import find_truncated_captions
from limner.features.encoder import count_row_bytes
from limner.features.random_features import StandInEncoders, make_image_features
from limner.protocols import Features, Report
from limner.storage import atomic, outputs
from limner.training.encode import report_truncated_captions
from limner.training.resolve import check_places
from limner.training.setup import Setup, prepare
from limner.training.signals import Stop

ACROSS = 8  # pictures of a bucket on the contact sheet
TILE, GAP, BELOW = 160, 12, 110  # pixels: a picture's longer side, between two, for its caption


def run_check(
    config: Config,
    *,
    json_file: Path | None = None,
    sheet: Path | None = None,
    report: Report = print,
) -> CheckReport:
    """Look at everything once, say what training says of the data, print a table, and return what
    the JSON file has.

    Raises:
        InputError: after the table, when training would refuse this recipe's records; before it,
            for what keeps the table from being made.
    """
    outputs.check_output_file("--json", json_file)
    outputs.check_output_picture("--sheet", sheet)
    check_config(config)
    check_places(config)
    with contextlib.closing(engines.join_processes(config.engine, to_check=True)) as process:
        setup = prepare(config, None, process, report, Stop(), read_only=True)
        if engines.is_installed(config.engine.kind):
            report_truncated_captions(setup)
        findings = CheckReport(
            pictures=report_pictures(setup),
            buckets=report_buckets(setup),
            captions=report_captions(setup),
            epoch=report_epoch(setup),
            cache=report_cache(setup),
            problems=list_problems(setup),
        )
        if json_file is not None:
            text = json.dumps(asdict(findings), indent=1, ensure_ascii=False)
            # What UTF-8 cannot hold, of names in other encodings, is escaped as JSON does it.
            text = text.encode(errors="backslashreplace").decode()
            atomic.write_text(json_file, text + "\n")
        if sheet is not None:
            draw_sheet(setup, sheet)
    report(format_report(findings) + (f"\nsheet       {sheet}" if sheet else ""))
    if findings.problems:
        raise InputError("\n".join(findings.problems))
    return findings


def list_problems(setup: Setup) -> list[str]:
    """What training would refuse, of what does not keep the table from being made."""
    index = setup.index
    if index.skipped and setup.config.data.on_bad_record == "refuse":
        return [describe_bad_records(index.skipped, len(setup.source), bool(index.entries))]
    return []


def report_pictures(setup: Setup) -> PictureReport:
    """How many there are, how large, which are bad, which are there twice."""
    entries = setup.index.entries
    same: dict[str, list[str]] = {}
    for entry in entries:
        same.setdefault(entry.digest, []).append(entry.key)
    by_area = sorted(entries, key=lambda entry: entry.height * entry.width)
    quantiles = {"smallest": 0.0, "median": 0.5, "largest": 1.0}
    sizes = {
        name: format_size(by_area[round(quantile * (len(by_area) - 1))].size)
        for name, quantile in quantiles.items()
    }
    counts = Counter(mixture.set_of(setup.source, entry.row) for entry in entries)
    return PictureReport(
        listed=len(setup.source),
        good=len(entries),
        bad=[BadRecord(key, reason) for key, reason in setup.index.skipped],
        sizes=sizes,
        sets=[
            DataSetCount(mixture.describe_place(one), counts[i])
            for i, one in enumerate(setup.config.data.sets)
        ],
        same_content=[keys for keys in same.values() if len(keys) > 1],
        look_alike=[[entry.key for entry in group] for group in setup.index.near_duplicates],
    )


def report_buckets(setup: Setup) -> list[BucketReport]:
    """Each size that pictures are cut to, and how an epoch's batches of it are filled."""
    with_buckets, batch_size = setup.config.data.buckets is not None, setup.plan.batch_size
    return [
        BucketReport(
            size=format_size(shape),
            pictures=count,
            batches=batches,
            empty_rows=empty_rows,
            below_a_batch=with_buckets and count < batch_size,
        )
        for shape, count, batches, empty_rows in setup.stream.order.count_batches()
    ]


def report_captions(setup: Setup) -> CaptionReport:
    """How many there are, how long in tokens, which are cut, empty or there several times."""
    pairs = list(setup.index.captions())
    times = Counter(text for _, text in pairs)
    return CaptionReport(
        all=len(pairs),
        distinct=len(times),
        empty=[entry.key for entry in setup.index.without_caption],
        repeated=[RepeatedCaption(text, count) for text, count in times.most_common() if count > 1],
        tokens={
            one.tokenizer: report_tokens(setup, one, pairs)
            for one in setup.family.text.inputs
            if engines.is_installed(setup.config.engine.kind)
        },
    )


def report_tokens(setup: Setup, one: TextInput, pairs: list[tuple[str, str]]) -> TokenReport:
    """Lengths of (key, caption) under one tokenizer, and what its text encoder sees cut."""
    encoders = setup.engine.get_encoders()
    limit = one.count_limit(encoders, setup.config.data.caption_chunks)
    lengths = one.count_tokens(encoders, list(dict.fromkeys(text for _, text in pairs)))
    cut = find_truncated_captions(pairs, partial(one.count_tokens, encoders), limit)
    return TokenReport(
        limit=limit,
        shortest=min(lengths),
        median=statistics.median_low(lengths),
        longest=max(lengths),
        cut=cut,
    )


def report_epoch(setup: Setup) -> EpochReport:
    """What an epoch and the run come to."""
    stream, plan = setup.stream, setup.plan
    variants = [stream.crops.list_variants(entry) for entry in stream.entries]
    return EpochReport(
        batch=plan.batch_size,
        records=len(stream.entries),
        held_out=len(setup.validation_entries),
        examples=sum(stream.order.examples_per_set),
        of_sets=stream.order.examples_per_set,
        empty_rows=sum(row.empty_rows for row in report_buckets(setup)),
        steps=plan.steps_per_epoch,
        variants=sum(len(crops or ()) for crops in variants),
        new_crops_each_time=sum(crops is None for crops in variants),
        run_steps=plan.steps,
        run_epochs=plan.steps / plan.steps_per_epoch,
    )


def report_cache(setup: Setup) -> CacheReport:
    """What encoded pictures and captions take on disk, from the shapes that the base's configs
    promise."""
    config, stream, family = setup.config, setup.stream, setup.family
    encoders = StandInEncoders(setup.base.configs)

    def count_bytes(features: Features) -> int:
        """Bytes of a row as it is stored; the stand-in makes float32."""
        return count_row_bytes(features) // (2 if config.data.cache_dtype == "float16" else 1)

    counts = Counter(
        crop.shape for entry in stream.entries for crop in stream.crops.list_variants(entry) or ()
    )
    picture_bytes = sum(
        count * count_bytes(make_image_features(family, encoders, 1, shape))
        for shape, count in counts.items()
    )
    captions, caption_bytes = 0, 0
    if family.text.components and not config.adapter.text_encoders:
        distinct = {caption for entry in stream.entries for caption in entry.captions}
        captions = len(distinct) + (config.data.drop_caption > 0)
        ids = tokenize(family.text, encoders, [""], config.data.caption_chunks)
        caption_bytes = captions * count_bytes(encode_captions(family.text, encoders, ids))
    kept = config.data.cache not in ("off", "memory")
    return CacheReport(
        folder=str(caches.cache_folder(config)) if kept else None,
        pictures=sum(counts.values()),
        picture_bytes=picture_bytes,
        captions=captions,
        caption_bytes=caption_bytes,
    )


def format_size(shape: Shape) -> str:
    """Width x height, as people write it."""
    return f"{shape[1]}x{shape[0]}"


def draw_sheet(setup: Setup, target: Path) -> None:
    """Draw the first pictures of each bucket as they are cut, with their captions."""
    stream, crops = setup.stream, setup.stream.crops
    rows = list(stream.order.count_batches())
    tiles = [fit_tile(shape) for shape, *_ in rows]
    height = sum(tile[1] + BELOW for tile in tiles)
    sheet = Image.new("RGB", (GAP + ACROSS * (TILE + GAP), height), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (shape, count, *_), tile in zip(rows, tiles, strict=True):
        head = f"{format_size(shape)}: {count} picture{'s' if count > 1 else ''}"
        pen.text((GAP, top + 8), head, fill="black", font=ImageFont.load_default(15))
        alike = [e for e in stream.entries if crops.place_for_validation(e).shape == shape]
        for column, entry in enumerate(alike[:ACROSS]):
            left = GAP + column * (TILE + GAP)
            pixels = crops.make_request(entry, crops.place_for_validation(entry)).load()[0]
            picture = Image.fromarray(pixels).resize(tile, Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + 30))
            caption = "\n".join(wrap_text(entry.captions[0], 26).splitlines()[:5])
            font = ImageFont.load_default(12)
            pen.multiline_text((left, top + 34 + tile[1]), caption, fill="black", font=font)
        top += tile[1] + BELOW
    with atomic.disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target)


def fit_tile(shape: Shape) -> tuple[int, int]:
    """Width and height of a picture of ``shape`` (height, width) on the sheet."""
    scale = TILE / max(shape)
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))
