"""The ``limner`` command: one verb each, errors as one message, an exit code for each kind of
end."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limner.errors import InputError, LimnerError, report_once

TORCH_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
)  # what pip installs with limner[torch]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code (see ``limner.errors``)."""
    parser = argparse.ArgumentParser(
        prog="limner", description="Fine-tune text-to-image diffusion models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    recipe = "settings as section.key=value, in TOML"
    about = {
        "train": "train, or go on training",
        "encode": "encode pictures and captions ahead of time; training then loads no encoder",
        "check": "look at every picture and caption and tell what training would make of them",
        "show": "print the resolved settings and batch arithmetic, and load nothing",
    }
    for name, text in about.items():
        verb = verbs.add_parser(name, help=text)
        if name == "check":
            verb.add_argument("--json", type=to_path, help="write the report to this file too")
            verb.add_argument(
                "--sheet",
                type=to_path,
                help="draw a contact sheet of each bucket's pictures, as they are cut, into "
                "this PNG",
            )
        verb.add_argument(
            "recipe", type=to_path, help="a TOML file, such as recipes/sd15-lora.toml"
        )
        several = "further recipes, trained one after the other, and " if name == "train" else ""
        verb.add_argument("words", metavar="overrides", nargs="*", help=several + recipe)
    add_generate_arguments(
        verbs.add_parser(
            "generate", help="make pictures with a run, a model folder or a Hub repository"
        )
    )
    verb = verbs.add_parser(
        "export", help="write the result of a run's newest checkpoint again, or push it to the Hub"
    )
    verb.add_argument("run", type=to_path)
    verb.add_argument("--push", metavar="REPOSITORY", help="Hub repository to push the result to")
    verb.add_argument(
        "--combined",
        metavar="FOLDER",
        type=to_path,
        help="of a model in two stages: write both into this folder, for stock pipelines",
    )
    verb.add_argument(
        "--other-stage",
        default=None,
        help="for --combined: the other stage, a run, a folder or a Hub repository (default: "
        "the run's own)",
    )
    verb.add_argument("--private", action="store_true", help="where --push makes that repository")
    verb = verbs.add_parser(
        "demo", help="fine-tune the bundled model on the bundled pictures, on the CPU, in minutes"
    )
    verb.add_argument(
        "--engine",
        choices=["torch", "jax"],
        default="torch",
        help="what trains and draws (default: %(default)s)",
    )
    verb.add_argument(
        "--folder",
        type=to_path,
        help="receives the run (default: runs/demo-, then a digest of what is bundled)",
    )
    verb.add_argument(
        "--output",
        type=to_path,
        default=Path("before-after.png"),
        help="the picture at the end (default: %(default)s)",
    )
    verb = verbs.add_parser("bench", help="step time, images/s, peak memory and MFU of a recipe")
    verb.add_argument("recipe", type=to_path)
    verb.add_argument("words", metavar="overrides", nargs="*", help=recipe)
    verb.add_argument("--steps", type=int, default=10, help="measured steps (default: %(default)s)")
    verb.add_argument("--json", type=to_path, help="write the figures to this file too")
    arguments, more = parser.parse_known_args(argv)
    if more and ("words" not in arguments or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # words that follow an option
        arguments.words += more
    return run_guarded(lambda: COMMANDS[arguments.verb](arguments))


def to_path(text: str) -> Path:
    """A path as a user writes it."""
    return Path(text).expanduser()


def add_generate_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", help="a run's folder, a folder in the diffusers layout, or a Hub repository"
    )
    verb.add_argument("words", metavar="prompts", nargs="*", help="what to draw")
    verb.add_argument("--prompt-file", type=to_path, help="a text file with one prompt per line")
    verb.add_argument("--negative-prompt", default=None)
    verb.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture of each prompt; the next ones count up (default: %(default)s)",
    )
    verb.add_argument(
        "--count", type=int, default=1, help="pictures per prompt (default: %(default)s)"
    )
    verb.add_argument("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    verb.add_argument(
        "--guidance-scale", type=float, default=None, help="default: the pipeline's own"
    )
    verb.add_argument(
        "--scheduler",
        default=None,
        help="ddim, ddpm, dpm++, euler, euler-a, heun, pndm or unipc (default: the model's own)",
    )
    verb.add_argument(
        "--size", type=int, default=None, help="pixels a side (default: the model's own)"
    )
    verb.add_argument("--batch-size", type=int, default=4)
    verb.add_argument(
        "--base", default=None, help="base model of a LoRA, where the run does not say"
    )
    verb.add_argument(
        "--other-stage",
        default=None,
        help="the other one of a model in two stages, prior or decoder, where the run does not say",
    )
    verb.add_argument(
        "--engine",
        choices=["torch", "jax"],
        default="torch",
        help="PyTorch through the stock pipelines, or JAX (default: %(default)s)",
    )
    verb.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    verb.add_argument("--device", default=None)
    verb.add_argument(
        "--output",
        type=to_path,
        default=Path("pictures"),
        help="folder for the PNG files (default: %(default)s)",
    )
    verb.add_argument(
        "--grid", type=to_path, default=None, help="also write all pictures into one PNG"
    )


def run_train(arguments: argparse.Namespace) -> None:
    from limner.config import toml
    from limner.training import loop

    more = [word for word in arguments.words if word.endswith(".toml") and "=" not in word]
    words = [word for word in arguments.words if word not in more]
    with report_once():
        configs = [
            toml.load_recipe(path, words) for path in (arguments.recipe, *map(to_path, more))
        ]
    if len(configs) == 1:
        loop.run_training(configs[0])
    else:
        loop.run_all(configs)


def run_encode(arguments: argparse.Namespace) -> None:
    from limner.config import toml
    from limner.training import loop

    with report_once():
        config = toml.load_recipe(arguments.recipe, arguments.words)
    loop.run_training(config, only_encode=True)


def run_check(arguments: argparse.Namespace) -> None:
    from limner.commands import check
    from limner.config import toml

    check.run_check(
        toml.load_recipe(arguments.recipe, arguments.words),
        json_file=arguments.json,
        sheet=arguments.sheet,
    )


def run_show(arguments: argparse.Namespace) -> None:
    from limner.commands import show
    from limner.config import toml

    print(show.format_settings(toml.load_recipe(arguments.recipe, arguments.words)))


def run_generate(arguments: argparse.Namespace) -> None:
    from limner.commands import generate

    settings: dict[str, Any] = {
        k: v for k, v in vars(arguments).items() if k not in ("verb", "words")
    }
    generate.run_generate(prompts=arguments.words, **settings)


def run_export(arguments: argparse.Namespace) -> None:
    from limner.commands import export

    if arguments.private and arguments.push is None:
        raise InputError(
            "--private: nothing is pushed without --push REPOSITORY; give both, or neither"
        )
    if arguments.other_stage is not None and arguments.combined is None:
        raise InputError(
            "--other-stage: nothing is put together without --combined FOLDER; give both, or "
            "neither"
        )
    if arguments.combined is not None:
        export.combine_stages(arguments.run, arguments.combined, other_stage=arguments.other_stage)
        return
    export.export_run(arguments.run, push_to=arguments.push, private=arguments.private)


def run_demo(arguments: argparse.Namespace) -> None:
    from limner.commands import demo

    demo.run_demo(arguments.folder, arguments.output, engine=arguments.engine)


def run_bench(arguments: argparse.Namespace) -> None:
    from limner.commands import bench
    from limner.config import toml

    bench.run_bench(
        toml.load_recipe(arguments.recipe, arguments.words),
        steps=arguments.steps,
        json_file=arguments.json,
    )


COMMANDS = {
    "train": run_train,
    "encode": run_encode,
    "check": run_check,
    "show": run_show,
    "generate": run_generate,
    "export": run_export,
    "demo": run_demo,
    "bench": run_bench,
}


def run_guarded(action: Callable[[], object]) -> int:
    """Run ``action``; a fault becomes one message on standard error and its exit code."""
    quiet_libraries()
    try:
        action()
    except LimnerError as fault:
        if not fault.reported:
            print(f"limner: {fault}", file=sys.stderr)
        return fault.code
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in TORCH_PACKAGES:
            raise
        print(
            f'limner: {missing} is missing; install it with: pip install "limner[torch]"',
            file=sys.stderr,
        )
        return InputError.code
    except KeyboardInterrupt:
        print("limner: stopped by hand", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """Libraries' advice that is not for Limner's users goes unsaid; their errors do not."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(diffusers|transformers|torch|peft|accelerate)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
