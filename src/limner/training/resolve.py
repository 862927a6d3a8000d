"""The config of a run, resolved once: nothing in it is left to the launcher, the base or chance."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from limner import engines
from limner.base_model.base import INDEX, BaseModel
from limner.base_model.find import check_base_name
from limner.base_model.open import open_base
from limner.config.rules import check_config, describe_idle_settings
from limner.config.schema import SETTINGS, Config, DataSettings, ModelSettings
from limner.data import mixture
from limner.data.buckets import make_shapes
from limner.data.listing import check_folder
from limner.data.source import Source
from limner.diffusion import make_objective
from limner.diffusion.base_schedulers import describe_doubts
from limner.diffusion.objective import Objective
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.diffusion.sampler_settings import adapt_to_pipeline
from limner.diffusion.samplers import check_steps
from limner.errors import InputError, IntegrityError
from limner.families import FAMILIES, get_family
from limner.families.family import Family
from limner.features import caches
from limner.protocols import ProcessGroup, Report
from limner.storage import atomic, outputs
from limner.storage import checkpoint as checkpoints
from limner.storage.checkpoint import Checkpoint
from limner.storage.layout import LORA_FILE
from limner.training import push, sinks
from limner.training.batch_plan import draw_seed
from limner.training.result import is_run


def check_places(config: Config, *, own_records: bool = False) -> None:
    """Refuse a base or pictures that are not there, folders that cannot be made, and a run's folder
    with a model in it, before a framework is imported."""
    check_base_name(config.model)
    check_run_folder(Path(config.run), get_family(config))
    outputs.check_folder_place(Path(config.run))
    if config.data.cache not in ("off", "memory"):
        outputs.check_folder_place(caches.cache_folder(config))
    if own_records:
        return
    for folder in (config.data.folder, *(one.folder for one in config.data.sets)):
        if folder is not None:
            check_folder(Path(folder))


def check_run_folder(folder: Path, family: Family) -> None:
    """Refuse a folder with a model that no run has written there: a result would replace it."""
    if is_run(folder) or checkpoints.list_checkpoints(folder):
        return
    for name in (INDEX, LORA_FILE, *family.components):
        if (folder / name).exists():
            raise InputError(
                f"run: {folder} holds {name}, which no run has written there, and a result would "
                "replace it. Choose another folder."
            )


def resolve(config: Config, *, own_records: bool = False) -> tuple[Config, Family]:
    """Check the settings, and settle what the family decides.

    Args:
        own_records: whether records come from the caller, not from the config.

    Raises:
        InputError: for settings that cannot be honoured, or that mean nothing to the family.
    """
    check_config(config, own_records=own_records)
    family = get_family(config)
    if not family.text.inputs:
        config = replace(config, data=replace(config.data, caption=None))
    return config, family


@dataclass(frozen=True)
class Settled:
    """A config in which nothing is left open, and what it names."""

    config: Config
    family: Family
    checkpoint: Checkpoint | None
    source: Source
    base: BaseModel
    objective: Objective


def settle(
    config: Config,
    source: Source | None,
    process: ProcessGroup,
    report: Report,
    *,
    read_only: bool,
) -> Settled:
    """Settle what the config leaves to the launcher, the family, the base, the Hub or chance."""
    config, family = resolve(config, own_records=source is not None)
    for line in describe_idle_settings(config):
        report(line)
    config = replace(config, engine=replace(config.engine, precision=process.precision))  # type: ignore[arg-type]
    config = replace(config, model=settle_paths(config.model))
    checkpoint = find_checkpoint(config, process, report)
    config = settle_seed(config, checkpoint, process, draw=not read_only)
    source = mixture.open_source(config.data, report) if source is None else source
    base = open_base_everywhere(config, family, process)
    process.first(lambda: engines.check_base(config.engine.kind, base, family, report))
    if (problem := base.describe_card_problem()) is not None:
        report(problem)
    config = settle_other_stage(config, base)
    check_sizes(config.data, family, base)
    objective = make_objective(base.configs["scheduler"], config.objective)
    for doubt in describe_doubts(base.configs["scheduler"], objective.prediction_type):
        report(doubt)
    check_previews(config, base, family, objective.prediction_type, report)
    sinks.require_packages(config.log.to)
    if not read_only:
        config = settle_repository(config, process)
    return Settled(config, family, checkpoint, source, base, objective)


def settle_paths(model: ModelSettings) -> ModelSettings:
    """Make the model's paths absolute, so that a run finds its base from any other directory."""
    paths = {}
    for field in fields(ModelSettings):
        name = getattr(model, field.name)
        is_path = SETTINGS[f"model.{field.name}"].declaration.path and name is not None
        # What is not here is a name on the Hub, but for the folder that downloads will make.
        if is_path and name and (field.name == "cache_dir" or Path(name).exists()):
            paths[field.name] = str(Path(name).absolute())
    return replace(model, **paths)


def check_sizes(data: DataSettings, family: Family, base: BaseModel) -> None:
    """Refuse sizes of pictures whose latents the network cannot take."""
    buckets, most = data.buckets, family.images.longest_side(base.configs)
    step, longest = ("data.size", data.size), ("data.size", data.size)
    if buckets is not None:
        step = "data.buckets.step", buckets.step
        shapes = [make_shapes(side, buckets) for side in buckets.resolutions or (data.size,)]
        longest = (
            "data.buckets.largest",
            max(side for sizes in shapes for size in sizes for side in size),
        )
    check_multiple(*step, family, base)
    if longest[1] > most:
        raise InputError(
            f"{longest[0]}: pictures of {longest[1]} pixels a side are longer than the {most} for "
            f"which this base's network has positions; choose at most {most}"
        )


def check_multiple(name: str, pixels: int, family: Family, base: BaseModel) -> None:
    """Refuse sides of which latents, or pictures, would not be whole."""
    multiple = family.images.pixel_multiple(base.configs)
    if pixels % multiple:
        raise InputError(
            f"{name}: {pixels} pixels are no multiple of {multiple}, which family "
            f"{family.name!r} needs; choose {max(1, round(pixels / multiple)) * multiple}"
        )


def check_previews(
    config: Config, base: BaseModel, family: Family, prediction_type: str | None, report: Report
) -> None:
    """Refuse more steps for previews than the scheduler that draws them has timesteps, and a size
    that the pipeline does not draw; say where it is another than that of the crops."""
    if not config.preview.prompts and not config.preview.captions:
        return
    if family.stage is not None and family.stage.prefix:
        # The decoder draws, and it is the other stage.
        if base.other_stage is None:
            return
        base, family = base.other_stage, FAMILIES[family.stage.other_stage]
        prediction_type = base.prediction_type
    pipeline, size = family.pipeline, find_preview_size(config.data)
    if size != config.data.size:
        report(f"previews are of {size} pixels a side: stock pipelines draw multiples of 8")
    check_multiple("data.size, at which previews are drawn", size, family, base)
    class_name = base.scheduler_class
    scheduler = adapt_scheduler(base.configs["scheduler"], class_name, prediction_type)
    scheduler = adapt_to_pipeline(scheduler, pipeline, None)
    check_steps(config.preview.steps, scheduler["_class_name"], scheduler, "preview.steps")


def find_preview_size(data: DataSettings) -> int:
    """Return the pixels a side of previews: stock pipelines draw multiples of 8."""
    return max(8, data.size - data.size % 8)


def find_checkpoint(config: Config, process: ProcessGroup, report: Report) -> Checkpoint | None:
    """The checkpoint to go on from, verified by the first process; None to begin afresh."""
    folder, resume = Path(config.run), config.checkpoint.resume
    found = process.first(lambda: find_resume_point(folder, resume, report))
    return None if found is None else checkpoints.open_verified(Path(found))


def find_resume_point(folder: Path, resume: str, report: Report) -> str | None:
    """The folder of the checkpoint to go on from, verified; None to begin afresh.

    Raises:
        InputError: where ``checkpoint.resume`` forbids to go on, or none is a checkpoint of ours.
        IntegrityError: where all are damaged.
    """
    present = checkpoints.list_checkpoints(folder)
    if resume == "never":
        if present:
            raise InputError(
                f"{folder} holds {present[0].name}. To resume it pass --resume_from_checkpoint "
                "latest (or checkpoint.resume=auto); "
                "to begin afresh choose another folder."
            )
        return None
    which = "latest" if resume == "auto" else resume
    checkpoint = checkpoints.find_checkpoint(folder, which, report)
    if checkpoint is not None:
        return str(checkpoint.folder)
    if any((one / atomic.MANIFEST).exists() for one in present):
        raise IntegrityError(
            f"{folder}: every checkpoint is damaged, from {present[0].name} to {present[-1].name}. "
            "Put one back from a copy, choose another folder, or move these away to begin afresh."
        )
    if present:
        raise InputError(
            f"{folder} holds {present[0].name}, but no checkpoint that can be resumed. Choose "
            "another folder, or move these away to begin afresh."
        )
    if resume == "latest":
        report(f"{folder}: there is no checkpoint yet; beginning afresh")
    return None


def settle_seed(
    config: Config, checkpoint: Checkpoint | None, process: ProcessGroup, *, draw: bool
) -> Config:
    """Draw a seed for a run that was given none, or with ``draw`` off take 0; a resumed run keeps
    that of its checkpoint.

    Another seed than the checkpoint's stays in the config: the plan refuses it.
    """
    seed = config.train.seed
    if seed is None and checkpoint is not None:
        seed = checkpoint.state.seed
    if seed is None:
        seed = process.first(draw_seed) if draw else 0
    return replace(config, train=replace(config.train, seed=seed))


def open_base_everywhere(config: Config, family: Family, process: ProcessGroup) -> BaseModel:
    """Open the base in every process; the first one downloads what is not there."""
    for_generation = bool(config.preview.prompts or config.preview.captions)
    process.first(
        lambda: str(open_base(config.model, family, for_generation=for_generation).folder)
    )
    return open_base(config.model, family, for_generation=for_generation)


def settle_other_stage(config: Config, base: BaseModel) -> Config:
    """Name the other stage, which lies in the base's own folder where none is given."""
    if base.other_stage is None or config.model.other_stage is not None:
        return config
    return replace(config, model=replace(config.model, other_stage=config.model.base))


def settle_repository(config: Config, process: ProcessGroup) -> Config:
    """Make sure that the result can be pushed, and put the repository's full name in."""
    hub, private = config.export.hub, config.export.private
    if hub is None:
        return config
    full_name = process.first(lambda: push.check_push(hub, private))
    return replace(config, export=replace(config.export, hub=full_name))
