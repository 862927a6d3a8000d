"""Rules about several settings together."""

from limner.config.schema import BucketSettings, Config, DataSetSettings
from limner.errors import InputError


def check_config(config: Config, *, own_records: bool = False) -> None:
    """Refuse what cannot be honoured, before anything is loaded.

    Raises:
        InputError: naming the settings, what was given and what is expected.
    """
    t, d, o = config.train, config.data, config.optim
    refuse = [
        (
            not config.model.base,
            "model.base: give a folder or a Hub repository in the diffusers layout, e.g. "
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        (
            not own_records and (d.folder is not None) + (d.hub is not None) + bool(d.sets) != 1,
            "data: give exactly one of data.folder, data.hub and data.sets; data.folder=none "
            "takes the recipe's away",
        ),
        (
            (t.steps is None) == (t.epochs is None),
            "train: give exactly one of train.steps and train.epochs",
        ),
        (
            t.batch_size is not None and t.accumulation_steps is not None,
            "train: give train.batch_size (global) or train.accumulation_steps, not both",
        ),
        (
            t.batch_size is None and t.micro_batch_size is None,
            "train: give train.batch_size (global: what one optimizer step sees), or "
            "train.micro_batch_size",
        ),
        (
            d.crop_variants is not None and d.crop != "random",
            'data.crop_variants: only a random crop comes in several; set data.crop="random" or '
            "leave "
            "data.crop_variants out",
        ),
        (
            t.seed is not None and not 0 <= t.seed < 2**63,
            f"train.seed: {t.seed} is not within 0 to 2**63 - 1",
        ),
        (
            not 0 <= d.drop_caption <= 1,
            f"data.drop_caption: {d.drop_caption} is not a probability, 0 to 1",
        ),
        (
            o.ema is not None and not 0 <= o.ema < 1,
            f"optim.ema: {o.ema} is not a decay, 0 to below 1",
        ),
        (
            not all(0 <= b < 1 for b in o.betas),
            f"optim.betas: {o.betas} are not both within 0 to below 1",
        ),
        (
            config.objective.min_snr is not None and config.objective.min_snr <= 0,
            f"objective.min_snr: {config.objective.min_snr} is not above 0",
        ),
        (
            config.adapter.text_encoders and config.adapter.kind != "lora",
            'adapter.text_encoders: text encoders learn by adapters only; set adapter.kind="lora"',
        ),
        (
            not 0 <= config.adapter.dropout < 1,
            f"adapter.dropout: {config.adapter.dropout} is not within 0 to below 1",
        ),
        (
            config.preview.every is not None and config.preview.every_epochs is not None,
            "preview: give preview.every (steps) or preview.every_epochs, not both",
        ),
    ]
    positive = [
        "train.steps",
        "train.epochs",
        "train.batch_size",
        "train.micro_batch_size",
        "train.accumulation_steps",
        "data.size",
        "data.max_records",
        "data.crop_variants",
        "data.threads",
        "data.caption_chunks",
    ]
    positive += [
        "data.max_pixels",
        "adapter.rank",
        "adapter.alpha",
        "optim.learning_rate",
        "optim.cycles",
        "optim.eps",
        "optim.max_grad_norm",
    ]
    positive += [
        "engine.devices",
        "engine.fsdp",
        "engine.encode_batch",
        "checkpoint.every",
        "checkpoint.keep",
        "preview.count",
        "preview.every",
        "preview.every_epochs",
        "preview.steps",
    ]
    positive += ["data.caption_chunks", "validation.every", "validation.timesteps", "log.every"]
    not_negative = [
        "optim.warmup",
        "optim.weight_decay",
        "validation.hold_out",
        "objective.noise_offset",
        "objective.input_perturbation",
        "objective.dream",
    ]
    refuse += [
        ((v := config[k]) is not None and v <= 0, f"{k}: {config[k]} is not above 0")
        for k in positive
    ]
    refuse += [
        ((v := config[k]) is not None and v < 0, f"{k}: {config[k]} is below 0")
        for k in not_negative
    ]
    refuse += check_mixture(d.sets) + (check_buckets(d.buckets) if d.buckets is not None else [])
    if problems := [text for wrong, text in refuse if wrong]:
        raise InputError("\n".join(problems))


def check_mixture(sets: tuple[DataSetSettings, ...]) -> list[tuple[bool, str]]:
    """What is wrong with several data sets: (whether it is, message)."""
    weighted = [one.weight is not None for one in sets]
    rules = [
        (
            any(weighted) and not all(weighted),
            "data.sets: give a weight to every data set, or to none",
        )
    ]
    for i, one in enumerate(sets):
        name = f"data.sets[{i}]"
        rules += [
            (
                (one.folder is None) == (one.hub is None),
                f"{name}: give exactly one of folder and hub",
            ),
            (
                one.repeats < 1,
                f"{name}.repeats: {one.repeats} is below 1; leave a data set out to have none of "
                "it",
            ),
            (
                one.weight is not None and one.weight <= 0,
                f"{name}.weight: {one.weight} is not above 0; leave a data set out to have none "
                "of it",
            ),
            (
                one.weight is not None and one.repeats != 1,
                f"{name}: a weight says already how often its records come; give weight or repeats",
            ),
        ]
    return rules


def check_buckets(b: BucketSettings) -> list[tuple[bool, str]]:
    """What is wrong with buckets: (whether it is, message)."""
    smallest, largest = b.smallest, b.largest
    return [
        (
            b.step <= 0 or b.step % 8 != 0,
            f"data.buckets.step: {b.step} is not a multiple of 8 above 0; latents have an eighth "
            "of a picture's sides",
        ),
        (
            smallest is not None and smallest <= 0,
            f"data.buckets.smallest: {smallest} is not above 0",
        ),
        (
            largest is not None and largest < (smallest or 1),
            f"data.buckets.largest: {largest} is below the smallest side, {smallest or 1}",
        ),
        (
            any(r <= 0 for r in b.resolutions),
            f"data.buckets.resolutions: {list(b.resolutions)} are not all above 0",
        ),
        (
            len(set(b.resolutions)) < len(b.resolutions),
            f"data.buckets.resolutions: {list(b.resolutions)} has one of them twice",
        ),
    ]
