"""The model card of a result, and the Python that draws with it."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from limner.base_model.base import BaseModel
from limner.base_model.hub import HUB_NAME
from limner.config import toml
from limner.config.schema import SETTINGS
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.families.family import Family
from limner.families.snippet import ExampleNames, write_example
from limner.json_types import Plain
from limner.storage.layout import LORA_FILE
from limner.storage.run_folder import GRID_FILE


@dataclass(frozen=True)
class HubNames:
    """The Hub repositories that a run used; None for local files, whose paths stay private."""

    base: str | None
    dataset: str | None
    other_stage: str | None


def write_model_card(
    settings: Plain,
    base: BaseModel,
    family: Family,
    step: int,
    *,
    prompts: Sequence[str] = (),
    repo: str | None = None,
    grid: bool = False,
) -> str:
    """Return the text of README.md.

    Text of the user's is escaped, and the card holds no path and no name of a person or machine.

    Args:
        settings: the resolved config, as ``toml.to_plain`` gives it.
        prompts: listed with the pictures of ``preview.png``, and the first one in the snippet.
        repo: the repository that the result will be pushed to, for the snippet.
        grid: whether ``preview.png`` exists.
    """
    lora = settings["adapter"]["kind"] == "lora"
    hub_names = find_hub_names(settings, base)
    title = (repo or Path(settings["run"]).name or "text-to-image model").split("/")[-1]
    prompt = prompts[0] if prompts else "a photograph of a cat"
    lines = [
        format_front_matter(hub_names, base, family, lora),
        f"# {escape_markdown(title)}\n",
        describe_training(hub_names, family, lora, step),
        *(format_pictures(prompts) if grid else []),
        "## Use\n",
        write_snippet(settings, base, family, hub_names, repo, prompt),
        "## Training\n\n```toml",
        *format_settings(settings),
        "```",
    ]
    # A lone surrogate, which a prompt may hold, cannot be written as UTF-8.
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


def is_shown(name: str) -> bool:
    """Whether a setting is for the card."""
    setting = SETTINGS.get(name)
    return setting is not None and setting.declaration.on_card


def find_hub_names(settings: Plain, base: BaseModel) -> HubNames:
    """Find the names of what the run used from the Hub."""
    dataset = settings["data"].get("hub") or ""
    is_repository = HUB_NAME.fullmatch(dataset) and not Path(dataset).exists()
    other_stage = base.other_stage
    return HubNames(
        base=base.name if base.commit is not None else None,
        dataset=dataset if is_repository else None,
        other_stage=other_stage.name if other_stage and other_stage.commit is not None else None,
    )


def format_front_matter(hub_names: HubNames, base: BaseModel, family: Family, lora: bool) -> str:
    """Format the metadata that the Hub reads, as YAML between two rules."""
    import yaml

    metadata: Plain = {
        name: value
        for name, value in base.read_card_metadata().items()
        if name in ("license", "license_name", "license_link") and isinstance(value, str)
    }
    if hub_names.base:
        metadata["base_model"] = hub_names.base
        metadata["base_model_relation"] = "adapter" if lora else "finetune"
    if hub_names.dataset:
        metadata["datasets"] = [hub_names.dataset]
    metadata |= family.link_other_stage(hub_names.other_stage)
    metadata["library_name"] = "diffusers"
    metadata["pipeline_tag"] = "text-to-image"
    metadata["inference"] = True
    tags = [family.card_tag, "text-to-image", "diffusers", "diffusers-training"]
    metadata["tags"] = [*tags, "lora", "limner"] if lora else [*tags, "limner"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def describe_training(hub_names: HubNames, family: Family, lora: bool, step: int) -> str:
    """Say in one sentence what the result is, and how it was trained."""
    kind = "LoRA weights for" if lora else "A fine-tuned copy of"
    if hub_names.base:
        base = escape_markdown(hub_names.base)
    else:
        base = f"a {family.pipeline.removesuffix('Pipeline')} model"
    dataset = f" on {escape_markdown(hub_names.dataset)}" if hub_names.dataset else ""
    return f"{kind} {base}, trained for {step} steps{dataset} with Limner.\n"


def format_pictures(prompts: Sequence[str]) -> list[str]:
    """Format the section with the grid of pictures and their prompts, line by line."""
    return [
        "## Pictures",
        "",
        f"![pictures made with these weights]({GRID_FILE})",
        "",
        *(f"- {escape_markdown(prompt)}" for prompt in prompts),
        "",
    ]


def format_settings(settings: Plain) -> list[str]:
    """Format the settings that shaped the weights, one line of a recipe each."""
    rows = []
    for name, value in toml.flatten(dict(settings)).items():
        if is_shown(name) and value not in (None, []):
            # It has no line break: nothing that it holds can end the block of code.
            rows.append(f"{name} = {toml.format_value(value)}")
    return rows


def write_snippet(
    settings: Plain,
    base: BaseModel,
    family: Family,
    hub_names: HubNames,
    repo: str | None,
    prompt: str,
) -> str:
    """Return Python that draws a picture with the result, as a block of Markdown."""
    # What JSON quotes is a Python literal, too.
    result = json.dumps(repo or "path/to/this/folder")
    name = json.dumps(hub_names.base or "path/to/the/base/model")
    prompt = json.dumps(prompt, ensure_ascii=False)
    other_stage = json.dumps(hub_names.other_stage or "path/to/the/other/stage")
    names = ExampleNames(result, name, other_stage, prompt, None)
    if settings["adapter"]["kind"] == "lora":
        names = add_lora_settings(names, settings, base, family)
    return "\n".join(["```python", *write_example(family, names), "```\n"])


def add_lora_settings(
    names: ExampleNames, settings: Plain, base: BaseModel, family: Family
) -> ExampleNames:
    """Return the names with all that a LoRA's pipeline was trained with besides its base."""
    model, component = settings["model"], family.network.component
    options, classes = [], []
    for setting in ("revision", "variant"):
        if model[setting] is not None:
            options.append(f"{setting}={json.dumps(model[setting])}")
    if model["trained_revision"] is not None:
        class_name = base.component_class(component)[1]
        revision = json.dumps(model["trained_revision"])
        options.append(
            f'{component}={class_name}.from_pretrained({names.base}, subfolder="{component}", '
            f"revision={revision})"
        )
        classes.append(class_name)
    if model["vae"] is not None:
        # A path stays private; a name on the Hub is nobody's secret.
        given, folder = Path(model["vae"]), base.component_folder("vae")
        place = json.dumps("path/to/the/autoencoder" if given.exists() else model["vae"])
        # What was given may be the autoencoder's own folder, of that name.
        if folder.name == "vae" and folder != given.absolute():
            place += ', subfolder="vae"'
        options.append(f"vae=AutoencoderKL.from_pretrained({place})")
        classes.append("AutoencoderKL")
    before, class_name = base.configs["scheduler"], base.scheduler_class
    after = adapt_scheduler(before, class_name, settings["objective"]["predict"])
    changes = {name: value for name, value in after.items() if before.get(name) != value}
    scheduler = None
    if changes:
        class_name = after["_class_name"]
        changes.pop("_class_name", None)
        scheduler = (class_name, changes)
        classes.append(class_name)
    return replace(
        names,
        lora_file=json.dumps(LORA_FILE),
        options=tuple(options),
        scheduler=scheduler,
        classes=tuple(classes),
    )


def escape_markdown(text: str) -> str:
    """Return a user's text as one line of Markdown that shows it and does nothing else."""
    return re.sub(
        r"([\\`*_{}\[\]()#+\-.!|~:])", r"\\\1", html.escape(" ".join(text.split()), quote=False)
    )
