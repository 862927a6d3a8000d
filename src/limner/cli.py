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

from limner.faults import Fault, InputFault, told_once

TORCH = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
)  # what pip installs with limner[torch]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code (see ``limner.faults``)."""
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
            verb.add_argument("--json", type=place, help="write the report to this file too")
            verb.add_argument(
                "--sheet",
                type=place,
                help="draw a contact sheet of each bucket's pictures, as they are cut, into "
                "this PNG",
            )
        verb.add_argument("recipe", type=place, help="a TOML file, such as recipes/sd15-lora.toml")
        several = "further recipes, trained one after the other, and " if name == "train" else ""
        verb.add_argument("words", metavar="overrides", nargs="*", help=several + recipe)
    add_generate(
        verbs.add_parser(
            "generate", help="make pictures with a run, a model folder or a Hub repository"
        )
    )
    verb = verbs.add_parser(
        "export", help="write the result of a run's newest checkpoint again, or push it to the Hub"
    )
    verb.add_argument("run", type=place)
    verb.add_argument("--push", metavar="REPOSITORY", help="Hub repository to push the result to")
    verb.add_argument(
        "--combined",
        metavar="FOLDER",
        type=place,
        help="of a model in two stages: write both into this folder, for stock pipelines",
    )
    verb.add_argument(
        "--partner",
        default=None,
        help="for --combined: the other stage, a run, a folder or a Hub repository (default: "
        "the run's own partner)",
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
        type=place,
        help="receives the run (default: runs/demo-, then a digest of what is bundled)",
    )
    verb.add_argument(
        "--output",
        type=place,
        default=Path("before-after.png"),
        help="the picture at the end (default: %(default)s)",
    )
    verb = verbs.add_parser("bench", help="step time, images/s, peak memory and MFU of a recipe")
    verb.add_argument("recipe", type=place)
    verb.add_argument("words", metavar="overrides", nargs="*", help=recipe)
    verb.add_argument("--steps", type=int, default=10, help="measured steps (default: %(default)s)")
    verb.add_argument("--json", type=place, help="write the figures to this file too")
    arguments, more = parser.parse_known_args(argv)
    if more and ("words" not in arguments or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # words that follow an option
        arguments.words += more
    return guard(lambda: VERBS[arguments.verb](arguments))


def place(text: str) -> Path:
    """A path as a user writes it."""
    return Path(text).expanduser()


def add_generate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", help="a run's folder, a folder in the diffusers layout, or a Hub repository"
    )
    verb.add_argument("words", metavar="prompts", nargs="*", help="what to draw")
    verb.add_argument("--prompt-file", type=place, help="a text file with one prompt per line")
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
        "--partner",
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
        type=place,
        default=Path("pictures"),
        help="folder for the PNG files (default: %(default)s)",
    )
    verb.add_argument(
        "--grid", type=place, default=None, help="also write all pictures into one PNG"
    )


def run_train(arguments: argparse.Namespace) -> None:
    from limner import config, training

    more = [word for word in arguments.words if word.endswith(".toml") and "=" not in word]
    words = [word for word in arguments.words if word not in more]
    with told_once():
        cfgs = [config.load(path, words) for path in (arguments.recipe, *map(place, more))]
    if len(cfgs) == 1:
        training.run(cfgs[0])
    else:
        training.run_all(cfgs)


def run_encode(arguments: argparse.Namespace) -> None:
    from limner import config, training

    with told_once():
        cfg = config.load(arguments.recipe, arguments.words)
    training.run(cfg, only_encode=True)


def run_check(arguments: argparse.Namespace) -> None:
    from limner import check, config

    check.run(
        config.load(arguments.recipe, arguments.words),
        json_file=arguments.json,
        sheet=arguments.sheet,
    )


def run_show(arguments: argparse.Namespace) -> None:
    from limner import config, show

    print(show.text(config.load(arguments.recipe, arguments.words)))


def run_generate(arguments: argparse.Namespace) -> None:
    from limner import generate

    settings: dict[str, Any] = {
        k: v for k, v in vars(arguments).items() if k not in ("verb", "words")
    }
    generate.run(prompts=arguments.words, **settings)


def run_export(arguments: argparse.Namespace) -> None:
    from limner import export

    if arguments.private and arguments.push is None:
        raise InputFault(
            "--private: nothing is pushed without --push REPOSITORY; give both, or neither"
        )
    if arguments.partner is not None and arguments.combined is None:
        raise InputFault(
            "--partner: nothing is put together without --combined FOLDER; give both, or neither"
        )
    if arguments.combined is not None:
        export.combine(arguments.run, arguments.combined, partner=arguments.partner)
        return
    export.again(arguments.run, push_to=arguments.push, private=arguments.private)


def run_demo(arguments: argparse.Namespace) -> None:
    from limner import demo

    demo.run(arguments.folder, arguments.output, engine=arguments.engine)


def run_bench(arguments: argparse.Namespace) -> None:
    from limner import bench, config

    bench.run(
        config.load(arguments.recipe, arguments.words),
        steps=arguments.steps,
        json_file=arguments.json,
    )


VERBS = {
    "train": run_train,
    "encode": run_encode,
    "check": run_check,
    "show": run_show,
    "generate": run_generate,
    "export": run_export,
    "demo": run_demo,
    "bench": run_bench,
}


def guard(action: Callable[[], object]) -> int:
    """Run ``action``; a fault becomes one message on standard error and its exit code."""
    quiet_libraries()
    try:
        action()
    except Fault as fault:
        if not fault.told:
            print(f"limner: {fault}", file=sys.stderr)
        return fault.code
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in TORCH:
            raise
        print(
            f'limner: {missing} is missing; install it with: pip install "limner[torch]"',
            file=sys.stderr,
        )
        return InputFault.code
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
