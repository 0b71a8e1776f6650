"""What is drawn: the houses and gaps of a street, which identify a place, and passing people and cars."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .strip import ACCENTS, GLASS, ROOFS, TRIMS, WALLS, Colour, Strip, pick, shade


@dataclass
class House:
    """What the parts of a house share: its position in metres and its colours."""

    strip: Strip
    rng: Generator
    left: float
    right: float
    wall: Colour
    trim: Colour
    accent: Colour
    roof: Colour

    @property
    def width(self) -> float:
        return self.right - self.left

    def middles(self, parts: int | np.int64) -> np.ndarray:
        """The middles of so many equal parts of the house, in metres along the street."""
        return self.left + self.width * (np.arange(parts) + 0.5) / parts


def draw_wall(house: House, top: float) -> None:
    """Draw the wall up to `top` metres, with bricks, panels, boards, a grid of stones or smooth plaster."""
    strip, rng = house.strip, house.rng
    strip.rect(house.left, 0, house.right, top, house.wall)
    # From row to row and from column to column in metres, 0 for none; the width of a line, and its shade.
    rows, columns, width, tone = (
        (0, 0, 0, 1), (0.25, 0, 0.06, 0.8), (0.5, 0.9, 0.06, 0.8), (1.0, 1.2, 0.06, 0.8), (0, 0.5, 0.12, 0.88)
    )[rng.integers(5)]  # fmt: skip
    for y in np.arange(rows, top, rows) if rows else ():
        strip.rect(house.left, y, house.right, y + width, shade(house.wall, tone))
    for x in np.arange(house.left, house.right, columns) if columns else ():
        strip.rect(x, 0, x + width, top, shade(house.wall, tone))


def draw_roof(house: House, top: float) -> None:
    """Draw a flat, gable, stepped, hipped, mansard or saw-tooth roof above `top` metres, and perhaps chimneys."""
    strip, rng, left, right = house.strip, house.rng, house.left, house.right
    middle, rise = (left + right) / 2, rng.uniform(1.4, 2.8)
    for _ in range(rng.integers(3)):
        x = rng.uniform(left + 0.3, right - 1.2)
        strip.rect(x, top, x + rng.uniform(0.6, 0.9), top + rise + rng.uniform(0.2, 0.9), shade(house.wall, 0.75))
    shape = rng.integers(6)
    if shape == 0:
        strip.rect(left, top, right, top + 0.5, house.trim)
        if rng.random() < 0.5:
            for x in np.arange(left, right - 0.5, 1.2):
                strip.rect(x, top + 0.5, x + 0.6, top + 1.1, house.trim)
    elif shape == 1:
        gable = [(left, top), (middle, top + rise * 1.2), (right, top)]
        strip.polygon(gable, house.wall)
        strip.draw.line([strip.pixel(*point) for point in gable], fill=house.trim, width=5)
        strip.ellipse(middle - 0.45, top + 0.2, middle + 0.45, top + 1.1, GLASS)
    elif shape == 2:
        for step in range(3):
            inset, y = house.width * (0.06 + 0.15 * step), top + rise * (step + 1) / 3
            strip.rect(left + inset, top, right - inset, y, house.wall)
            strip.rect(left + inset, y, right - inset, y + 0.15, house.trim)
        strip.pane(middle - 0.4, top + 0.3, middle + 0.4, top + rise - 0.3)
    elif shape in (3, 4):
        inset = 1.6 if shape == 3 else 0.5
        strip.polygon([(left, top), (left + inset, top + rise), (right - inset, top + rise), (right, top)], house.roof)
        for x in house.middles(rng.integers(1, 4)) if shape == 4 else ():
            strip.polygon([(x - 0.7, top + 1.4), (x, top + 2.0), (x + 0.7, top + 1.4)], house.trim)
            strip.rect(x - 0.6, top + 0.2, x + 0.6, top + 1.4, house.trim)
            strip.pane(x - 0.4, top + 0.3, x + 0.4, top + 1.3)
    else:
        teeth = max(2, round(house.width / 2.2))
        for x in left + house.width * np.arange(teeth) / teeth:
            strip.polygon([(x, top), (x, top + rise * 0.7), (x + house.width / teeth, top)], house.roof)


def draw_upper_floors(house: House, ground: float, floors: int, floor_height: float) -> None:
    """Draw the window grid of the floors above `ground` metres, in one style for the whole house."""
    strip, rng, trim = house.strip, house.rng, house.trim
    columns = int(rng.integers(1, max(2, int(house.width / 1.5)) + 1))
    pitch = house.width / columns
    width = min(pitch * rng.uniform(0.4, 0.85), 3.2)
    height = floor_height * rng.uniform(0.45, 0.75)
    arched, shutters, twin, cross, bands, sills = rng.random(6) < (0.25, 0.3, 0.3, 0.4, 0.4, 0.6)
    balcony_floor = rng.integers(floors) if floors and rng.random() < 0.45 else -1
    blind_column = rng.integers(columns) if columns > 2 and rng.random() < 0.3 else -1
    for floor in range(floors):
        base = ground + floor * floor_height
        if bands:
            strip.rect(house.left, base, house.right, base + 0.2, trim)
        sill = base + (floor_height - height) * 0.55
        for column in range(columns):
            if column == blind_column:
                continue
            x0 = house.left + pitch * (column + 0.5) - width / 2
            x1 = x0 + width
            if arched:
                strip.ellipse(x0 - 0.1, sill + height - width / 2, x1 + 0.1, sill + height + width / 2 + 0.1, trim)
                strip.ellipse(x0, sill + height - width / 2, x1, sill + height + width / 2, GLASS)
            strip.rect(x0 - 0.12, sill - 0.12, x1 + 0.12, sill + height + 0.12 * (not arched), trim)
            strip.pane(x0, sill, x1, sill + height)
            if twin or width > 2:
                strip.rect((x0 + x1) / 2 - 0.12, sill, (x0 + x1) / 2 + 0.12, sill + height, trim)
            if cross:
                strip.rect(x0, sill + height * 0.6, x1, sill + height * 0.6 + 0.1, trim)
            if shutters and pitch - width > 0.9:
                for x in (x0 - 0.5, x1 + 0.12):
                    strip.rect(x, sill - 0.1, x + 0.38, sill + height + 0.1, house.accent)
            if sills:
                strip.rect(x0 - 0.25, sill - 0.25, x1 + 0.25, sill - 0.1, shade(trim, 0.8))
        if floor == balcony_floor:
            strip.rect(house.left + 0.3, base + 0.1, house.right - 0.3, base + 0.3, shade(trim, 0.7))
            strip.rect(house.left + 0.3, base + 1.0, house.right - 0.3, base + 1.12, (40, 40, 42))
            for x in np.arange(house.left + 0.3, house.right - 0.3, 0.3):
                strip.rect(x, base + 0.3, x + 0.08, base + 1.0, (40, 40, 42))


def draw_shop(house: House, top: float) -> None:
    """Draw a shop front up to `top` metres: shop windows, a door, a fascia with block letters, perhaps an awning."""
    strip, rng = house.strip, house.rng
    left, right, lintel = house.left + 0.2, house.right - 0.2, top - 0.75
    strip.rect(left, 0, right, top, house.accent)
    bays = int(rng.integers(2, 5))
    door = int(rng.integers(bays))
    for bay in range(bays):
        x0 = left + (right - left) * bay / bays + 0.12
        x1 = left + (right - left) * (bay + 1) / bays - 0.12
        strip.pane(x0, 0.1 if bay == door else 0.6, x1, lintel - 0.1)
        if bay == door:
            strip.rect(x0, 2.1, x1, 2.2, house.accent)
            strip.rect(x0, 0, x1, 0.7, shade(house.accent, 0.7))
    letter = ACCENTS[5] if house.accent != ACCENTS[5] else ACCENTS[4]
    x = rng.uniform(left + 0.3, left + 1.2)
    for _ in range(rng.integers(3, 9)):
        step = rng.uniform(0.25, 0.6)
        if x + step < right - 0.3:
            strip.rect(x, lintel + 0.15, x + step * 0.75, lintel + rng.uniform(0.4, 0.6), letter)
        x += step
    if rng.random() < 0.5:
        stripes = max(3, round((right - left) / rng.uniform(0.5, 1.0)))
        for i in range(stripes):
            x0, x1 = left + (right - left) * i / stripes, left + (right - left) * (i + 1) / stripes
            strip.rect(x0, lintel - 0.8, x1, lintel, letter if i % 2 else shade(house.accent, 1.2))


def draw_ground_floor(house: House, top: float) -> None:
    """Draw the ground floor up to `top` metres: a shop front, an arcade, garages, or a door beside windows."""
    strip, rng = house.strip, house.rng
    kind = rng.choice(4, p=(0.4, 0.12, 0.13, 0.35))
    if kind == 0:
        draw_shop(house, top)
    elif kind == 1:
        arches = max(1, round(house.width / rng.uniform(1.8, 2.8)))
        for x in house.middles(arches):
            half = house.width / arches * 0.36
            strip.ellipse(x - half, top - 0.7 - 2 * half, x + half, top - 0.5, (36, 34, 34))
            strip.rect(x - half, 0, x + half, top - 0.6 - half, (36, 34, 34))
    elif kind == 2:
        for x in house.middles(max(1, round(house.width / 3.4))):
            strip.rect(x - 1.3, 0, x + 1.3, 2.5, house.accent)
            for y in np.arange(0.4, 2.5, 0.5):
                strip.rect(x - 1.3, y, x + 1.3, y + 0.07, shade(house.accent, 0.7))
    else:
        strip.rect(house.left, 0, house.right, rng.uniform(0.3, 0.9), shade(house.wall, 0.65))
        slots = max(2, int(house.width / 2.0))
        door = rng.integers(slots)
        for slot, x in enumerate(house.middles(slots)):
            if slot == door:
                strip.rect(x - 0.75, 0, x + 0.75, 2.7, house.trim)
                strip.rect(x - 0.5, 0.2, x + 0.5, 2.2, house.accent)
                strip.pane(x - 0.5, 2.25, x + 0.5, 2.6)
                strip.rect(x - 0.9, 0, x + 0.9, 0.2, (150, 148, 144))
            else:
                strip.rect(x - 0.65, 0.95, x + 0.65, 2.55, house.trim)
                strip.pane(x - 0.52, 1.08, x + 0.52, 2.42)


def draw_house(strip: Strip, rng: Generator, left: float, right: float) -> None:
    """Draw a random house between `left` and `right` metres."""
    wall, trim = pick(rng, WALLS), pick(rng, TRIMS)
    house = House(strip, rng, left, right, wall, trim, pick(rng, ACCENTS), pick(rng, ROOFS))
    floors = int(rng.choice(4, p=(0.15, 0.4, 0.32, 0.13)))
    ground, floor_height = rng.uniform(3.1, 3.8), rng.uniform(2.4, 3.2)
    top = ground + floors * floor_height
    draw_wall(house, top)
    draw_roof(house, top)
    draw_upper_floors(house, ground, floors, floor_height)
    draw_ground_floor(house, ground)
    if rng.random() < 0.5:
        strip.rect(left - 0.1, top - 0.1, right + 0.1, top + 0.25, trim)
    if rng.random() < 0.35:
        x = left + 0.1 if rng.random() < 0.5 else right - 0.25
        strip.rect(x, 0, x + 0.14, top, (64, 66, 68))
    if floors and rng.random() < 0.25:
        x, y = rng.uniform(left, right - 0.8), ground + rng.uniform(0, 0.5)
        strip.rect(x, y, x + 0.8, y + rng.uniform(1.2, 2.6), pick(rng, ACCENTS))


def draw_gap(strip: Strip, rng: Generator, left: float, right: float) -> None:
    """Draw an opening between two houses: a garden wall or a fence, and perhaps a tree behind it."""
    if rng.random() < 0.7:
        middle, crown, size = (left + right) / 2, rng.uniform(4.0, 7.0), rng.uniform(1.2, 1.9)
        strip.rect(middle - 0.15, 0, middle + 0.15, crown, (84, 66, 52))
        strip.ellipse(middle - size, crown - size * 1.2, middle + size, crown + size * 1.2, (74, 98, 58))
    strip.rect(left, 0, right, rng.uniform(1.2, 2.6), pick(rng, WALLS))


def draw_facades(rng: Generator, length: float) -> Strip:
    """Return the facades of a street of `length` metres."""
    strip = Strip(length)
    x = -rng.uniform(0, 5)
    while x < length:
        if rng.random() < 0.18:
            end = x + rng.uniform(1.2, 3.2)
            draw_gap(strip, rng, x, end)
        else:
            end = x + rng.uniform(4.0, 8.5)
            draw_house(strip, rng, x, end)
        x = end
    return strip


def draw_people(rng: Generator, length: float) -> Strip:
    """Return a plane with a Poisson number of people, one on average, each with feet on the pavement."""
    plane = Strip(length, 2.4)
    for _ in range(rng.poisson(1.0)):
        x, tall = rng.uniform(length * 0.3, length * 0.7), rng.uniform(1.5, 1.9)
        plane.rect(x - 0.17, 0, x + 0.17, tall * 0.5, shade(pick(rng, ACCENTS), 0.6))
        plane.rect(x - 0.25, tall * 0.45, x + 0.25, tall - 0.26, pick(rng, ACCENTS + WALLS))
        plane.ellipse(x - 0.13, tall - 0.3, x + 0.13, tall, (190, 150, 124))
    return plane


def draw_cars(rng: Generator, length: float) -> Strip:
    """Return a plane with a Poisson number of cars, one half on average, parked at the kerb."""
    plane = Strip(length, 2.4)
    for _ in range(rng.poisson(0.5)):
        x, tall, paint = rng.uniform(length * 0.2, length * 0.7), rng.uniform(1.35, 1.6), pick(rng, ACCENTS + WALLS)
        plane.polygon([(x + 0.6, 0.85), (x + 1.2, tall), (x + 2.9, tall), (x + 3.6, 0.85)], paint)
        plane.polygon([(x + 0.85, 0.9), (x + 1.3, tall - 0.1), (x + 2.8, tall - 0.1), (x + 3.3, 0.9)], GLASS)
        plane.rect(x, 0.25, x + 4.1, 0.9, paint)
        for wheel in (x + 0.85, x + 3.25):
            plane.ellipse(wheel - 0.32, 0, wheel + 0.32, 0.64, (24, 24, 26))
    return plane
