"""The result of a run: what stock pipelines load, whole or absent, and the little of it that is
pushed to the Hub."""

import html
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from limner import checkpoint, config, durable, snapshot
from limner.base import INDEX, Base, open_base, read_json
from limner.families import FAMILIES
from limner.family import Family
from limner.faults import HubFault, InputFault, IntegrityFault
from limner.hub import HUB_NAME, endpoint, hub_errors
from limner.objective import Objective
from limner.snapshot import LORA, WEIGHTS
from limner.weights import has_weights, names_in, usable

RESULT = "result.json"
PUSHED = "pushed.json"  # where, and which result
CARD = "README.md"
GRID = "preview.png"  # at the run's root: pictures for the model card
PREDICTS_SAMPLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
SHOWN: tuple[str, ...] = (
    "objective.",
    "adapt.",
    "optim.",
    "train.",
    "engine.precision",
    "model.family",
    "model.revision",
    "model.variant",
)
SHOWN += tuple(
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


def write(
    found: checkpoint.Checkpoint, cfg: config.Config, base: Base, family: Family, predict: str
) -> None:
    """The result of a run from its last checkpoint, the moving average where one was kept, unless
    it is there already; and its model card."""
    run = Path(cfg.run)
    if not result_is_whole(run, found.step):
        arrays = snapshot.reader(found, cfg.adapt, family)(
            snapshot.result_group(found, cfg.adapt, family)
        )
        if cfg.adapt.kind == "lora":
            write_lora(base, family, run, arrays, cfg.adapt, found.step)
        else:
            write_full(base, family, run, arrays, predict, found.step)
    card = model_card(
        config.plain(cfg),
        base,
        family,
        found.step,
        prompts=cfg.preview.prompts,
        repo=cfg.export.hub,
        grid=(run / GRID).is_file(),
    )
    durable.write_text(run / CARD, card)


def again(
    run: Path, *, push_to: str | None, private: bool, tell: Callable[[str], None] = print
) -> None:
    """Write the result of a run's newest good checkpoint, and push it where that is wished for.

    Raises:
        InputFault: when the folder holds no checkpoint.
    """
    if not checkpoint.listed(run):
        raise InputFault(
            f"{run}: there is no checkpoint here, so there is nothing to export. Give the folder "
            "of a run."
        )
    with durable.lock(run):
        durable.sweep(run)
        found = checkpoint.latest(run, tell)
        if found is None:
            raise IntegrityFault(f"{run}: no checkpoint is whole, so there is nothing to export.")
        cfg = config.build(config.Config, {**found.state["config"], "run": str(run)})
        cfg = replace(cfg, export=replace(cfg.export, hub=push_to or cfg.export.hub))
        family = FAMILIES[cfg.model.family]
        base = open_base(cfg.model, family, draws=False)
        write(
            found, cfg, base, family, Objective.of(base.configs["scheduler"], cfg.objective).predict
        )
        tell(f"{run}: the result of step {found.step} is here")
        if push_to is not None:
            tell(push(run, push_to, private, tell))


def combine(
    run: Path, target: Path, *, partner: str | None = None, tell: Callable[[str], None] = print
) -> None:
    """Write both stages of a model into one folder, which the stock pipeline of both loads.

    Args:
        run: the folder of a finished run of either stage.
        partner: the other stage: a run, a folder or a Hub repository; None: the one that the run
            was trained beside.

    Raises:
        InputFault: for a run of another kind, or a folder that is not empty.
    """
    found = read_result(run)
    model = config.build(config.Model, read_json(run / "config.json").get("model", {}))
    family = FAMILIES[model.family]
    if family.stage is None:
        raise InputFault(
            f"{run}: a {family.pipeline} makes pictures alone; there is nothing to put beside it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputFault(f"{target}: it is there already, and not empty; choose another folder")
    own = None
    if found["kind"] != "lora":
        own = open_base(
            config.Model(
                str(run), family.name, partner=partner or model.partner, cache_dir=model.cache_dir
            ),
            family,
        )
    if own is None or own.partner is None or own.partner.adapter is not None:
        raise InputFault(
            f"{run if own is None else partner or model.partner}: a LoRA is no folder of weights; "
            "limner generate puts it on its base"
        )
    index = {"_class_name": family.stage.whole}
    for half, opened in ((family, own), (FAMILIES[family.stage.partner], own.partner)):
        for name in half.components:
            place = f"{half.stage.prefix if half.stage else ''}{name}"
            with durable.folder(target / place, manifest=False) as path:
                copy(opened, name, path)
            index[place] = list(opened.kind(name))  # type: ignore[assignment]
    durable.write_text(target / INDEX, json.dumps(index, indent=2) + "\n")
    tell(f"{target}: {family.stage.whole}.from_pretrained loads both stages from here")


def write_full(
    base: Base, family: Family, run: Path, arrays: Mapping[str, np.ndarray], predict: str, step: int
) -> None:
    """Write a diffusers folder at the run's root: the base's components, with the trained one's new
    weights.

    Killed at any moment and called again it completes; until then there is no ``model_index.json``
    and no ``result.json``.
    """
    begin(run)
    index = {k: v for k, v in base.configs["model_index"].items() if k != "_name_or_path"}
    files = []
    for name in [k for k, v in index.items() if not k.startswith("_") and isinstance(v, list)]:
        if index[name][1] is None:
            continue
        if name not in family.components and not copyable(base, name):
            index[name] = [None, None]
            continue
        with durable.folder(run / name, manifest=False) as path:
            if name == base.trains:
                write_json(path / "config.json", base.configs[name])
                checkpoint.write_arrays(path / WEIGHTS, dict(arrays))
            elif name == "scheduler":
                changed = scheduler(base.configs[name], index[name][1], predict)
                index[name] = [index[name][0], changed.get("_class_name", index[name][1])]
                write_json(path / "scheduler_config.json", changed)
            else:
                copy(base, name, path)
        files += [f"{name}/{file}" for file in names_in(run / name)]
    durable.write_text(run / INDEX, json.dumps(index, indent=2) + "\n")
    finish(run, "full", step, [INDEX, *files])


def write_lora(
    base: Base,
    family: Family,
    run: Path,
    arrays: Mapping[str, np.ndarray],
    adapt: config.Adapt,
    step: int,
) -> None:
    """Write ``pytorch_lora_weights.safetensors`` at the run's root; names as PEFT has them, e.g.
    ``unet.mid_block...to_q.lora_A.weight``."""
    begin(run)
    temporary = run / f".{LORA}.{os.getpid()}.tmp"
    with durable.disk_errors(run / LORA, sum(a.nbytes for a in arrays.values())):
        checkpoint.write_arrays(temporary, dict(arrays), snapshot.lora_metadata(adapt, family))
        durable.sync(temporary)
        os.replace(temporary, run / LORA)
        durable.sync(run)
    finish(run, "lora", step, [LORA])


def result_is_whole(run: Path, step: int | None = None) -> bool:
    """Whether the result (of this step) is there, every file of it as it was written."""
    try:
        found = read_result(run)
        return step in (None, found["step"]) and all(
            (run / n).stat().st_size == f["size"] and durable.digest(run / n) == f["xxh3_128"]
            for n, f in found["files"].items()
        )
    except (OSError, IntegrityFault):
        return False


def read_result(run: Path) -> dict[str, Any]:
    """``result.json``: step, kind (full or lora), and size and digest of every file."""
    try:
        found = json.loads((run / RESULT).read_text(encoding="utf-8"))
        files = found["files"]
        if (
            found["digest"] != durable.digest_json([found["step"], found["kind"], files])
            or not files
        ):
            raise ValueError("changed since it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityFault(
            f"{run}: there is no whole result ({RESULT} is missing or damaged). Run the training "
            "command again: a finished run only writes its result anew."
        ) from error
    return found


def begin(run: Path) -> None:
    """Take away what calls an earlier result whole, before a file of it changes."""
    for name in (RESULT, INDEX):
        with durable.disk_errors(run / name):
            (run / name).unlink(missing_ok=True)
    if run.is_dir():
        durable.sync(run)


def finish(run: Path, kind: str, step: int, names: Sequence[str]) -> None:
    """Declare the result whole."""
    files = {
        name: {"size": (run / name).stat().st_size, "xxh3_128": durable.digest(run / name)}
        for name in sorted(names)
    }
    durable.write_text(
        run / RESULT,
        json.dumps(
            {
                "step": step,
                "kind": kind,
                "files": files,
                "digest": durable.digest_json([step, kind, files]),
            },
            indent=1,
        ),
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A component's config without the path it was once loaded from."""
    path.write_text(
        json.dumps({k: v for k, v in value.items() if k != "_name_or_path"}, indent=2) + "\n",
        encoding="utf-8",
    )


def copyable(base: Base, name: str) -> bool:
    """Whether a component beyond the family's own is there, without weights or with safetensors
    ones."""
    names = names_in(base.part(name))
    return bool(names) and (not has_weights(names) or usable(name, names, base.variant))


def copy(base: Base, name: str, target: Path) -> None:
    """Copy one component of the base; weight files lose the infix of their variant."""
    source = base.part(name)
    for file in names_in(source):
        if file.endswith(".json") and ".index." not in file:
            value = json.loads((source / file).read_text(encoding="utf-8"))
            write_json(target / file, value) if isinstance(
                value, dict
            ) and "_name_or_path" in value else shutil.copyfile(source / file, target / file)
        elif file.endswith((".txt", ".model")):
            shutil.copyfile(source / file, target / file)
    weights = base.weight_files(name) if has_weights(names_in(source)) else []
    shards: dict[str, str] = {}
    for path in weights:
        shard = re.search(r"-\d{5}-of-\d{5}", path.name)
        plain = re.split(r"[.-]", path.name)[0] + (shard[0] if shard else "") + ".safetensors"
        shutil.copyfile(path, target / plain)
        if shard:
            with safe_open(path, "np") as opened:
                shards |= dict.fromkeys(opened.keys(), plain)
    if shards:
        stem = weights[0].name.split(".")[0].split("-")[0]
        write_json(
            target / f"{stem}.safetensors.index.json",
            {
                "metadata": {"total_size": sum(p.stat().st_size for p in weights)},
                "weight_map": shards,
            },
        )


def scheduler(found: Mapping[str, Any], cls: str, predict: str) -> dict[str, Any]:
    """The base's scheduler config, telling what was trained; DDIM where the base's own sampler
    cannot use it."""
    if predict == found.get("prediction_type", "epsilon"):
        return dict(found)
    if predict != "sample" or cls in PREDICTS_SAMPLE:
        return {**found, "prediction_type": predict}
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "steps_offset",
        "set_alpha_to_one",
        "timestep_spacing",
        "rescale_betas_zero_snr",
        "_diffusers_version",
    )
    return {
        "_class_name": "DDIMScheduler",
        **{k: found[k] for k in kept if k in found},
        "clip_sample": False,
        "prediction_type": predict,
    }


def model_card(
    plain: Mapping[str, Any],
    base: Base,
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
        plain: the resolved config, as ``config.plain`` gives it.
        prompts: shown beside the pictures of ``preview.png``, which ``grid`` says is there.
        repo: where it is going to be pushed, for the snippet.
    """
    import yaml

    lora, name = plain["adapt"]["kind"] == "lora", base.name if base.commit is not None else None
    data = plain["data"].get("hub") or ""
    data = data if HUB_NAME.fullmatch(data) and not Path(data).exists() else None
    matter: dict[str, Any] = {
        k: v
        for k, v in base.card().items()
        if k in ("license", "license_name", "license_link") and isinstance(v, str)
    }
    matter |= (
        {"base_model": name, "base_model_relation": "adapter" if lora else "finetune"}
        if name
        else {}
    )
    matter |= {"datasets": [data]} if data else {}
    beside = (
        base.partner.name if base.partner is not None and base.partner.commit is not None else None
    )
    matter |= (
        {"prior": [beside]} if beside and family.stage and not family.stage.prefix else {}
    )  # by which AutoPipelineForText2Image finds the other stage
    matter |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "inference": True}
    matter["tags"] = [
        family.tag,
        "text-to-image",
        "diffusers",
        "diffusers-training",
        *(["lora"] if lora else []),
        "limner",
    ]
    what = "LoRA weights for" if lora else "A fine-tuned copy of"
    source = escape(name) if name else f"a {family.pipeline.removesuffix('Pipeline')} model"
    shown = {
        k: v
        for k, v in config.flat(dict(plain)).items()
        if k.startswith(SHOWN) and v not in (None, [])
    }
    settings = [
        f"| {escape(k)} | {escape(json.dumps(v, ensure_ascii=False))} |" for k, v in shown.items()
    ]
    pictures = (
        [
            "## Pictures",
            "",
            f"![pictures made with these weights]({GRID})",
            "",
            *(f"- {escape(p)}" for p in prompts),
            "",
        ]
        if grid
        else []
    )
    lines = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n",
        f"# {escape((repo or 'text-to-image model').split('/')[-1])}\n",
        f"{what} {source}, trained for {step} steps{f' on {escape(data)}' if data else ''} with "
        "Limner.\n",
        *pictures,
        "## Use\n",
        snippet(
            family, lora, name, repo, prompts[0] if prompts else "a photograph of a cat", beside
        ),
        "## Training\n\n| setting | value |\n|---|---|",
        *settings,
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


def snippet(
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
        return staged(family, lora, here, under, prompt, beside)
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


def staged(
    family: Family, lora: bool, here: str, under: str, prompt: str, beside: str | None
) -> str:
    """The same for one of two stages."""
    assert family.stage is not None
    other = FAMILIES[family.stage.partner]
    names = {f.name: f.trains if f.stage and f.stage.prefix else "decoder" for f in (family, other)}
    lines = [
        f"{names[family.name]} = {family.pipeline}.from_pretrained({under if lora else here})",
        f"{names[other.name]} = "
        f"{other.pipeline}.from_pretrained({json.dumps(beside or 'path/to/the/other/stage')})",
    ]
    if lora:
        lines.append(
            f"{names[family.name]}.{family.trains}.load_lora_adapter({here}, "
            f'prefix="{family.trains}", weight_name="{LORA}")'
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


def escape(text: str) -> str:
    """A user's text as one line of Markdown that shows it and does nothing else."""
    return re.sub(
        r"([\\`*_{}\[\]()#+\-.!|~:])", r"\\\1", html.escape(" ".join(text.split()), quote=False)
    )


def check_push(repo_id: str, private: bool = False) -> str:
    """Make sure, before training, that the result can be pushed; returns the repository's full
    name. An absent one is made.

    Raises:
        HubFault: when there is no token, or it may not write there.
    """
    with hub_errors(
        repo_id, then="Nothing was trained yet; leave export.hub out to train without pushing."
    ):
        api, token = connect(repo_id)
        name = prepare(api, repo_id, private, token)
        api.auth_check(name, token=token, write=True)
    return name


def push(
    run: Path, repo_id: str, private: bool = False, tell: Callable[[str], None] = print
) -> str:
    """Upload the result, its card and its pictures, nothing else; returns the address of the
    repository.

    Raises:
        IntegrityFault: when there is no whole result to push.
        HubFault: when the Hub refuses or cannot be reached; the result stays as it is.
    """
    from huggingface_hub import CommitOperationAdd

    found = read_result(run)
    if not result_is_whole(run):
        raise IntegrityFault(
            f"{run}: a file of the result was changed or is missing. Run the training command "
            "again: a finished run only writes its result anew."
        )
    names = [*found["files"], *(name for name in (CARD, GRID) if (run / name).is_file())]
    again = f"limner export {shlex.quote(str(run))} --push {shlex.quote(repo_id)}"
    with hub_errors(repo_id, then=f"The result in {run} is complete. To push it again: {again}"):
        api, token = connect(repo_id)
        name = prepare(api, repo_id, private, token)
        tell(f"pushing {len(names)} files to {name}: {', '.join(names)}")
        operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=run / n) for n in names]
        api.create_commit(
            name, operations, commit_message=f"Result of step {found['step']}", token=token
        )
    durable.write_text(run / PUSHED, json.dumps({"repository": name, "digest": found["digest"]}))
    return f"{endpoint() or 'https://huggingface.co'}/{name}"


def is_pushed(run: Path, repo_id: str) -> bool:
    """Whether this result has been pushed to this repository."""
    try:
        return json.loads((run / PUSHED).read_text()) == {
            "repository": repo_id,
            "digest": read_result(run)["digest"],
        }
    except (OSError, ValueError, IntegrityFault):
        return False


def connect(repo_id: str) -> tuple[Any, str]:
    """The Hub's interface and the token of the environment or of the login."""
    import huggingface_hub

    if re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", repo_id) is None:
        raise InputFault(
            f"export.hub: {repo_id!r} is no name of a repository; write owner/name, or name for "
            "one of your own."
        )
    token = huggingface_hub.get_token()
    if token is None:
        raise HubFault(
            f"{repo_id}: no token was found, one is needed to push. Log in (`hf auth login`) or "
            "set HF_TOKEN."
        )
    return huggingface_hub.HfApi(endpoint=endpoint()), token


def prepare(api: Any, repo_id: str, private: bool, token: str) -> str:
    """Make the repository if there is none; its full name."""
    who = api.whoami(token=token)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubFault(
            f"{repo_id}: the token may only read. Make one that may write, on the Hub's settings "
            "page, and set HF_TOKEN."
        )
    name = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
    api.create_repo(name, private=private or None, exist_ok=True, token=token)
    return name
