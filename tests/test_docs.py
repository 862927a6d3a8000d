"""The Python in the documentation runs, on a tiny model in place of the big one."""

import re
from pathlib import Path

import pytest

from limner.config.reference import format_reference
from limner.storage import checkpoint
from limner.training import sinks

pytestmark = pytest.mark.frameworks

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    (path.name, block)
    for path in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_block_runs(base, tmp_path, monkeypatch, name, block):
    recipes = DOCS.parent / "recipes"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(recipes)
    smaller = (
        '"train.steps=3", "data.size=32", "train.batch_size=4", "train.micro_batch_size=4", '
        '"engine.precision=no", "log.every=1", "preview.prompts=[]"'
    )
    block = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(base)).replace(
        '"train.steps=100"', smaller
    )
    exec(compile(block, name, "exec"), {"__name__": name})
    [run] = (tmp_path / "runs").iterdir()
    assert checkpoint.find_latest(run).step == 3
    assert len([row for row in sinks.read_metrics(run / "metrics.jsonl") if "loss" in row]) == 3
    assert (run / "pytorch_lora_weights.safetensors").exists()


def test_the_page_of_settings_is_that_of_the_declarations() -> None:
    """``python -m limner.config.reference docs/settings.md`` makes it anew."""
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == format_reference()
