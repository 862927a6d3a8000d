"""Draws the demo's 60 captioned pictures: everyday things as white and cyan blueprints, a style the
bundled model does not know.

    python model/draw_demo.py src/limner/bundled/pictures --sheet sheet.png

Each thing is drawn three times: plain, with something to it, and small. Place, size and tilt vary a
little.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from limner import rng
from limner.storage import atomic
from limner.storage.atomic import MANIFEST

SIDE, SCALE = 64, 4
PAPER, GRID, LINE, THIN = (18, 52, 118), (40, 80, 150), (244, 250, 255), (110, 205, 240)
Points = list[tuple[float, float]]


class Pen:
    """Draws on a sheet in coordinates from -1 to 1 (y downwards), turned, scaled and moved."""

    def __init__(self, size: float, turn: float, x: float, y: float) -> None:
        self.image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        for at in range(4, SIDE, 8):
            self.draw.line([(at * SCALE, 0), (at * SCALE, SIDE * SCALE)], GRID, 3)
            self.draw.line([(0, at * SCALE), (SIDE * SCALE, at * SCALE)], GRID, 3)
        self.size, self.cos, self.sin, self.x, self.y = size, math.cos(turn), math.sin(turn), x, y

    def place(self, x: float, y: float) -> tuple[float, float]:
        half = SIDE * SCALE / 2
        u, v = x * self.cos - y * self.sin, x * self.sin + y * self.cos
        return half * (1 + self.x + self.size * u), half * (1 + self.y + self.size * v)

    def path(
        self, points: Points, *, closed: bool = False, thin: bool = False, hide: bool = False
    ) -> None:
        """A line through points; ``hide`` first covers what lies inside it with paper."""
        placed = [self.place(*p) for p in points]
        placed += placed[:1] if closed else []
        if hide:
            self.draw.polygon(placed, PAPER)
        width, color = (5, THIN) if thin else (8, LINE)
        self.draw.line(placed, color, width, joint="curve")
        for x, y in placed:
            self.draw.ellipse(
                [
                    x - width / 2 + 0.5,
                    y - width / 2 + 0.5,
                    x + width / 2 - 0.5,
                    y + width / 2 - 0.5,
                ],
                color,
            )

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float | None = None,
        begin: float = 0,
        end: float = 360,
        **how: bool,
    ) -> None:
        """An ellipse, or the part of it from one angle to another (degrees, clockwise from the
        right)."""
        whole = end - begin == 360
        angles = np.radians(np.linspace(begin, end, 61)[: 60 if whole else 61])
        self.path(
            [(x + rx * math.cos(t), y + (ry or rx) * math.sin(t)) for t in angles],
            closed=whole,
            **how,
        )

    def curve(self, *controls: tuple[float, float], **how: bool) -> None:
        """Cubic Bezier curves: a start, then three points for each."""
        points = [controls[0]]
        for i in range(1, len(controls), 3):
            a, b, c, d = points[-1], *controls[i : i + 3]
            for t in np.linspace(0, 1, 25)[1:]:
                w = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                points.append(
                    tuple(
                        sum(k * p[axis] for k, p in zip(w, (a, b, c, d), strict=True))
                        for axis in (0, 1)
                    )
                )
        self.path(points, **how)

    def heart(self, x: float, y: float, s: float, **how: bool) -> None:
        right = [
            (0, -0.45),
            (0.15, -0.95),
            (0.95, -0.95),
            (0.95, -0.3),
            (0.95, 0.2),
            (0.3, 0.5),
            (0, 0.9),
        ]
        shape = right + [(-u, v) for u, v in reversed(right[:-1])]
        self.curve(*[(x + s * u, y + s * v) for u, v in shape], **how)

    def star(self, x: float, y: float, s: float, **how: bool) -> None:
        radii = [s, s * 0.42] * 5
        self.path(
            [
                (x + r * math.sin(i * math.pi / 5), y - r * math.cos(i * math.pi / 5))
                for i, r in enumerate(radii)
            ],
            closed=True,
            **how,
        )

    def rays(
        self,
        x: float,
        y: float,
        inner: float,
        outer: float,
        count: int,
        begin: float = 0,
        end: float = 360,
        **how: bool,
    ) -> None:
        for t in np.radians(np.linspace(begin, end, count, endpoint=end - begin != 360)):
            self.path([(x + r * math.cos(t), y + r * math.sin(t)) for r in (inner, outer)], **how)


def box(x: float, y: float, w: float, h: float) -> Points:
    """The corners of a rectangle, from its top left."""
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def apple(pen: Pen, extra: bool) -> None:
    right = [
        (0, -0.4),
        (0.3, -0.75),
        (0.85, -0.55),
        (0.85, 0.05),
        (0.85, 0.6),
        (0.4, 1.0),
        (0, 0.8),
    ]
    pen.curve(*right, *[(-u, v) for u, v in reversed(right[:-1])])
    pen.curve((0, -0.4), (0, -0.6), (0.03, -0.75), (0.12, -0.9))
    pen.oval(-0.4, 0.1, 0.22, 0.3, 150, 230, thin=True)
    if extra:
        pen.curve(
            (0.1, -0.65),
            (0.2, -1.0),
            (0.5, -1.0),
            (0.7, -0.95),
            (0.65, -0.7),
            (0.4, -0.55),
            (0.1, -0.65),
            thin=True,
        )


def house(pen: Pen, extra: bool) -> None:
    if extra:
        pen.path([(0.4, -0.5), (0.4, -0.85), (0.65, -0.85), (0.65, -0.3)])
    pen.path(box(-0.7, -0.05, 1.4, 0.9), closed=True)
    pen.path([(-0.95, -0.05), (0, -0.9), (0.95, -0.05)], closed=True, hide=True)
    pen.path([(-0.45, 0.85), (-0.45, 0.3), (-0.1, 0.3), (-0.1, 0.85)], thin=True)
    pen.path(box(0.2, 0.2, 0.32, 0.3), closed=True, thin=True)


def star(pen: Pen, extra: bool) -> None:
    pen.star(0, 0.05, 0.72 if extra else 1.0)
    if extra:
        pen.oval(0, 0.02, 0.95, thin=True)


def heart(pen: Pen, extra: bool) -> None:
    pen.heart(0, 0, 0.95)
    if extra:
        pen.path([(-0.95, 0.55), (0.9, -0.5)], thin=True)
        pen.path([(0.6, -0.55), (0.9, -0.5), (0.8, -0.2)], thin=True)
    else:
        pen.oval(-0.42, -0.3, 0.25, 0.25, 170, 260, thin=True)


def sun(pen: Pen, extra: bool) -> None:
    pen.oval(0, 0, 0.52)
    pen.rays(0, 0, 0.7, 0.98, 12, thin=True)
    if extra:
        pen.path([(-0.18, -0.15), (-0.18, -0.08)])
        pen.path([(0.18, -0.15), (0.18, -0.08)])
        pen.oval(0, 0.05, 0.25, 0.2, 20, 160)


def moon(pen: Pen, extra: bool) -> None:
    pen.curve(
        (0.25, -0.9),
        (-0.9, -0.85),
        (-0.9, 0.85),
        (0.25, 0.9),
        (-0.3, 0.5),
        (-0.3, -0.5),
        (0.25, -0.9),
        closed=True,
    )
    if extra:
        pen.star(0.55, -0.15, 0.36, thin=True)


def tree(pen: Pen, extra: bool) -> None:
    pen.path([(-0.14, 0.35), (-0.2, 0.95), (0.2, 0.95), (0.14, 0.35)])
    left = [
        (-0.2, 0.4),
        (-0.9, 0.6),
        (-1.0, -0.15),
        (-0.55, -0.2),
        (-0.75, -0.8),
        (-0.1, -1.1),
        (0.1, -0.8),
    ]
    right = [(0.7, -1.0), (0.9, -0.4), (0.6, -0.2), (1.05, -0.05), (0.8, 0.6), (0.2, 0.4)]
    pen.curve(*left, *right, closed=True, hide=True)
    if extra:
        for x, y in ((-0.4, 0.1), (0.05, -0.4), (0.42, 0.08)):
            pen.oval(x, y, 0.12, thin=True)
    else:
        pen.oval(-0.25, -0.35, 0.25, 0.25, 160, 260, thin=True)


def car(pen: Pen, extra: bool) -> None:
    roof = [(-0.6, -0.02), (-0.35, -0.45), (0.35, -0.45), (0.6, -0.02)]
    pen.path([(-0.95, 0.4), (-0.95, 0.05), *roof, (0.95, 0.08), (0.95, 0.4)], closed=True)
    pen.path([(-0.4, 0.0), (-0.24, -0.28), (-0.02, -0.28), (-0.02, 0.0)], closed=True, thin=True)
    pen.path([(0.14, 0.0), (0.14, -0.28), (0.26, -0.28), (0.42, 0.0)], closed=True, thin=True)
    for x in (-0.52, 0.52):
        pen.oval(x, 0.42, 0.22, hide=True)
        pen.oval(x, 0.42, 0.05, thin=True)
    if extra:
        pen.path(box(-0.3, -0.85, 0.6, 0.36), closed=True, thin=True)


def clock(pen: Pen, extra: bool) -> None:
    if extra:
        for x in (-0.5, 0.5):
            pen.oval(x, -0.65, 0.26, thin=True)
            pen.path([(x * 0.8, 0.6), (x * 1.2, 0.95)])
    pen.oval(0, 0.08, 0.72 if extra else 0.9, hide=True)
    pen.rays(0, 0.08, 0.55 if extra else 0.7, 0.62 if extra else 0.78, 12, thin=True)
    pen.path([(0, -0.38), (0, 0.08), (0.32, 0.24)])


def cup(pen: Pen, extra: bool) -> None:
    bottom = [
        (-0.65, 0.6),
        (-0.5, 0.75),
        (-0.35, 0.8),
        (-0.2, 0.82),
        (0.1, 0.82),
        (0.25, 0.8),
        (0.4, 0.75),
        (0.55, 0.6),
    ]
    pen.path([(-0.65, -0.25), *bottom, (0.55, -0.25)], closed=True)
    pen.oval(0.58, 0.1, 0.3, 0.3, -80, 110)
    pen.path([(-0.85, 0.95), (0.75, 0.95)], thin=True)
    if extra:
        for x in (-0.35, -0.05, 0.25):
            pen.curve((x, -0.42), (x - 0.15, -0.6), (x + 0.15, -0.75), (x, -0.95), thin=True)


def fish(pen: Pen, extra: bool) -> None:
    pen.path([(0.5, 0.0), (0.95, -0.45), (0.88, 0.0), (0.95, 0.45)], closed=True)
    pen.curve(
        (0.6, 0),
        (0.2, -0.75),
        (-0.6, -0.6),
        (-0.95, 0.0),
        (-0.6, 0.6),
        (0.2, 0.75),
        (0.6, 0),
        closed=True,
        hide=True,
    )
    pen.oval(-0.58, -0.1, 0.06)
    pen.oval(-0.5, 0, 0.3, 0.42, -50, 50, thin=True)
    pen.oval(-0.1, 0, 0.2, 0.25, -60, 60, thin=True)
    if extra:
        for x, y, r in ((-0.85, -0.5, 0.1), (-0.65, -0.8, 0.13), (-0.98, -0.85, 0.07)):
            pen.oval(x, y, r, thin=True)


def key(pen: Pen, extra: bool) -> None:
    pen.path([(-0.2, 0), (0.95, 0), (0.95, 0.32)])
    pen.path([(0.62, 0), (0.62, 0.26)])
    pen.oval(-0.52, 0, 0.36, hide=True)
    pen.oval(-0.52, 0, 0.14, thin=True)
    if extra:
        pen.oval(-0.72, 0.42, 0.36, thin=True)


def letter(pen: Pen, extra: bool) -> None:
    pen.path(box(-0.95, -0.6, 1.9, 1.25), closed=True)
    pen.path([(-0.95, 0.65), (-0.25, 0.0)], thin=True)
    pen.path([(0.95, 0.65), (0.25, 0.0)], thin=True)
    pen.path([(-0.95, -0.6), (0, 0.18), (0.95, -0.6)])
    if extra:
        pen.heart(0, 0.15, 0.26, hide=True)


def umbrella(pen: Pen, extra: bool) -> None:
    pen.path([(0, -0.75), (0, 0.65)])
    pen.oval(0.17, 0.68, 0.17, 0.22, 0, 180)
    rim = [(0.95, 0.05), (0.8, -0.12), (0.48, -0.12), (0.32, 0.05), (0.2, -0.12)]
    rim += [(-u, v) for u, v in reversed(rim)]
    pen.curve((-0.95, 0.05), (-0.9, -0.95), (0.9, -0.95), *rim, closed=True, hide=True)
    pen.curve(
        (-0.32, 0.05),
        (-0.32, -0.3),
        (-0.15, -0.6),
        (0, -0.7),
        (0.15, -0.6),
        (0.32, -0.3),
        (0.32, 0.05),
        thin=True,
    )
    if extra:
        for x, y in ((-0.75, 0.45), (-0.4, 0.7), (0.6, 0.45), (0.85, 0.75)):
            pen.path([(x, y), (x - 0.08, y + 0.22)], thin=True)


def flower(pen: Pen, extra: bool) -> None:
    top = -0.38
    pen.path([(0, top), (0, 0.5 if extra else 0.95)])
    pen.curve(
        (0, 0.45),
        (0.1, 0.1),
        (0.45, 0.05),
        (0.6, 0.1),
        (0.5, 0.4),
        (0.2, 0.5),
        (0, 0.45),
        thin=True,
    )
    for t in np.radians(np.arange(0, 360, 60) + 30):
        pen.oval(0.36 * math.cos(t), top + 0.36 * math.sin(t), 0.21, hide=True)
    pen.oval(0, top, 0.19, hide=True, thin=True)
    if extra:
        pen.path([(-0.42, 0.5), (0.42, 0.5), (0.3, 0.98), (-0.3, 0.98)], closed=True, hide=True)


def boat(pen: Pen, extra: bool) -> None:
    pen.path([(-0.9, 0.35), (0.9, 0.35), (0.55, 0.75), (-0.6, 0.75)], closed=True)
    pen.path([(0, 0.35), (0, -0.95)])
    pen.path([(0.1, -0.8), (0.1, 0.15), (0.75, 0.15)], closed=True)
    pen.path([(-0.1, -0.6), (-0.1, 0.15), (-0.6, 0.15)], closed=True, thin=True)
    if extra:
        pen.path(
            [(x, 0.95 + 0.1 * math.sin(2 * math.pi * x)) for x in np.linspace(-1, 1, 49)], thin=True
        )


def balloon(pen: Pen, extra: bool) -> None:
    pen.curve((0, 0.45), (-0.2, 1.0), (0.2, 0.7), (0, 1.05), thin=True)
    pen.curve(
        (0, 0.35),
        (-0.85, 0.0),
        (-0.75, -1.0),
        (0, -1.0),
        (0.75, -1.0),
        (0.85, 0.0),
        (0, 0.35),
        closed=True,
    )
    pen.path([(0, 0.36), (-0.12, 0.5), (0.12, 0.5)], closed=True)
    if extra:
        pen.curve(
            (0, 0.35),
            (-0.35, 0.0),
            (-0.35, -0.8),
            (0, -1.0),
            (0.35, -0.8),
            (0.35, 0.0),
            (0, 0.35),
            thin=True,
        )
    else:
        pen.oval(-0.22, -0.5, 0.2, 0.25, 170, 260, thin=True)


def book(pen: Pen, extra: bool) -> None:
    for s in (-1, 1):
        pen.curve((0, -0.45), (s * 0.3, -0.7), (s * 0.7, -0.65), (s * 0.95, -0.55))
        pen.path([(s * 0.95, -0.55), (s * 0.95, 0.55)])
        pen.curve((0, 0.68), (s * 0.3, 0.45), (s * 0.7, 0.48), (s * 0.95, 0.55))
        for y in (-0.3, -0.02, 0.26):
            pen.curve(
                (s * 0.2, y),
                (s * 0.4, y - 0.1),
                (s * 0.6, y - 0.1),
                (s * 0.75, y - 0.06),
                thin=True,
            )
    pen.path([(0, -0.45), (0, 0.68)])
    if extra:
        pen.path(
            [(0.3, -0.66), (0.3, 0.98), (0.45, 0.8), (0.6, 0.98), (0.6, -0.66)],
            closed=True,
            hide=True,
        )


def bell(pen: Pen, extra: bool) -> None:
    pen.oval(0, 0.62, 0.18, 0.22, 0, 180)
    side = [(-0.85, 0.58), (-0.5, 0.35), (-0.6, 0.0), (-0.52, -0.25), (-0.45, -0.85)]
    pen.curve(*side, *[(-u, v) for u, v in reversed(side)], closed=True)
    pen.path([(-0.58, 0.3), (0.58, 0.3)], thin=True)
    pen.oval(0, -0.8, 0.1)
    if extra:
        for s in (-1, 1):
            pen.curve(
                (0, -0.66),
                (s * 0.3, -1.1),
                (s * 0.65, -0.95),
                (s * 0.6, -0.7),
                (s * 0.5, -0.45),
                (s * 0.2, -0.5),
                (0, -0.66),
                thin=True,
                hide=True,
            )


def lamp(pen: Pen, extra: bool) -> None:
    pen.path([(-0.35, -0.85), (0.35, -0.85), (0.68, -0.1), (-0.68, -0.1)], closed=True)
    pen.path([(0, -0.1), (0, 0.8)])
    pen.path([(-0.42, 0.85), (0.42, 0.85)])
    pen.path([(0.32, -0.08), (0.32, 0.2)], thin=True)
    if extra:
        pen.path([(-0.5, 0.1), (-0.68, 0.5)], thin=True)
        pen.path([(-0.24, 0.1), (-0.3, 0.5)], thin=True)
        pen.path([(0.62, 0.1), (0.8, 0.5)], thin=True)


THINGS: dict[str, tuple[Callable[[Pen, bool], None], str]] = {
    "apple": (apple, "with a leaf"), "house": (house, "with "
"a chimney"), "star": (star, "in a circle"), "heart": (heart, "with an arrow"),
    "sun": (sun, "with a face"), "moon": (moon, "with a star"), "tree": (tree, "with "
"three apples"), "car": (car, "with a box on top"),
    "clock": (clock, "with "
"two bells"), "cup": (cup, "with steam"), "fish": (fish, "with bubbles"), "key": (key, "on a ring"),
    "letter": (letter, "with "
"a heart"), "umbrella": (umbrella, "in "
"the rain"), "flower": (flower, "in a pot"), "boat": (boat, "on a wave"),
    "balloon": (balloon, "with stripes"), "book": (book, "with a "
"bookmark"), "bell": (bell, "with a ribbon"), "lamp": (lamp, "with light rays"),
}  # fmt: skip


def drawings() -> list[tuple[str, str, Image.Image]]:
    """Name, caption and picture: every thing plain, with something to it, and small."""
    made = []
    for number, (name, (draw, extra)) in enumerate(THINGS.items()):
        article = "an" if name[0] in "aeiou" else "a"
        for form, phrase in enumerate(
            (f"{article} {name}", f"{article} {name} {extra}", f"a small {name}")
        ):
            g = rng.at(0, "demo drawing", number, form)
            small = form == 2
            size = g.uniform(0.4, 0.5) if small else g.uniform(0.7, 0.8)
            x, y = g.uniform(-1, 1, 2) * (0.35 if small else 0.08)
            pen = Pen(size, g.uniform(-0.1, 0.1), x, y)
            draw(pen, form == 1)
            made.append(
                (
                    name,
                    f"a blueprint drawing of {phrase}",
                    pen.image.resize((SIDE, SIDE), Image.Resampling.BOX),
                )
            )
    return made


def sheet(made: list[tuple[str, str, Image.Image]]) -> Image.Image:
    """All pictures at twice their size, ten in a row."""
    page = Image.new("RGB", (10 * 132, math.ceil(len(made) / 10) * 132), "white")
    for i, (_, _, image) in enumerate(made):
        page.paste(
            image.resize((128, 128), Image.Resampling.NEAREST),
            (i % 10 * 132 + 2, i // 10 * 132 + 2),
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, help="also save one picture of all of them")
    a = parser.parse_args()
    made, lines = drawings(), []
    with atomic.write_folder(a.folder) as path:
        for number, (name, caption, image) in enumerate(made):
            file = f"{number:03}-{name}.png"
            image.save(path / file, optimize=True)
            lines.append(json.dumps({"file_name": file, "text": caption}) + "\n")
        (path / "metadata.jsonl").write_text("".join(lines))
    (a.folder / MANIFEST).unlink()
    print(
        f"{len(made)} pictures, {sum(f.stat().st_size for f in a.folder.iterdir()) / 1000:.0f} kB"
    )
    if a.sheet:
        sheet(made).save(a.sheet)


if __name__ == "__main__":
    main()
