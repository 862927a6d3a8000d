"""The model card of a result, and the Python that draws with it."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limner.base_model.base import BaseModel
from limner.base_model.hub import HUB_NAME
from limner.config import toml
from limner.families import FAMILIES
from limner.families.family import Family
from limner.storage.layout import LORA_FILE
from limner.storage.run_folder import GRID_FILE

SHOWN_SETTINGS: tuple[str, ...] = (
    "objective.",
    "adapt.",
    "optim.",
    "train.",
    "engine.precision",
    "model.family",
    "model.revision",
    "model.variant",
)
SHOWN_SETTINGS += tuple(
    f"data.{name}"
    for name in (
        "size",
        "buckets.",
        "crop",
        "crops",
        "flip",
        "resample",
        "drop_caption",
        "empty_caption",
        "chunks",
        "limit",
    )
)


def write_model_card(
    plain: Mapping[str, Any],
    base: BaseModel,
    family: Family,
    step: int,
    *,
    prompts: Sequence[str] = (),
    repo: str | None = None,
    grid: bool = False,
) -> str:
    """The text of README.md: data of the user's is escaped, and no path or name of a person or
    machine is told.

    Args:
        plain: the resolved config, as ``to_plain`` gives it.
        prompts: shown beside the pictures of ``preview.png``, which ``grid`` says is there.
        repo: where it is going to be pushed, for the snippet.
    """
    import yaml

    lora, name = plain["adapter"]["kind"] == "lora", base.name if base.commit is not None else None
    data = plain["data"].get("hub") or ""
    data = data if HUB_NAME.fullmatch(data) and not Path(data).exists() else None
    matter: dict[str, Any] = {
        k: v
        for k, v in base.read_card_metadata().items()
        if k in ("license", "license_name", "license_link") and isinstance(v, str)
    }
    matter |= (
        {"base_model": name, "base_model_relation": "adapter" if lora else "finetune"}
        if name
        else {}
    )
    matter |= {"datasets": [data]} if data else {}
    beside = (
        base.other_stage.name
        if base.other_stage is not None and base.other_stage.commit is not None
        else None
    )
    matter |= (
        {"prior": [beside]} if beside and family.stage and not family.stage.prefix else {}
    )  # by which AutoPipelineForText2Image finds the other stage
    matter |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "inference": True}
    matter["tags"] = [
        family.card_tag,
        "text-to-image",
        "diffusers",
        "diffusers-training",
        *(["lora"] if lora else []),
        "limner",
    ]
    what = "LoRA weights for" if lora else "A fine-tuned copy of"
    source = (
        escape_markdown(name) if name else f"a {family.pipeline.removesuffix('Pipeline')} model"
    )
    shown = {
        k: v
        for k, v in toml.flatten(dict(plain)).items()
        if k.startswith(SHOWN_SETTINGS) and v not in (None, [])
    }
    settings = [
        f"| {escape_markdown(k)} | {escape_markdown(json.dumps(v, ensure_ascii=False))} |"
        for k, v in shown.items()
    ]
    pictures = (
        [
            "## Pictures",
            "",
            f"![pictures made with these weights]({GRID_FILE})",
            "",
            *(f"- {escape_markdown(p)}" for p in prompts),
            "",
        ]
        if grid
        else []
    )
    lines = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n",
        f"# {escape_markdown((repo or 'text-to-image model').split('/')[-1])}\n",
        f"{what} {source}, trained for {step} "
        f"steps{f' on {escape_markdown(data)}' if data else ''} with "
        "Limner.\n",
        *pictures,
        "## Use\n",
        write_snippet(
            family, lora, name, repo, prompts[0] if prompts else "a photograph of a cat", beside
        ),
        "## Training\n\n| setting | value |\n|---|---|",
        *settings,
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


def write_snippet(
    family: Family,
    lora: bool,
    base: str | None,
    repo: str | None,
    prompt: str,
    beside: str | None = None,
) -> str:
    """How to make a picture, in Python; ``beside`` is the repository of the other stage."""
    here, under = (
        json.dumps(repo or "path/to/this/folder"),
        json.dumps(base or "path/to/the/base/model"),
    )
    if family.stage is not None:
        return write_two_stage_snippet(family, lora, here, under, prompt, beside)
    load = [
        f"pipeline = {family.pipeline}.from_pretrained({under if lora else here})",
        *([f"pipeline.load_lora_weights({here})"] if lora else []),
    ]
    make = [
        f"image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(
        ["```python", f"from diffusers import {family.pipeline}\n", *load, *make, "```\n"]
    )


def write_two_stage_snippet(
    family: Family, lora: bool, here: str, under: str, prompt: str, beside: str | None
) -> str:
    """The same for one of two stages."""
    assert family.stage is not None
    other = FAMILIES[family.stage.other_stage]
    names = {
        f.name: f.trained_component if f.stage and f.stage.prefix else "decoder"
        for f in (family, other)
    }
    lines = [
        f"{names[family.name]} = {family.pipeline}.from_pretrained({under if lora else here})",
        f"{names[other.name]} = "
        f"{other.pipeline}.from_pretrained({json.dumps(beside or 'path/to/the/other/stage')})",
    ]
    if lora:
        lines.append(
            f"{names[family.name]}.{family.trained_component}.load_lora_adapter({here}, "
            f'prefix="{family.trained_component}", weight_name="{LORA_FILE}")'
        )
    make = [
        "image_embeds, negative_image_embeds = "
        f"prior({json.dumps(prompt, ensure_ascii=False)}).to_tuple()",
        "image = decoder(image_embeds=image_embeds, "
        "negative_image_embeds=negative_image_embeds).images[0]",
        'image.save("image.png")',
    ]
    pipelines = ", ".join(sorted((family.pipeline, other.pipeline)))
    return "\n".join(["```python", f"from diffusers import {pipelines}\n", *lines, *make, "```\n"])


def escape_markdown(text: str) -> str:
    """A user's text as one line of Markdown that shows it and does nothing else."""
    return re.sub(
        r"([\\`*_{}\[\]()#+\-.!|~:])", r"\\\1", html.escape(" ".join(text.split()), quote=False)
    )
