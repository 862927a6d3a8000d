"""The safety checker that some bases have: it blackens the pictures that it finds unsafe."""

from collections.abc import Sequence
from pathlib import Path

from limner.base_model.configs import list_components
from limner.base_model.weight_files import has_usable_weights, list_files
from limner.engines.pictures import name_flagged, say_part
from limner.engines.torch.encoders import TorchEncoders
from limner.engines.torch.weights import check_component
from limner.json_types import Plain
from limner.protocols import Report


def has_safety_checker(index: Plain, folder: Path, variant: str | None, report: Report) -> bool:
    """Return whether a model has a safety checker that can be loaded, and say why it cannot.

    Args:
        index: the model's model_index.json.
        folder: of the model.
    """
    components = list_components(index)
    if "safety_checker" not in components:
        return False
    folder = folder / "safety_checker"
    library = components["safety_checker"][0]
    if "feature_extractor" not in components:
        report(f"{folder}: pictures are drawn without it: the base has no feature_extractor for it")
        return False
    if has_usable_weights("safety_checker", list_files(folder), variant, library):
        return True
    report(
        f"{folder}: it has no weights in safetensors, and pickles are never opened: pictures are "
        "drawn without this safety checker"
    )
    return False


def load_safety_checker(encoders: TorchEncoders) -> Plain:
    """Return what a stock pipeline takes to check its pictures.

    Raises:
        InputError: when the checker's arrays are not those of its config.
    """
    base, name = encoders.base, "safety_checker"
    check_component(base.component_folder(name), *base.component_class(name), base.variant)
    names = (name, "feature_extractor")
    return {name: encoders.component(name) for name in names} | {"requires_safety_checker": True}


def report_blackened(
    prompts: Sequence[str], seeds: Sequence[int], flags: Sequence[bool], report: Report
) -> None:
    """Say which pictures the safety checker has blackened.

    Args:
        flags: of each picture, whether it has.
    """
    if any(flags):
        report(
            f"{say_part(flags, 'is', 'are')} black, because the base's safety checker found "
            f"{'it' if sum(flags) == 1 else 'them'} unsafe: {name_flagged(prompts, seeds, flags)}. "
            "Without it: --no-safety-checker, or preview.safety_checker=false for previews"
        )
