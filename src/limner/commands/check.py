"""What a recipe and its data come to before any GPU time is spent: pictures, buckets, captions,
steps, cache; no weight is loaded."""

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from limner import engines
from limner.base_model.base import BaseModel
from limner.base_model.open import open_base
from limner.config import rules
from limner.config.schema import Config
from limner.data import index, mixture
from limner.data.buckets import Shape
from limner.data.contact_sheet import wrap_text
from limner.data.index import Index
from limner.data.source import Source
from limner.diffusion.objective import Objective
from limner.errors import InputError
from limner.families import get_family
from limner.families.family import Family
from limner.families.text import encode_captions, tokenize
from limner.features import caches, stand_in
from limner.features.encoder import count_row_bytes
from limner.features.stand_in import StandInEncoders
from limner.protocols import ProcessGroup
from limner.storage import atomic
from limner.training import batch_plan, setup
from limner.training.batch_plan import BatchPlan
from limner.training.stream import Stream

ACROSS = 8  # pictures of a bucket on the contact sheet
NAMED = 5  # records that the table names; JSON has all


@dataclass
class Inspection:
    """What has been looked at."""

    config: Config
    family: Family
    base: BaseModel
    process: ProcessGroup
    source: Source
    index: Index
    stream: Stream
    plan: BatchPlan


def run_check(
    config: Config,
    *,
    json_file: Path | None = None,
    sheet: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Look at everything once; prints a table and returns what the JSON file has.

    Raises:
        InputError: after the table, when training would refuse this recipe; before it, for what
            keeps it from being made.
    """
    rules.check_config(config)
    family = get_family(config)
    with contextlib.closing(engines.join_processes(config.engine)) as process:
        seen = inspect(config, family, process)
        findings: dict[str, Any] = {
            "pictures": report_pictures(seen),
            "buckets": report_buckets(seen),
            "captions": report_captions(seen),
            "epoch": report_epoch(seen),
        }
        findings |= {"cache": report_cache(seen), "problems": list_problems(seen)}
        if json_file is not None:
            atomic.write_text(json_file, json.dumps(findings, indent=1, ensure_ascii=False) + "\n")
        if sheet is not None:
            draw_sheet(seen, sheet)
    report(format_table(findings, sheet))
    if findings["problems"]:
        raise InputError("training would be refused:\n" + "\n".join(findings["problems"]))
    return findings


def inspect(config: Config, family: Family, process: ProcessGroup) -> Inspection:
    """Read and decode every record, as ``train`` does; nothing that is bad stops it."""
    opened = open_base(config.model, family, draws=bool(config.preview.prompts))
    config = replace(
        config,
        data=replace(config.data, caption=config.data.caption if family.text_components else None),
    )
    objective = Objective.from_scheduler(opened.configs["scheduler"], config.objective)
    source = mixture.open_source(config.data, lambda line: None)
    found = index.build_index(
        source,
        replace(config.data, on_bad_record="skip"),
        known=caches.known_pictures_file(config),
        report=lambda line: None,
    )
    seed = config.train.seed or 0
    used = found if config.data.max_records is None else found.sample(config.data.max_records, seed)
    learned = setup.split_validation(used.entries, config.validation.hold_out, seed)[0]
    order = partial(setup.make_order, learned, source, config.data, seed)
    numbers = batch_plan.make_plan(
        config, process.world_size, len(learned), None, seed, order, process.device_count
    )
    stream = Stream(
        learned,
        order(numbers.batch_size),
        source,
        config.data,
        config.objective,
        objective,
        family,
        opened.configs,
        None,  # type: ignore[arg-type]
        seed,
        numbers.batch_size,
    )
    return Inspection(config, family, opened, process, source, found, stream, numbers)


def report_pictures(seen: Inspection) -> dict[str, Any]:
    """How many, how large, which are bad, which are there twice."""
    entries = seen.index.entries
    same: dict[str, list[str]] = {}
    for entry in entries:
        same.setdefault(entry.digest, []).append(entry.key)
    sizes = sorted(entries, key=lambda entry: entry.height * entry.width)
    spread = {
        name: format_size(sizes[round(at * (len(sizes) - 1))].size)
        for name, at in (("smallest", 0), ("median", 0.5), ("largest", 1))
    }
    counts = Counter(mixture.set_of(seen.source, entry.row) for entry in entries)
    return {
        "listed": len(seen.source),
        "good": len(entries),
        "bad": [{"key": key, "reason": reason} for key, reason in seen.index.skipped],
        "sizes": spread,
        "sets": [
            {"name": mixture.describe_place(one), "good": counts[i]}
            for i, one in enumerate(seen.config.data.sets)
        ],
        "same_content": [keys for keys in same.values() if len(keys) > 1],
        "look_alike": [[entry.key for entry in group] for group in seen.index.near_duplicates],
    }


def report_buckets(seen: Inspection) -> list[dict[str, Any]]:
    """For each size that pictures are cut to: how many there are, and how an epoch's batches are
    filled."""
    batch = seen.plan.batch_size
    return [
        {
            "size": format_size(shape),
            "pictures": count,
            "batches": batches,
            "empty_rows": empty,
            "below_a_batch": seen.config.data.buckets is not None and count < batch,
        }
        for shape, count, batches, empty in seen.stream.order.count_batches()
    ]


def report_captions(seen: Inspection) -> dict[str, Any]:
    """How many, how long in tokens, which are cut, empty or there several times."""
    pairs = list(seen.index.captions())
    times = Counter(text for _, text in pairs)
    parts = engines.open_engine(
        seen.config,
        seen.base,
        seen.family,
        seen.process,
        seen.plan.micro_batch_size,
        lambda line: None,
    ).get_encoders()
    tokens = {}
    for tokenizer in seen.family.tokenizers:
        limit = seen.config.data.caption_chunks * (parts.max_tokens(tokenizer) - 2) + 2
        lengths = parts.count_tokens(tokenizer, list(times))
        cut = index.caption_report(pairs, partial(parts.count_tokens, tokenizer), limit)
        spread = {
            "shortest": min(lengths),
            "median": statistics.median_low(lengths),
            "longest": max(lengths),
        }
        tokens[tokenizer] = {
            "limit": limit,
            **spread,
            "cut": [{"key": one.key, "tokens": one.tokens, "caption": one.caption} for one in cut],
        }
    repeated = [
        {"caption": text, "times": count} for text, count in times.most_common() if count > 1
    ]
    return {
        "all": len(pairs),
        "distinct": len(times),
        "empty": [e.key for e in seen.index.without_caption],
        "repeated": repeated,
        "tokens": tokens,
    }


def report_epoch(seen: Inspection) -> dict[str, Any]:
    """What an epoch and the run come to."""
    stream, numbers = seen.stream, seen.plan
    endless = [e.key for e in stream.entries if stream.variants(e) is None]
    return {
        "batch": numbers.batch_size,
        "records": len(stream.entries),
        "held_out": seen.config.validation.hold_out,
        "examples": sum(stream.order.places),
        "of_sets": stream.order.places,
        "empty_rows": sum(row["empty_rows"] for row in report_buckets(seen)),
        "steps": numbers.steps_per_epoch,
        "variants": sum(len(stream.variants(e) or ()) for e in stream.entries),
        "new_crops_each_time": len(endless),
        "run_steps": numbers.steps,
        "run_epochs": numbers.steps / numbers.steps_per_epoch,
    }


def report_cache(seen: Inspection) -> dict[str, Any]:
    """What encoded pictures and captions take on disk, from the shapes that the base's configs
    promise."""
    config, stream = seen.config, seen.stream
    shapes, bytes_each = (
        StandInEncoders(seen.base.configs),
        2 if config.data.cache_dtype == "float16" else 4,
    )
    variants = Counter(g.shape for e in stream.entries for g in stream.variants(e) or ())
    per = {
        shape: count_row_bytes(stand_in.make_image_features(seen.family, shapes, 1, shape))
        * bytes_each
        // 4
        for shape in variants
    }
    told_of = (
        encode_captions(
            seen.family, shapes, tokenize(seen.family, shapes, [""], config.data.caption_chunks)
        )
        if seen.family.text_components
        else {}
    )
    texts = (
        0
        if config.adapter.text_encoders or not seen.family.text_components
        else len({c for e in stream.entries for c in e.captions}) + (config.data.drop_caption > 0)
    )
    place = str(caches.cache_folder(config)) if config.data.cache not in ("off", "memory") else None
    amounts = {
        "pictures": sum(variants.values()),
        "picture_bytes": sum(per[s] * n for s, n in variants.items()),
    }
    return {
        "folder": place,
        **amounts,
        "captions": texts,
        "caption_bytes": texts * count_row_bytes(told_of) * bytes_each // 4,
    }


def list_problems(seen: Inspection) -> list[str]:
    """What training would refuse."""
    bad = seen.index.skipped
    return (
        [f'{len(bad)} bad records (mend them, or set data.on_bad_record="skip")']
        if bad and seen.config.data.on_bad_record == "refuse"
        else []
    )


def format_size(shape: Shape) -> str:
    """Width x height, as people write it."""
    return f"{shape[1]}x{shape[0]}"


def first_few(names: list[str]) -> str:
    return "".join(f"\n    {name}" for name in names[:NAMED]) + (
        f"\n    and {len(names) - NAMED} more" if len(names) > NAMED else ""
    )


def format_table(r: dict[str, Any], sheet: Path | None) -> str:
    """The report for a reader."""
    p, c, e, k = r["pictures"], r["captions"], r["epoch"], r["cache"]
    lines = [f"pictures    {p['listed']} listed, {p['good']} good, {len(p['bad'])} bad"]
    lines += [f"            {one['good']} of {one['name']}" for one in p["sets"]]
    lines[-1] += first_few([f"{one['key']}: {one['reason']}" for one in p["bad"]])
    lines.append(
        f"sizes       {p['sizes']['smallest']} to {p['sizes']['largest']}, median "
        f"{p['sizes']['median']} (by area)"
    )
    lines.append(
        f"same        {len(p['same_content'])} pictures are there several "
        f"times{first_few([' = '.join(keys) for keys in p['same_content']])}"
    )
    lines.append(
        f"alike       {len(p['look_alike'])} groups of pictures look "
        f"alike{first_few([' ~ '.join(keys[:4]) for keys in p['look_alike']])}"
    )
    lines += ["", f"{'bucket':<12}{'pictures':>10}{'batches':>10}{'empty rows':>12}   in an epoch"]
    for row in r["buckets"]:
        lines.append(
            f"{row['size']:<12}{row['pictures']:>10}{row['batches']:>10}{row['empty_rows']:>12}"
            f"{'   fewer than a batch' * row['below_a_batch']}"
        )
    lines += [
        "",
        f"captions    {c['all']}, {c['distinct']} of them distinct; {len(c['empty'])} "
        f"empty{first_few(c['empty'])}",
    ]
    if c["repeated"]:
        often = [str(one["times"]) + " times: " + one["caption"][:80] for one in c["repeated"]]
        lines.append(f"repeated    {len(often)} captions{first_few(often)}")
    for name, t in c["tokens"].items():
        cut = first_few([f"{one['key']}: {one['tokens']} tokens" for one in t["cut"]])
        lines.append(
            f"{name:<12}{t['shortest']} to {t['longest']} tokens, median {t['median']}; "
            f"{len(t['cut'])} have more than {t['limit']} and are cut{cut}"
        )
    again = (
        f", {e['new_crops_each_time']} pictures cut anew each time"
        if e["new_crops_each_time"]
        else ""
    )
    lines += [
        "",
        f"epoch       {e['examples']} examples of {e['records']} records ({e['held_out']} held "
        f"out), {e['variants']} variants{again}",
    ]
    lines.append(
        f"            {e['steps']:g} steps of {e['batch']}, {e['empty_rows']} rows empty; the "
        f"run: {e['run_steps']} steps, {e['run_epochs']:.2f} epochs"
    )
    amount = (k["picture_bytes"] + k["caption_bytes"]) / 2**20
    lines.append(
        f"cache       {amount:.1f} MiB for {k['pictures']} pictures and {k['captions']} captions, "
        f"in {k['folder'] or 'no folder'}"
    )
    return "\n".join([*lines, *([f"sheet       {sheet}"] if sheet else [])])


def draw_sheet(seen: Inspection, target: Path) -> None:
    """The contact sheet: for each bucket its first pictures as they are cut, with their
    captions."""
    tile, gap, font = 160, 12, ImageFont.load_default(12)
    rows = []
    for shape, count, *_ in seen.stream.order.count_batches():
        alike = [e for e in seen.stream.entries if seen.stream.validation_crop(e).shape == shape][
            :ACROSS
        ]
        scale = tile / max(shape)
        rows.append(
            (
                f"{format_size(shape)}: {count} picture{'s' * (count > 1)}",
                alike,
                (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))),
            )
        )
    height = sum(wh[1] + 110 for _, _, wh in rows)
    sheet = Image.new("RGB", (gap + ACROSS * (tile + gap), height), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for head, alike, wh in rows:
        pen.text((gap, y + 8), head, fill="black", font=ImageFont.load_default(15))
        for x, entry in enumerate(alike):
            cut = Image.fromarray(
                seen.stream.image_request(entry, seen.stream.validation_crop(entry)).load()[0]
            )
            sheet.paste(cut.resize(wh, Image.Resampling.LANCZOS), (gap + x * (tile + gap), y + 30))
            pen.multiline_text(
                (gap + x * (tile + gap), y + 34 + wh[1]),
                "\n".join(wrap_text(entry.captions[0], 26).splitlines()[:5]),
                fill="black",
                font=font,
            )
        y += wh[1] + 110
    with atomic.disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target, format="PNG")
