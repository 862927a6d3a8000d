"""What every test stands on: one thread, no network, a cache and an environment of its own, and two
small folders that are built once; and the quick tests, for which no framework is imported."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from refusal import Refusal

LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)
PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "DEEPSPEED_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI_",
    "MV2_",
    "WANDB_",
    "COMET_",
    "LIMNER_",
)
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")
FRAMEWORKS = ("torch", "jax", "diffusers", "transformers", "accelerate", "peft")
MODELS = {"base", "sd", "sd_fp16", "sdxl", "sd3", "kandinsky"}  # fixtures, below
LONG = (
    "test_jax",
    "test_jax_training",
    "test_jax_processes",
    "test_guide",
    "test_resume",
    "test_golden",
    "test_world_size",
    "test_kandinsky",
    "test_same_picture",
    "test_bench",
    "test_compile_cache",
    "test_lost_process",
)
WHOLE_FILE = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.frameworks\b", re.MULTILINE)


def stranger(name: str) -> bool:
    """Whether a variable of the shell would change what the tests see."""
    return name in LAUNCHERS + TOKENS or name.startswith(PREFIXES)


for name in filter(stranger, list(os.environ)):
    del os.environ[name]
# Equal numbers need an equal number of threads. PyTorch reads theirs when it is imported; where
# that has happened already, it is told.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
compiled = tempfile.TemporaryDirectory(
    prefix="limner-compiled-"
)  # what JAX has compiled once, no test and no process of this worker compiles again
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_PLATFORMS": "cpu",
}
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For fixtures that outlive a test."""
    os.environ["LIMNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(autouse=True)
def environment(shared_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own; whatever a test or a library sets is taken back."""
    before = dict(os.environ)
    os.environ["LIMNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; only read it."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures; only read them."""
    return tiny.pictures(tmp_path_factory.mktemp("pictures") / "discs", 12)


@pytest.fixture(scope="session")
def sd(base: Path) -> Path:
    """The tiny Stable Diffusion again; copy it before changing anything in it."""
    return base


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "sdxl")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3.5."""
    return tiny.stable_diffusion_3(tmp_path_factory.mktemp("sd3") / "sd3")


@pytest.fixture(scope="session")
def kandinsky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kandinsky 2.2: ``prior`` and ``decoder``."""
    return tiny.kandinsky22(tmp_path_factory.mktemp("k22") / "kandinsky")


@pytest.fixture(scope="session")
def sd_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in half precision, only as variant fp16, its UNet in several files."""
    import torch

    return tiny.stable_diffusion(
        tmp_path_factory.mktemp("sd16") / "model",
        dtype=torch.float16,
        variant="fp16",
        shard="700KB",
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=10, help="how many times the resume tests kill a run (10)"
    )
    parser.addoption(
        "--cuda", action="store_true", help="let tests see the GPUs, on which other laws hold"
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="only the tests that import no framework; they fail where one is imported",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With ``--quick``, a test or a file of tests that imports a framework fails.

    Without ``--cuda`` all tests run on the CPU.
    """
    if not config.option.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.option.quick:
        config.option.markexpr = "not frameworks and not soak"
        advice = "mark it with pytest.mark.frameworks, or do without"
        sys.meta_path.insert(0, Refusal(FRAMEWORKS, advice))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--quick``, files that need a framework as a whole are not opened."""
    if config.option.quick and collection_path.suffix == ".py":
        return bool(WHOLE_FILE.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that is given a tiny model needs the framework which makes it; files that take long
    begin first, so that at the end no worker waits for another."""
    for item in items:
        if not MODELS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("frameworks")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
