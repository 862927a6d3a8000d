"""The table of the sampler that a base draws with, as its stock pipeline would."""

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.diffusion import make_objective
from limner.diffusion.sampler_settings import adapt_to_pipeline
from limner.diffusion.samplers import SamplerTable, make_table
from limner.families.family import Family


def make_base_table(
    base: BaseModel,
    family: Family,
    steps: int,
    *,
    name: str | None = None,
    prediction_type: str | None = None,
) -> SamplerTable:
    """Return the table of a base's own sampler, or of one by name; see ``samplers.make_table``.

    Raises:
        InputError: for a sampler, a setting or a number of steps without a table.
    """
    # The index decides on the class: old configs name that of Flax.
    class_name = base.scheduler_class
    config = base.configs["scheduler"] | {"_class_name": class_name}
    config = adapt_to_pipeline(config, family.pipeline, name)
    return make_table(config, steps, name, prediction_type)


def check_previews(config: Config, base: BaseModel, family: Family) -> None:
    """Refuse previews that there is no table for.

    Raises:
        InputError: see ``make_base_table``.
    """
    if config.preview.prompts or config.preview.captions:
        objective = make_objective(base.configs["scheduler"], config.objective)
        steps, predict = config.preview.steps, objective.prediction_type
        make_base_table(base, family, steps, prediction_type=predict)
