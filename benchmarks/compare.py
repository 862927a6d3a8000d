"""How many images a second Limner and diffusers' script train on, side by side: same base,
pictures, batch, steps, float32 on the CPU.

    python benchmarks/compare.py SCRIPT BASE PICTURES WORK

Three ways, in the order A B C C B A so that a drifting clock falls out: diffusers' script; Limner
with the frozen encoders in every step (equal work); Limner as it is by default, every picture and
caption encoded once, before the first step.
"""

import argparse
import json
import os
import statistics
from dataclasses import asdict

import sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=30)
    a = parser.parse_args()
    s = sides.settings(a, a.steps)
    pictures = sides.copy_pictures(
        a.pictures, a.work / "pictures", sides.read_rows(a.pictures)[: a.limit]
    )
    ways = {
        "diffusers' script": lambda out: sides.run_diffusers(a.script, a.base, pictures, out, s, 0),
        "Limner, equal work": lambda out: sides.run_limner(
            a.base, pictures, out, s, 0, cache="off"
        ),
        "Limner, default": lambda out: sides.run_limner(
            a.base, pictures, out, s, 0, cache=str(out.parent / f"cache-{out.name}")
        ),
    }
    traces: dict[str, list[sides.Trace]] = {name: [] for name in ways}
    for i, name in enumerate([*ways, *reversed(ways)]):
        traces[name].append(ways[name](a.work / f"run-{i}"))
        print(
            f"{name}: {s.batch / traces[name][-1].step_seconds:.3g} images/s, "
            f"{traces[name][-1].wall_seconds:.1f} s in all",
            flush=True,
        )
    rates = {
        name: [s.batch / trace.step_seconds for trace in both] for name, both in traces.items()
    }
    first = statistics.mean(rates["diffusers' script"])
    print(f"\n{'':20} images/s (both runs)   ratio   whole command, s")
    for name, both in rates.items():
        seconds = " ".join(f"{trace.wall_seconds:.1f}" for trace in traces[name])
        print(
            f"{name:20} {both[0]:8.3g} {both[1]:8.3g}     {statistics.mean(both) / first:7.2f}   "
            f"{seconds}"
        )
    load = os.getloadavg()[0]
    print(
        f"load of the machine at the end: {load:.1f} on {os.cpu_count()} cores, of which this "
        f"comparison is up to {a.threads}"
    )
    if a.json:
        walls = {name: [trace.wall_seconds for trace in both] for name, both in traces.items()}
        report = {
            "settings": asdict(s),
            "load": load,
            "images_per_second": rates,
            "wall_seconds": walls,
        }
        a.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
