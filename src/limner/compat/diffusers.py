"""The diffusers text-to-image scripts: their command lines in, a config out, and no flag ignored in
silence."""

import argparse
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limner.compat.flags import COMMON, SCRIPTS, TRACKERS, Flag, choose_trackers
from limner.config.rules import check_config
from limner.config.schema import Config
from limner.config.toml import build
from limner.errors import InputError, report_once


def make_parser(script: str) -> argparse.ArgumentParser:
    """What the namesake accepts: same flags, types, defaults and choices."""
    about = (
        f"Takes the flags of diffusers' {script}.py; each one says which setting of Limner "
        "it reaches."
    )
    out = argparse.ArgumentParser(prog=f"{script}.py", description=about)
    for name, flag in SCRIPTS[script].flags.items():
        forms: dict[type, dict[str, Any]] = {
            bool: {"action": "store_true"},
            list: {"type": str, "nargs": "+"},
        }
        written = forms.get(flag.kind, {"type": flag.kind, "choices": flag.choices})
        text = flag.says + (f" [{', '.join(flag.places.split())}]" if flag.places else "")
        out.add_argument(
            f"--{name}",
            default=flag.default,
            required=flag.required,
            help=text.replace("%", "%%"),
            **written,
        )
    return out


def to_config(script: str, a: Namespace) -> Config:
    """What the diffusers script would have done, as one of our recipes.

    Raises:
        InputError: for values that cannot be honoured, naming the flags.
    """
    if reasons := list_refusals(a):
        raise InputError("\n".join(reasons))
    raw: dict[str, Any] = {}
    for place, value in SCRIPTS[script].settings.items():
        put_setting(raw, place, value)
    for name, flag in SCRIPTS[script].flags.items():
        value = flag.value(a) if flag.value else getattr(a, name)
        for place in flag.places.split():
            if (here := value.get(place) if isinstance(value, dict) else value) is not None:
                put_setting(raw, place, here)
    try:
        config: Config = build(Config, raw)
        check_config(config)
    except InputError as fault:
        raise InputError(name_flags(script, str(fault))) from fault
    return config


def put_setting(raw: dict[str, Any], place: str, value: Any) -> None:
    """Set ``section.key`` in plain data."""
    *sections, key = place.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[key] = value


def name_flags(script: str, message: str) -> str:
    """The message with the flags behind each setting that it names: whoever runs a script has never
    seen the settings."""
    behind: dict[str, list[str]] = {}
    for name, flag in SCRIPTS[script].flags.items():
        for place in flag.places.split():
            behind.setdefault(place, []).append(f"--{name}")
    named = "|".join(re.escape(place) for place in behind if "." in place)
    return re.sub(
        rf"(?<![\w./-])({named})(?![\w=/-]|\.\w| \(--)",
        lambda m: f"{m[1]} ({', '.join(behind[m[1]])})",
        message,
    )


def list_refusals(a: Namespace) -> list[str]:
    """What was asked for and cannot be done, each with the reason."""
    predict = vars(a).get("prediction_type")
    secret_seen = vars(a).get("hub_token") is not None and a.report_to in (
        "wandb",
        "comet_ml",
        "all",
    )
    known = (*TRACKERS, "all", "none")
    cases = [
        (
            a.dataset_name is None and a.train_data_dir is None,
            "there is nothing to train on: give --dataset_name (Hub or local data set) or "
            "--train_data_dir (folder)",
        ),
        (
            a.report_to not in known,
            f"--report_to: {a.report_to!r} was given, one of {', '.join(known)} is expected",
        ),
        (
            secret_seen,
            f"--hub_token with --report_to={a.report_to}: trackers store the command line, token "
            "included. Run `hf auth login` or set HF_TOKEN instead.",
        ),
        (
            predict not in (None, "epsilon", "v_prediction"),
            f"--prediction_type: {predict!r} was given, epsilon or v_prediction is expected; "
            "leave it out to keep what the base's scheduler says",
        ),
        (
            a.lr_scheduler == "piecewise_constant",
            "--lr_scheduler: piecewise_constant needs step rules, and no flag gives them. "
            "Use constant, constant_with_warmup, linear, cosine, cosine_with_restarts or "
            "polynomial.",
        ),
    ]
    return [reason for wrong, reason in cases if wrong]


def list_remarks(script: str, a: Namespace) -> list[str]:
    """One line for each flag that was given and changes nothing, and for each default that gives
    way."""
    out = []
    for name, flag in SCRIPTS[script].flags.items():
        if getattr(a, name) != flag.default and not flag.places:
            out.append(f"--{name}: {flag.says}")
        elif (
            getattr(a, name) != flag.default
            and flag.needs
            and getattr(a, flag.needs) in (None, False, "none")
        ):
            out.append(f"--{name} does nothing without --{flag.needs}")
    if (
        a.max_train_steps is not None
        and a.num_train_epochs != SCRIPTS[script].flags["num_train_epochs"].default
    ):
        out.append("--num_train_epochs gives way to --max_train_steps")
    if a.lr_scheduler == "constant" and vars(a).get("lr_warmup_steps", 0) not in (
        0,
        COMMON["lr_warmup_steps"].default,
    ):
        out.append(
            "--lr_warmup_steps does nothing with --lr_scheduler=constant; constant_with_warmup "
            "has a warm-up"
        )
    if a.report_to == "tensorboard" and not choose_trackers(a):
        out.append(
            "--report_to=tensorboard: TensorBoard is not installed (pip install tensorboard); "
            "metrics go to metrics.jsonl only"
        )
    return out


def run_script(script: str, a: Namespace) -> None:
    """Train as the flags say.

    Raises:
        LimnerError: what training raises; settings that it names come with their flags.
    """
    with report_once():
        config = to_config(script, a)
    from limner.training.loop import print_line, run_training

    if os.environ.get("RANK", "0") == "0":
        for line in list_remarks(script, a):
            print_line(line)
    if a.hub_token:
        os.environ["HF_TOKEN"] = a.hub_token
    try:
        run_training(config, report=lambda line: print_line(name_flags(script, line)))
    except InputError as fault:
        fault.args = (name_flags(script, str(fault)),)
        raise


def main(script: str, argv: Sequence[str] | None = None) -> int:
    """One of the scripts: its name without ``.py``, and its command line. Returns the exit code."""
    a = make_parser(script).parse_args(argv)
    from limner.cli import run_guarded

    code: int = run_guarded(lambda: run_script(script, a))
    return code


def make_flag_table() -> str:
    """All flags of all scripts in Markdown, as docs/coming-from-diffusers.md shows them."""
    lines = ["| flag | default | setting | meaning |", "|---|---|---|---|"]
    rows: dict[str, dict[str, Flag]] = {}
    for script, known in SCRIPTS.items():
        for name, flag in known.flags.items():
            rows.setdefault(name, {})[script] = flag
    for name, flags in sorted(rows.items()):
        first = next(iter(flags.values()))
        shown: dict[str, list[str]] = {}
        for script, f in flags.items():
            text = (
                "required"
                if f.required
                else "off"
                if f.default is False
                else ""
                if f.default is None
                else f"`{f.default}`"
            )
            shown.setdefault(text, []).append(script)
        default = (
            next(iter(shown))
            if len(shown) == 1
            else ", ".join(
                f"{text or 'none'} ({name_scripts(scripts)})" for text, scripts in shown.items()
            )
        )
        choices = ": " + ", ".join(first.choices) if first.choices else ""
        only = "" if len(flags) == len(SCRIPTS) else f" (only in {name_scripts(list(flags))})"
        places = ", ".join(f"`{place}`" for place in first.places.split()) or "none"
        lines.append(f"| `--{name}` | {default} | {places} | {first.says}{choices}{only} |")
    return "\n".join(lines)


def name_scripts(scripts: list[str]) -> str:
    """Scripts by what follows ``train_text_to_image``."""
    return ", ".join(
        f"`{script.removeprefix('train_text_to_image') or '...image'}`" for script in scripts
    )


BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"


def refresh_page(page: str) -> str:
    """The page with the table between its markers made anew."""
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n{make_flag_table()}\n{END}{after}"


if __name__ == "__main__":  # python -m limner.compat.diffusers docs/coming-from-diffusers.md
    target = Path(sys.argv[1])
    target.write_text(refresh_page(target.read_text(encoding="utf-8")), encoding="utf-8")
