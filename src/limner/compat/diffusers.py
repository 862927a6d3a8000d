"""Run the diffusers text-to-image scripts: their command lines become configs of Limner."""

import argparse
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from limner.compat.common_flags import COMMON_FLAGS
from limner.compat.flag import TRACKERS, Flag, choose_trackers
from limner.compat.scripts import SCRIPTS
from limner.config.rules import check_config, list_idle_settings
from limner.config.schema import Config
from limner.config.toml import build, to_plain
from limner.errors import InputError, report_once
from limner.guard import run_guarded
from limner.json_types import Plain
from limner.progress import print_line
from limner.redaction import redacted_output

BEGIN = "<!-- flags: begin -->"
END = "<!-- flags: end -->"


def main(script: str, argv: Sequence[str] | None = None) -> int:
    """Run a script on its command line, and return the exit code.

    Args:
        script: the name of the diffusers script, without ``.py``.
    """
    with redacted_output():
        arguments = make_parser(script).parse_args(argv)
    return run_guarded(lambda: run_script(script, arguments))


def make_parser(script: str) -> argparse.ArgumentParser:
    """Return a parser with the flags, types, defaults and choices of the diffusers script."""
    description = (
        f"Takes the flags of diffusers' {script}.py; each one says which setting of Limner "
        "it reaches."
    )
    parser = argparse.ArgumentParser(prog=f"{script}.py", description=description)
    for name, flag in SCRIPTS[script].flags.items():
        text = flag.help
        if flag.settings:
            text += f" [{', '.join(flag.setting_names)}]"
        parser.add_argument(
            f"--{name}",
            default=flag.default,
            required=flag.required,
            help=text.replace("%", "%%"),
            **describe_value(flag),
        )
    return parser


def describe_value(flag: Flag) -> Plain:
    """Return what argparse needs to read a flag's value."""
    if flag.kind is bool:
        return {"action": "store_true"}
    if flag.kind is list:
        return {"type": str, "nargs": "+"}
    return {"type": flag.kind, "choices": flag.choices}


def run_script(script: str, arguments: Namespace) -> None:
    """Train as the flags say.

    Raises:
        LimnerError: what training raises; settings in its message come with their flags.
    """
    with report_once():
        config = to_config(script, arguments)
    from limner.training.signals import Stop

    # A signal may come while what follows is imported.
    with Stop(ends_process=True):
        train_as_asked(script, arguments, config)


def train_as_asked(script: str, arguments: Namespace, config: Config) -> None:
    """Say what the flags do not do, and train; see ``run_script``."""
    # Bad flags need not wait for this import.
    from limner.training.loop import run_training

    if os.environ.get("RANK", "0") == "0":
        for line in list_remarks(script, arguments):
            print_line(line)
    if arguments.hub_token:
        os.environ["HF_TOKEN"] = arguments.hub_token
    try:
        config = drop_idle_settings(config)
        run_training(config, report=lambda line: print_line(name_flags(script, line)))
    except InputError as error:
        error.args = (name_flags(script, str(error)),)
        raise


def to_config(script: str, arguments: Namespace) -> Config:
    """Return the config of a run that does what the diffusers script would do.

    Raises:
        InputError: for values that no setting can express, with the names of their flags.
    """
    refusals = list_refusals(arguments)
    if refusals:
        raise InputError("\n".join(refusals))
    settings: Plain = {}
    for name, value in SCRIPTS[script].fixed_settings.items():
        put_setting(settings, name, value)
    for name, flag in SCRIPTS[script].flags.items():
        value = flag.value(arguments) if flag.value else getattr(arguments, name)
        for setting in flag.setting_names:
            setting_value = value.get(setting) if isinstance(value, dict) else value
            if setting_value is not None:
                put_setting(settings, setting, setting_value)
    try:
        config: Config = build(Config, settings)
        check_config(drop_idle_settings(config))
    except InputError as error:
        raise InputError(name_flags(script, str(error))) from error
    return config


def drop_idle_settings(config: Config) -> Config:
    """Return a config without the settings that do nothing in it: the scripts have defaults for
    them, and pass over them in silence. Flags among them are among the remarks."""
    settings = to_plain(config)
    for one in list_idle_settings(config):
        put_setting(settings, one.place, one.default)
    dropped: Config = build(Config, settings)
    return dropped


def put_setting(settings: Plain, name: str, value: object) -> None:
    """Set ``section.key`` in nested dictionaries."""
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[key] = value


def name_flags(script: str, message: str) -> str:
    """Return the message with the flags of each setting in it: users know the flags only."""
    flags: dict[str, list[str]] = {}
    for name, flag in SCRIPTS[script].flags.items():
        for setting in flag.setting_names:
            flags.setdefault(setting, []).append(f"--{name}")
    settings = "|".join(re.escape(setting) for setting in flags if "." in setting)
    # Whole names only: no part of a path or of a longer name, no override "section.key=value", and
    # none that has its flags already.
    return re.sub(
        rf"(?<![\w./-])({settings})(?![\w=/-]|\.\w| \(--)",
        lambda match: f"{match[1]} ({', '.join(flags[match[1]])})",
        message,
    )


def list_refusals(arguments: Namespace) -> list[str]:
    """Return what was asked for and cannot be done, each with the reason."""
    prediction_type = vars(arguments).get("prediction_type")
    report_to = arguments.report_to
    token = vars(arguments).get("hub_token")
    destinations = (*TRACKERS, "all", "none")
    reasons = []
    if arguments.dataset_name is None and arguments.train_data_dir is None:
        reasons.append(
            "there is nothing to train on: give --dataset_name (Hub or local data set) or "
            "--train_data_dir (folder)"
        )
    if arguments.dataset_name is None and arguments.image_column != "image":
        reasons.append(
            f"--image_column: {arguments.image_column!r} was given, but the pictures of a folder "
            "(--train_data_dir) are the column image. Leave it out, or give --dataset_name"
        )
    if report_to not in destinations:
        reasons.append(
            f"--report_to: {report_to!r} was given, one of {', '.join(destinations)} is expected"
        )
    if token is not None and report_to in ("wandb", "comet_ml", "all"):
        reasons.append(
            f"--hub_token with --report_to={report_to}: trackers store the command line, token "
            "included. Run `hf auth login` or set HF_TOKEN instead."
        )
    if prediction_type not in (None, "epsilon", "v_prediction"):
        reasons.append(
            f"--prediction_type: {prediction_type!r} was given, epsilon or v_prediction is "
            "expected; leave it out to keep what the base's scheduler says"
        )
    if arguments.lr_scheduler == "piecewise_constant":
        reasons.append(
            "--lr_scheduler: piecewise_constant needs step rules, and no flag gives them. "
            "Use constant, constant_with_warmup, linear, cosine, cosine_with_restarts or "
            "polynomial."
        )
    return reasons


def list_remarks(script: str, arguments: Namespace) -> list[str]:
    """Return a line for each flag that changes nothing, and for each default that gives way."""
    flags = SCRIPTS[script].flags
    given = {name: flag for name, flag in flags.items() if getattr(arguments, name) != flag.default}
    remarks = []
    for name, flag in given.items():
        if not flag.settings:
            remarks.append(f"--{name}: {flag.help}")
        elif flag.needs and getattr(arguments, flag.needs) in (None, False, "none"):
            remarks.append(f"--{name} does nothing without --{flag.needs}")
    if arguments.max_train_steps is not None and "num_train_epochs" in given:
        remarks.append("--num_train_epochs gives way to --max_train_steps")
    # A script's default warm-up is no choice of the user's.
    warmup = vars(arguments).get("lr_warmup_steps", 0)
    default_warmup = COMMON_FLAGS["lr_warmup_steps"].default
    if arguments.lr_scheduler == "constant" and warmup not in (0, default_warmup):
        remarks.append(
            "--lr_warmup_steps does nothing with --lr_scheduler=constant; constant_with_warmup "
            "has a warm-up"
        )
    if arguments.report_to == "tensorboard" and not choose_trackers(arguments):
        remarks.append(
            "--report_to=tensorboard: TensorBoard is not installed (pip install tensorboard); "
            "metrics go to metrics.jsonl only"
        )
    return remarks


def make_flag_table() -> str:
    """Return the table of all flags of all scripts, in Markdown."""
    lines = ["| flag | default | setting | meaning |", "|---|---|---|---|"]
    names = {name for script in SCRIPTS.values() for name in script.flags}
    for name in sorted(names):
        flags = {key: one.flags[name] for key, one in SCRIPTS.items() if name in one.flags}
        # Scripts differ in a flag's default; setting and meaning are those of the first script.
        first = next(iter(flags.values()))
        settings = ", ".join(f"`{setting}`" for setting in first.setting_names) or "none"
        meaning = first.help
        if first.choices:
            meaning += f": {', '.join(first.choices)}"
        if len(flags) < len(SCRIPTS):
            meaning += f" (only in {shorten_script_names(flags)})"
        lines.append(f"| `--{name}` | {format_defaults(flags)} | {settings} | {meaning} |")
    return "\n".join(lines)


def format_defaults(flags: dict[str, Flag]) -> str:
    """Return the default of a flag, or each one with the scripts that have it."""
    scripts: dict[str, list[str]] = {}
    for script, flag in flags.items():
        scripts.setdefault(format_default(flag), []).append(script)
    if len(scripts) == 1:
        return next(iter(scripts))
    return ", ".join(
        f"{text or 'none'} ({shorten_script_names(names)})" for text, names in scripts.items()
    )


def format_default(flag: Flag) -> str:
    """Return the default of one script's flag as the table shows it."""
    if flag.required:
        return "required"
    if flag.default is False:
        return "off"
    return "" if flag.default is None else f"`{flag.default}`"


def shorten_script_names(scripts: Iterable[str]) -> str:
    """Return the scripts by what follows ``train_text_to_image``."""
    return ", ".join(
        f"`{script.removeprefix('train_text_to_image') or '...image'}`" for script in scripts
    )


def refresh_page(page: str) -> str:
    """Return the page with a new table of flags between its markers."""
    before = page.split(BEGIN)[0]
    after = page.split(END)[1]
    return f"{before}{BEGIN}\n{make_flag_table()}\n{END}{after}"


if __name__ == "__main__":
    # python -m limner.compat.diffusers docs/coming-from-diffusers.md
    target = Path(sys.argv[1])
    target.write_text(refresh_page(target.read_text(encoding="utf-8")), encoding="utf-8")
