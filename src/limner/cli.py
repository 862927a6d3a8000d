"""The ``limner`` command: arguments in, one command called, an exit code out."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import limner
from limner.errors import report_once
from limner.guard import run_guarded
from limner.options import add_renamed_option, suggest_setting, to_name, to_path
from limner.redaction import redacted_output
from limner.training.signals import BEFORE_TRAINING, Stop

if TYPE_CHECKING:
    from limner.config.schema import Config

OVERRIDES_HELP = "settings as section.key=value, in TOML"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, and return the exit code (see ``limner.errors``)."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    with redacted_output():
        arguments, extra = parser.parse_known_args(words)
        unknown = extra if "words" not in arguments else [w for w in extra if w.startswith("-")]
        if unknown:
            hint = suggest_setting(unknown[0])
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    # argparse takes a list of words up to the first option, and leaves those after it.
    if extra:
        arguments.words = [*arguments.words, *extra]
    return run_guarded(lambda: run_command(COMMANDS[arguments.command], arguments))


def run_command(command: "Command", arguments: Namespace) -> None:
    """Run a command, which a signal ends with a message and an exit code of its own."""
    # Here already, as a signal may come while the command's modules are imported.
    with Stop(ends_process=True, words=command.stopped):
        command.run(arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of the command line, with a parser for each command."""
    parser = ArgumentParser(prog="limner", description="Fine-tune text-to-image diffusion models.")
    parser.add_argument("--version", action="version", version=f"limner {limner.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help))
    return parser


def add_recipe_arguments(parser: ArgumentParser, words_help: str = OVERRIDES_HELP) -> None:
    """Add a recipe and its overrides."""
    parser.add_argument("recipe", type=to_path, help="a TOML file, such as recipes/sd15-lora.toml")
    parser.add_argument("words", metavar="overrides", nargs="*", default=[], help=words_help)


def load_recipe(arguments: Namespace) -> "Config":
    """Read the recipe of a command, with its overrides."""
    from limner.config import toml

    return toml.load_recipe(arguments.recipe, arguments.words)


def add_train_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner train`` takes."""
    add_recipe_arguments(
        parser, f"further recipes, trained one after the other, and {OVERRIDES_HELP}"
    )


def run_train(arguments: Namespace) -> None:
    """Train one recipe, or several one after the other."""
    from limner.config import toml
    from limner.training import loop, several_recipes

    named = [word for word in arguments.words if word.endswith(".toml") and "=" not in word]
    overrides = [word for word in arguments.words if word not in named]
    recipes = [arguments.recipe, *map(to_path, named)]
    with report_once():
        configs = [toml.load_recipe(recipe, overrides) for recipe in recipes]
    if len(configs) == 1:
        loop.run_training(configs[0])
    else:
        several_recipes.run_all(configs)


def run_encode(arguments: Namespace) -> None:
    """Fill the caches of a recipe."""
    from limner.training import loop

    with report_once():
        config = load_recipe(arguments)
    loop.run_training(config, only_encode=True)


def add_check_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner check`` takes."""
    parser.add_argument("--json", type=to_path, help="write the report to this file too")
    parser.add_argument(
        "--sheet",
        type=to_path,
        help="draw a contact sheet of each bucket's pictures, as they are cropped, into this PNG",
    )
    add_recipe_arguments(parser)


def run_check(arguments: Namespace) -> None:
    """Check the data of a recipe."""
    from limner.commands import check

    check.run_check(load_recipe(arguments), json_file=arguments.json, sheet=arguments.sheet)


def run_show(arguments: Namespace) -> None:
    """Print the settings of a recipe."""
    from limner.commands import show

    print(show.format_settings(load_recipe(arguments)))


def add_generate_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner generate`` takes: the model, the prompts, the settings, the files."""
    parser.add_argument(
        "model",
        type=to_name,
        help="a run's folder, a folder in the diffusers layout, or a Hub repository",
    )
    parser.add_argument("words", metavar="prompts", nargs="*", default=[], help="what to draw")
    parser.add_argument("--prompt-file", type=to_path, help="a text file with one prompt per line")
    parser.add_argument(
        "--base", type=to_name, help="base model of a LoRA, where the run does not say"
    )
    parser.add_argument(
        "--other-stage",
        type=to_name,
        help="the other stage of a two-stage model, prior or decoder, where the run does not say",
    )
    add_renamed_option(parser, "--partner", "--other-stage")
    add_draw_settings(parser)
    parser.add_argument(
        "--output",
        type=to_path,
        default=Path("pictures"),
        help="folder for the PNG files (default: %(default)s)",
    )
    parser.add_argument("--grid", type=to_path, help="also write all pictures into one PNG")


def add_draw_settings(parser: ArgumentParser) -> None:
    """Add the fields of ``DrawSettings``; a test compares the defaults."""
    parser.add_argument("--negative-prompt")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture of each prompt; the next ones count up (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=int, default=1, help="pictures per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=25, help="of the sampler (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    parser.add_argument(
        "--scheduler",
        help="ddim, ddpm, dpm++, euler, euler-a, heun, pndm or unipc (default: the model's own)",
    )
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="pictures drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "--engine",
        choices=["torch", "jax"],
        default="torch",
        help="PyTorch through the stock pipelines, or JAX (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["no", "fp16", "bf16"],
        help="of weights and arithmetic (default: as the run drew its previews, else float32)",
    )
    parser.add_argument("--device")
    parser.add_argument(
        "--no-safety-checker",
        dest="safety_checker",
        action="store_false",
        help="leave the model's safety checker out, which blackens what it finds unsafe",
    )


def run_generate(arguments: Namespace) -> None:
    """Draw pictures, and print where they are."""
    from limner.commands import generate

    prompts = list(arguments.words)
    if arguments.prompt_file is not None:
        prompts += generate.read_prompts(arguments.prompt_file)
    settings = generate.DrawSettings(
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        count=arguments.count,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        scheduler=arguments.scheduler,
        size=arguments.size,
        batch_size=arguments.batch_size,
        engine=arguments.engine,
        precision=arguments.precision,
        device=arguments.device,
        safety_checker=arguments.safety_checker,
    )
    paths = generate.run_generate(
        model=arguments.model,
        prompts=prompts,
        settings=settings,
        base=arguments.base,
        other_stage=arguments.other_stage,
        output=arguments.output,
        grid=arguments.grid,
    )
    for path in paths:
        print(path)
    if arguments.grid is not None:
        print(arguments.grid)


def add_export_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner export`` takes."""
    parser.add_argument("run", type=to_path)
    parser.add_argument(
        "--push", type=to_name, metavar="REPOSITORY", help="Hub repository to push the result to"
    )
    parser.add_argument(
        "--combined",
        metavar="FOLDER",
        type=to_path,
        help="of a two-stage model: write both stages into this folder, for stock pipelines",
    )
    parser.add_argument(
        "--other-stage",
        type=to_name,
        help="for --combined: the other stage, a run, a folder or a Hub repository (default: "
        "the run's own)",
    )
    add_renamed_option(parser, "--partner", "--other-stage")
    parser.add_argument(
        "--private", action="store_true", help="where --push creates that repository"
    )


def run_export(arguments: Namespace) -> None:
    """Write a result again, push it, or combine two stages."""
    from limner.commands import export

    export.run_export(
        arguments.run,
        push=arguments.push,
        private=arguments.private,
        combined=arguments.combined,
        other_stage=arguments.other_stage,
    )


def add_demo_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner demo`` takes."""
    parser.add_argument(
        "--engine",
        choices=["torch", "jax"],
        default="torch",
        help="what trains and draws (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=to_path,
        help="receives the run (default: runs/demo-, then a digest of what is bundled)",
    )
    parser.add_argument(
        "--output",
        type=to_path,
        default=Path("before-after.png"),
        help="the picture at the end (default: %(default)s)",
    )


def run_demo(arguments: Namespace) -> None:
    """Run the demo."""
    from limner.commands import demo

    demo.run_demo(arguments.folder, arguments.output, engine=arguments.engine)


def add_bench_arguments(parser: ArgumentParser) -> None:
    """Add what ``limner bench`` takes."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--steps", type=int, default=10, help="measured steps (default: %(default)s)"
    )
    parser.add_argument("--json", type=to_path, help="write the figures to this file too")


def run_bench(arguments: Namespace) -> None:
    """Measure a recipe."""
    from limner.commands import bench

    bench.run_bench(load_recipe(arguments), steps=arguments.steps, json_file=arguments.json)


@dataclass(frozen=True)
class Command:
    """One command: a line about it, what it takes, what it does."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    stopped: str = "stopped; run the same command again"  # what is said after a signal


COMMANDS = {
    "train": Command(
        "train, or resume a training", add_train_arguments, run_train, BEFORE_TRAINING
    ),
    "encode": Command(
        "encode pictures and captions ahead of time; training then loads no encoder",
        add_recipe_arguments,
        run_encode,
        BEFORE_TRAINING,
    ),
    "check": Command(
        "check every picture and caption, and report what training would do with them",
        add_check_arguments,
        run_check,
    ),
    "show": Command(
        "print the resolved settings and batch arithmetic, and load nothing",
        add_recipe_arguments,
        run_show,
    ),
    "generate": Command(
        "draw pictures with a run, a model folder or a Hub repository",
        add_generate_arguments,
        run_generate,
        "stopped; the pictures of whole batches are written. Run the same command again",
    ),
    "export": Command(
        "write the result of a run's newest checkpoint again, or push it to the Hub",
        add_export_arguments,
        run_export,
    ),
    "demo": Command(
        "fine-tune the bundled model on the bundled pictures, on the CPU, in minutes",
        add_demo_arguments,
        run_demo,
    ),
    "bench": Command(
        "step time, images/s, peak memory and MFU of a recipe", add_bench_arguments, run_bench
    ),
}
