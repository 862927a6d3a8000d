"""The same recipe in both engines, side by side: images a second of steps that are compiled, and
seconds that compiling takes, cold and from the cache.

    python benchmarks/engines.py RECIPE [section.key=value ...] [--steps 20] [--rounds 2]

Each measurement is `limner bench` in a process of its own. Rounds go torch, jax, jax, torch, so
that a drifting clock falls out; the first of JAX's has an empty cache of compiled programs.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def measured(
    recipe: str, words: list[str], steps: int, folder: Path, engine: str
) -> tuple[float, float]:
    """Images a second, and seconds of compiling."""
    report = folder / "figures.json"
    own = [f'engine.kind="{engine}"', f'engine.compile_cache="{folder / "compiled"}"']
    command = [
        sys.executable,
        "-m",
        "limner",
        "bench",
        recipe,
        *words,
        *own,
        "--steps",
        str(steps),
        "--json",
        str(report),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took = re.search(r"compiled the step .* in ([\d.]+) s", done.stdout + done.stderr)
    return json.loads(report.read_text())["images_per_second"], float(took[1]) if took else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_intermixed_args()
    rates: dict[str, list[float]] = {"torch": [], "jax": []}
    compiling = []
    with tempfile.TemporaryDirectory() as name:
        for engine in ["torch", "jax", "jax", "torch"] * a.rounds:
            rate, seconds = measured(a.recipe, a.overrides, a.steps, Path(name), engine)
            rates[engine].append(rate)
            compiling += [seconds] if engine == "jax" else []
            print(
                f"{engine}: {rate:.4g} images/s"
                + f", compiled in {seconds:.1f} s" * (engine == "jax"),
                flush=True,
            )
    torch, jax = (statistics.median(rates[engine]) for engine in ("torch", "jax"))
    cold, warm = compiling[0], statistics.median(compiling[1:])
    print(f"median: torch {torch:.4g}, jax {jax:.4g} images/s, ratio {jax / torch:.2f}")
    print(f"compiled in {cold:.1f} s, then, from the cache, in {warm:.1f} s")


if __name__ == "__main__":
    main()
