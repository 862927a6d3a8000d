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

from limner import base, bench, config, durable, encoding, engines, plan, training
from limner.data import index, sets
from limner.data.buckets import Shape
from limner.data.records import Source
from limner.data.stream import Stream
from limner.engine import World
from limner.families import family_of
from limner.family import Family, tokenize, told
from limner.faults import InputFault
from limner.features import row_bytes
from limner.generate import wrap
from limner.objective import Objective

ACROSS = 8  # pictures of a bucket on the contact sheet
NAMED = 5  # records that the table names; JSON has all


@dataclass
class Look:
    """What has been looked at."""

    cfg: config.Config
    family: Family
    opened: base.Base
    process: World
    source: Source
    found: index.Index
    stream: Stream
    numbers: plan.Plan


def run(
    cfg: config.Config,
    *,
    json_file: Path | None = None,
    sheet: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Look at everything once; prints a table and returns what the JSON file has.

    Raises:
        InputFault: after the table, when training would refuse this recipe; before it, for what
            keeps it from being made.
    """
    cfg.check()
    family = family_of(cfg)
    with contextlib.closing(engines.join(cfg.engine)) as process:
        seen = look(cfg, family, process)
        report: dict[str, Any] = {
            "pictures": pictures(seen),
            "buckets": bucket_rows(seen),
            "captions": captions(seen),
            "epoch": epoch(seen),
        }
        report |= {"cache": cache(seen), "problems": problems(seen)}
        if json_file is not None:
            durable.write_text(json_file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        if sheet is not None:
            draw(seen, sheet)
    tell(table(report, sheet))
    if report["problems"]:
        raise InputFault("training would be refused:\n" + "\n".join(report["problems"]))
    return report


def look(cfg: config.Config, family: Family, process: World) -> Look:
    """Read and decode every record, as ``train`` does; nothing that is bad stops it."""
    opened = base.open_base(cfg.model, family, draws=bool(cfg.preview.prompts))
    cfg = replace(
        cfg, data=replace(cfg.data, caption=cfg.data.caption if family.captions else None)
    )
    objective = Objective.of(opened.configs["scheduler"], cfg.objective)
    source = sets.open_source(cfg.data, lambda line: None)
    found = index.look(
        source,
        replace(cfg.data, bad="skip"),
        known=encoding.known_pictures(cfg),
        tell=lambda line: None,
    )
    seed = cfg.train.seed or 0
    used = found if cfg.data.limit is None else found.limited(cfg.data.limit, seed)
    learned = training.split_held_out(used.entries, cfg.watch.hold_out, seed)[0]
    order = partial(training.order_of, learned, source, cfg.data, seed)
    numbers = plan.make(cfg, process.world, len(learned), None, seed, order, process.devices)
    stream = Stream(
        learned,
        order(numbers.batch),
        source,
        cfg.data,
        cfg.objective,
        objective,
        family,
        opened.configs,
        None,  # type: ignore[arg-type]
        seed,
        numbers.batch,
    )
    return Look(cfg, family, opened, process, source, found, stream, numbers)


def pictures(seen: Look) -> dict[str, Any]:
    """How many, how large, which are bad, which are there twice."""
    entries = seen.found.entries
    same: dict[str, list[str]] = {}
    for entry in entries:
        same.setdefault(entry.digest, []).append(entry.key)
    sizes = sorted(entries, key=lambda entry: entry.height * entry.width)
    spread = {
        name: size(sizes[round(at * (len(sizes) - 1))].size)
        for name, at in (("smallest", 0), ("median", 0.5), ("largest", 1))
    }
    counts = Counter(sets.set_of(seen.source, entry.row) for entry in entries)
    return {
        "listed": len(seen.source),
        "good": len(entries),
        "bad": [{"key": key, "reason": reason} for key, reason in seen.found.skipped],
        "sizes": spread,
        "sets": [
            {"name": sets.place(one), "good": counts[i]} for i, one in enumerate(seen.cfg.data.sets)
        ],
        "same_content": [keys for keys in same.values() if len(keys) > 1],
        "look_alike": [[entry.key for entry in group] for group in seen.found.alike],
    }


def bucket_rows(seen: Look) -> list[dict[str, Any]]:
    """For each size that pictures are cut to: how many there are, and how an epoch's batches are
    filled."""
    batch = seen.numbers.batch
    return [
        {
            "size": size(shape),
            "pictures": count,
            "batches": batches,
            "empty_rows": empty,
            "below_a_batch": seen.cfg.data.buckets is not None and count < batch,
        }
        for shape, count, batches, empty in seen.stream.order.counts()
    ]


def captions(seen: Look) -> dict[str, Any]:
    """How many, how long in tokens, which are cut, empty or there several times."""
    pairs = list(seen.found.captions())
    times = Counter(text for _, text in pairs)
    parts = engines.open_engine(
        seen.cfg, seen.opened, seen.family, seen.process, seen.numbers.micro, lambda line: None
    ).parts()
    tokens = {}
    for tokenizer in seen.family.tokenizers:
        limit = seen.cfg.data.chunks * (parts.limit(tokenizer) - 2) + 2
        lengths = parts.lengths(tokenizer, list(times))
        cut = index.caption_report(pairs, partial(parts.lengths, tokenizer), limit)
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
        "empty": [e.key for e in seen.found.without_caption],
        "repeated": repeated,
        "tokens": tokens,
    }


def epoch(seen: Look) -> dict[str, Any]:
    """What an epoch and the run come to."""
    stream, numbers = seen.stream, seen.numbers
    endless = [e.key for e in stream.entries if stream.variants(e) is None]
    return {
        "batch": numbers.batch,
        "records": len(stream.entries),
        "held_out": seen.cfg.watch.hold_out,
        "examples": sum(stream.order.places),
        "of_sets": stream.order.places,
        "empty_rows": sum(row["empty_rows"] for row in bucket_rows(seen)),
        "steps": numbers.steps_per_epoch,
        "variants": sum(len(stream.variants(e) or ()) for e in stream.entries),
        "new_crops_each_time": len(endless),
        "run_steps": numbers.steps,
        "run_epochs": numbers.steps / numbers.steps_per_epoch,
    }


def cache(seen: Look) -> dict[str, Any]:
    """What encoded pictures and captions take on disk, from the shapes that the base's configs
    promise."""
    cfg, stream = seen.cfg, seen.stream
    shapes, bytes_each = (
        bench.Shapes(seen.opened.configs),
        2 if cfg.data.cache_dtype == "float16" else 4,
    )
    variants = Counter(g.shape for e in stream.entries for g in stream.variants(e) or ())
    per = {
        shape: row_bytes(bench.picture_features(seen.family, shapes, 1, shape)) * bytes_each // 4
        for shape in variants
    }
    told_of = (
        told(seen.family, shapes, tokenize(seen.family, shapes, [""], cfg.data.chunks))
        if seen.family.captions
        else {}
    )
    texts = (
        0
        if cfg.adapt.text_encoders or not seen.family.captions
        else len({c for e in stream.entries for c in e.captions}) + (cfg.data.drop_caption > 0)
    )
    place = str(encoding.cache_folder(cfg)) if cfg.data.cache not in ("off", "memory") else None
    amounts = {
        "pictures": sum(variants.values()),
        "picture_bytes": sum(per[s] * n for s, n in variants.items()),
    }
    return {
        "folder": place,
        **amounts,
        "captions": texts,
        "caption_bytes": texts * row_bytes(told_of) * bytes_each // 4,
    }


def problems(seen: Look) -> list[str]:
    """What training would refuse."""
    bad = seen.found.skipped
    return (
        [f'{len(bad)} bad records (mend them, or set data.bad="skip")']
        if bad and seen.cfg.data.bad == "refuse"
        else []
    )


def size(shape: Shape) -> str:
    """Width x height, as people write it."""
    return f"{shape[1]}x{shape[0]}"


def some(names: list[str]) -> str:
    return "".join(f"\n    {name}" for name in names[:NAMED]) + (
        f"\n    and {len(names) - NAMED} more" if len(names) > NAMED else ""
    )


def table(r: dict[str, Any], sheet: Path | None) -> str:
    """The report for a reader."""
    p, c, e, k = r["pictures"], r["captions"], r["epoch"], r["cache"]
    lines = [f"pictures    {p['listed']} listed, {p['good']} good, {len(p['bad'])} bad"]
    lines += [f"            {one['good']} of {one['name']}" for one in p["sets"]]
    lines[-1] += some([f"{one['key']}: {one['reason']}" for one in p["bad"]])
    lines.append(
        f"sizes       {p['sizes']['smallest']} to {p['sizes']['largest']}, median "
        f"{p['sizes']['median']} (by area)"
    )
    lines.append(
        f"same        {len(p['same_content'])} pictures are there several "
        f"times{some([' = '.join(keys) for keys in p['same_content']])}"
    )
    lines.append(
        f"alike       {len(p['look_alike'])} groups of pictures look "
        f"alike{some([' ~ '.join(keys[:4]) for keys in p['look_alike']])}"
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
        f"empty{some(c['empty'])}",
    ]
    if c["repeated"]:
        often = [str(one["times"]) + " times: " + one["caption"][:80] for one in c["repeated"]]
        lines.append(f"repeated    {len(often)} captions{some(often)}")
    for name, t in c["tokens"].items():
        cut = some([f"{one['key']}: {one['tokens']} tokens" for one in t["cut"]])
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


def draw(seen: Look, target: Path) -> None:
    """The contact sheet: for each bucket its first pictures as they are cut, with their
    captions."""
    tile, gap, font = 160, 12, ImageFont.load_default(12)
    rows = []
    for shape, count, *_ in seen.stream.order.counts():
        alike = [e for e in seen.stream.entries if seen.stream.watched(e).shape == shape][:ACROSS]
        scale = tile / max(shape)
        rows.append(
            (
                f"{size(shape)}: {count} picture{'s' * (count > 1)}",
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
            cut = Image.fromarray(seen.stream.picture(entry, seen.stream.watched(entry)).load()[0])
            sheet.paste(cut.resize(wh, Image.Resampling.LANCZOS), (gap + x * (tile + gap), y + 30))
            pen.multiline_text(
                (gap + x * (tile + gap), y + 34 + wh[1]),
                "\n".join(wrap(entry.captions[0], 26).splitlines()[:5]),
                fill="black",
                font=font,
            )
        y += wh[1] + 110
    with durable.disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target, format="PNG")
