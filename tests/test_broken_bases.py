"""Whatever is wrong with a base ends in one message: 3,000 of them by number (``make soak``)."""

import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from broken_bases import break_base

from limner import engines
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings, ObjectiveSettings
from limner.diffusion import make_objective
from limner.diffusion.base_schedulers import describe_doubts
from limner.errors import InputError
from limner.families import FAMILIES

pytestmark = pytest.mark.frameworks
BASES, SLICE = 3000, 50
STAGES = (("prior", "decoder"), ("decoder", "prior"))
MOST_SECONDS = 5.0  # of CPU time, for one base


def judge(base: Path, kind: str, family: str, other_stage: Path | None) -> str:
    """Return "taken", or the message of the refusal; anything else is raised."""
    record = FAMILIES[family]
    model = ModelSettings(str(base), family, other_stage=other_stage and str(other_stage))
    try:
        opened = open_base(model, record)
        engines.check_base(kind, opened, record)
        objective = make_objective(opened.configs["scheduler"], ObjectiveSettings())
        describe_doubts(opened.configs["scheduler"], objective.prediction_type)
        opened.fingerprint(*record.feature_components)
        opened.read_card_metadata()
        return opened.describe_card_problem() or "taken"
    except InputError as error:
        return str(error)


def judge_number(number: int, sources: dict[str, Path], folder: Path) -> str:
    """Break a base of some family by number, and judge it as some engine does."""
    names = ("sd", "sd", "sd3", "sd", "kandinsky22-prior", "sd", "kandinsky22-decoder", "sdxl")
    family = names[number % len(names)]
    kind = "jax" if number % 16 in (0, 15) else "torch"
    base = break_base(sources[family], folder / "base", number)
    others = {f"kandinsky22-{one}": f"kandinsky22-{other}" for one, other in STAGES}
    began = time.process_time()
    try:
        return judge(base, kind, family, sources.get(others.get(family, "")))
    finally:
        assert time.process_time() - began < MOST_SECONDS, number
        shutil.rmtree(base)


@pytest.fixture(scope="module")
def sources(sd: Path, sdxl: Path, sd3: Path, kandinsky: Path) -> dict[str, Path]:
    return {
        "sd": sd,
        "sdxl": sdxl,
        "sd3": sd3,
        "kandinsky22-prior": kandinsky / "prior",
        "kandinsky22-decoder": kandinsky / "decoder",
    }


@pytest.fixture(scope="module", autouse=True)
def whole(sources: dict[str, Path]) -> None:
    """The bases are taken before they are broken, and what is imported is there."""
    for family, base in sources.items():
        other = sources.get(next((f"kandinsky22-{b}" for a, b in STAGES if family.endswith(a)), ""))
        assert judge(base, "torch", family, other) == "taken"
    assert judge(sources["sd"], "jax", "sd", None) == "taken"


def judge_all(numbers: range, sources: dict[str, Path], folder: Path) -> Counter[str]:
    """Count what is taken and refused; each refusal is one line of a bearable length."""
    counts: Counter[str] = Counter()
    for number in numbers:
        try:
            verdict = judge_number(number, sources, folder)
        except Exception as error:
            raise AssertionError(f"base {number} ends in a traceback") from error
        assert len(verdict) < 3000, (number, verdict)
        counts["taken" if verdict == "taken" else "refused"] += 1
    return counts


@pytest.mark.filterwarnings("ignore")  # the libraries warn of what is refused right afterwards
def test_some_broken_bases(sources: dict[str, Path], tmp_path: Path) -> None:
    counts = judge_all(range(SLICE), sources, tmp_path)
    assert counts["refused"] > counts["taken"] > 0, counts


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(6))
def test_all_broken_bases(part: int, sources: dict[str, Path], tmp_path: Path) -> None:
    size = BASES // 6
    counts = judge_all(range(part * size, (part + 1) * size), sources, tmp_path)
    print(counts)
