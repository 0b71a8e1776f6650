"""A made city: rendered street views in the layouts of GSV-Cities (training) and of the evaluation trees.

Place recognition data sets are large and some need a licence. This module renders a small stand-in within a minute,
so that training, evaluation and the tests run anywhere. Streets are rows of houses told apart by their structure
(rooflines, window grids, doors, shop fronts), while all colours come from one shared palette, and every visit has its
own camera pose, light, weather and passers-by. A model must therefore learn what stays: the buildings. Numbers
measured here say that the code works; they say nothing about real cities.

    python -m datasets.toy_city --output data

World frame of a street, in metres: x runs east along the facades, y up from the pavement, z north; the facades stand
in the plane z = 0 and the camera south of it, so a heading of 0 degrees looks straight at them.
"""

import csv
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from utils.command_line import Parser
from utils.signals import left_on_signals, mapped, process_pool

Colour = tuple[int, int, int]
Row = dict[str, Any]

PIXELS_PER_METRE = 16
STRIP_HEIGHT = 17.0
STRIP_MARGIN = 20.0
PAVEMENT_WIDTH = 3.0

WALLS: tuple[Colour, ...] = (
    (164, 90, 72), (196, 166, 130), (214, 206, 190), (146, 146, 142), (116, 88, 74),
    (188, 126, 92), (128, 142, 152), (224, 222, 216), (152, 152, 116), (98, 100, 106),
)  # fmt: skip
TRIMS: tuple[Colour, ...] = (
    (242, 240, 232), (62, 58, 56), (122, 100, 82), (184, 180, 172), (54, 72, 68), (132, 48, 44),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((94, 64, 56), (70, 72, 78), (124, 76, 60), (88, 84, 78))
ACCENTS: tuple[Colour, ...] = (
    (42, 74, 122), (142, 38, 42), (40, 98, 68), (208, 162, 54), (32, 32, 36), (232, 228, 216),
)  # fmt: skip
GLASS: Colour = (52, 62, 74)

# The reference points (latitude, longitude) of the training cities: their names are GSV-Cities', their streets are not.
CITIES = {"London": (51.5, -0.12), "Boston": (42.36, -71.06), "Madrid": (40.42, -3.7), "Chicago": (41.88, -87.63)}

# The evaluation streets lie on the equator near the central meridian of UTM zone 31, where no real city is and where
# UTM is within centimetres of a plain scaling of longitude and latitude.
UTM_ZONE, UTM_LETTER, UTM_CENTRAL_MERIDIAN = 31, "N", 3.0
UTM_SCALE, EQUATOR_RADIUS, EQUATOR_MERIDIAN_RADIUS = 0.9996, 6378137.0, 6335439.3
METRES_PER_DEGREE = 111320.0
FIRST_EASTING, STREET_GAP = 500000.0, 300.0
SPLIT_NORTHING = {"train": 1000.0, "val": 2000.0, "test": 3000.0}


@dataclass(frozen=True)
class Difficulty:
    """How much two visits of a place differ.

    Lengths are in metres and angles in degrees; a jitter is the half width of a uniform distribution. `lighting`
    scales what happens in the street (sunlight against sky, cast shadows, fog, lit windows), `exposure` what happens
    in the camera (exposure, white balance, contrast, saturation, noise, blur). `occluders` is the mean number of
    people and of half as many cars in front of the camera. `times` are the probabilities of day, golden hour, dusk and
    night, `weathers` those of clear, overcast, fog and rain.
    """

    position_jitter: float = 2.5
    distance_jitter: float = 1.2
    heading_jitter: float = 7.0
    tilt_jitter: float = 1.0
    fov_jitter: float = 3.0
    lighting: float = 0.6
    exposure: float = 0.2
    occluders: float = 1.0
    times: tuple[float, float, float, float] = (0.70, 0.15, 0.13, 0.02)
    weathers: tuple[float, float, float, float] = (0.50, 0.30, 0.08, 0.12)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: position in metres, angles and the horizontal field of view in degrees."""

    x: float
    height: float
    distance: float
    heading: float
    pitch: float
    roll: float
    fov: float

    def rays(self, size: tuple[int, int]) -> np.ndarray:
        """Return the 3 x 3 matrix that takes homogeneous pixel coordinates (u, v, 1) to world directions."""
        width, height = size
        yaw, pitch, roll, fov = np.radians([self.heading, self.pitch, self.roll, self.fov])
        focal = width / 2 / np.tan(fov / 2)
        inverse_intrinsics = np.array([[1, 0, -width / 2], [0, -1, height / 2], [0, 0, focal]]) / focal
        turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
        lean = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
        rotation: np.ndarray = turn @ tilt @ lean @ inverse_intrinsics
        return rotation


class Strip:
    """An RGBA texture of an upright plane along a street, drawn in metres; alpha is 0 where the sky shows.

    Attributes:
        image: RGBA image of `length` x `height` metres at PIXELS_PER_METRE.
        panes: pixel boxes (left, top, right, bottom) of the window panes, which change from visit to visit.
    """

    def __init__(self, length: float, height: float = STRIP_HEIGHT) -> None:
        self.height = height
        self.image = Image.new("RGBA", (round(length * PIXELS_PER_METRE), round(height * PIXELS_PER_METRE)))
        self.draw = ImageDraw.Draw(self.image)
        self.panes: list[tuple[int, int, int, int]] = []

    def pixel(self, x: float, y: float) -> tuple[int, int]:
        """Return the pixel corner nearest to (x, y) metres."""
        return round(x * PIXELS_PER_METRE), round((self.height - y) * PIXELS_PER_METRE)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        """Return the inclusive pixel box, at least one pixel wide and high, of a rectangle in metres."""
        (left, bottom), (right, top) = self.pixel(x0, y0), self.pixel(x1, y1)
        return left, top, max(left, right - 1), max(top, bottom - 1)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.rectangle(self.box(x0, y0, x1, y1), fill=colour)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.ellipse(self.box(x0, y0, x1, y1), fill=colour)

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([self.pixel(x, y) for x, y in points], fill=colour)

    def pane(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.rect(x0, y0, x1, y1, GLASS)
        self.panes.append(self.box(x0, y0, x1, y1))


def pick(rng: Generator, colours: Sequence[Colour]) -> Colour:
    """Draw one colour of a palette."""
    return colours[int(rng.integers(len(colours)))]


def shade(colour: Colour, factor: float) -> Colour:
    """Return a colour made brighter or darker by a factor."""
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


@dataclass
class House:
    """What the parts of one house share: where it stands, in metres, and its colours."""

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


def draw_wall(house: House, top: float) -> None:
    """Draw the wall up to `top` metres, with bricks, panels, boards, a grid of stones or smooth plaster."""
    strip, rng, dark = house.strip, house.rng, shade(house.wall, 0.8)
    strip.rect(house.left, 0, house.right, top, house.wall)
    texture = rng.integers(5)
    if texture in (1, 2, 3):
        pitch = (0.25, 0.5, 1.0)[texture - 1]
        for y in np.arange(pitch, top, pitch):
            strip.rect(house.left, y, house.right, y + 0.06, dark)
    if texture in (2, 3):
        for x in np.arange(house.left, house.right, 1.2 if texture == 3 else 0.9):
            strip.rect(x, 0, x + 0.06, top, dark)
    if texture == 4:
        for x in np.arange(house.left, house.right, 0.5):
            strip.rect(x, 0, x + 0.12, top, shade(house.wall, 0.88))


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
        strip.polygon([(left, top), (middle, top + rise * 1.2), (right, top)], house.wall)
        strip.draw.line([strip.pixel(left, top), strip.pixel(middle, top + rise * 1.2), strip.pixel(right, top)],
                        fill=house.trim, width=5)  # fmt: skip
        strip.ellipse(middle - 0.45, top + 0.2, middle + 0.45, top + 1.1, GLASS)
    elif shape == 2:
        for step in range(3):
            inset = house.width * (0.06 + 0.15 * step)
            strip.rect(left + inset, top, right - inset, top + rise * (step + 1) / 3, house.wall)
            strip.rect(left + inset, top + rise * (step + 1) / 3, right - inset, top + rise * (step + 1) / 3 + 0.15,
                       house.trim)  # fmt: skip
        strip.pane(middle - 0.4, top + 0.3, middle + 0.4, top + rise - 0.3)
    elif shape == 3:
        strip.polygon([(left, top), (left + 1.6, top + rise), (right - 1.6, top + rise), (right, top)], house.roof)
    elif shape == 4:
        strip.polygon([(left, top), (left + 0.5, top + rise), (right - 0.5, top + rise), (right, top)], house.roof)
        dormers = int(rng.integers(1, 4))
        for x in left + house.width * (np.arange(dormers) + 0.5) / dormers:
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
        for x in house.left + house.width * (np.arange(arches) + 0.5) / arches:
            half = house.width / arches * 0.36
            strip.ellipse(x - half, top - 0.7 - 2 * half, x + half, top - 0.5, (36, 34, 34))
            strip.rect(x - half, 0, x + half, top - 0.6 - half, (36, 34, 34))
    elif kind == 2:
        doors = max(1, round(house.width / 3.4))
        for x in house.left + house.width * (np.arange(doors) + 0.5) / doors:
            strip.rect(x - 1.3, 0, x + 1.3, 2.5, house.accent)
            for y in np.arange(0.4, 2.5, 0.5):
                strip.rect(x - 1.3, y, x + 1.3, y + 0.07, shade(house.accent, 0.7))
    else:
        strip.rect(house.left, 0, house.right, rng.uniform(0.3, 0.9), shade(house.wall, 0.65))
        slots = max(2, int(house.width / 2.0))
        door = rng.integers(slots)
        for slot in range(slots):
            x = house.left + house.width * (slot + 0.5) / slots
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


def draw_people(rng: Generator, length: float, mean: float) -> Strip:
    """Return a plane with a Poisson number of people, `mean` on average, each with feet on the pavement."""
    plane = Strip(length, 2.4)
    for _ in range(rng.poisson(mean)):
        x, tall = rng.uniform(length * 0.3, length * 0.7), rng.uniform(1.5, 1.9)
        plane.rect(x - 0.17, 0, x + 0.17, tall * 0.5, shade(pick(rng, ACCENTS), 0.6))
        plane.rect(x - 0.25, tall * 0.45, x + 0.25, tall - 0.26, pick(rng, ACCENTS + WALLS))
        plane.ellipse(x - 0.13, tall - 0.3, x + 0.13, tall, (190, 150, 124))
    return plane


def draw_cars(rng: Generator, length: float, mean: float) -> Strip:
    """Return a plane with a Poisson number of cars, `mean` on average, parked at the kerb."""
    plane = Strip(length, 2.4)
    for _ in range(rng.poisson(mean)):
        x, tall, paint = rng.uniform(length * 0.2, length * 0.7), rng.uniform(1.35, 1.6), pick(rng, ACCENTS + WALLS)
        plane.polygon([(x + 0.6, 0.85), (x + 1.2, tall), (x + 2.9, tall), (x + 3.6, 0.85)], paint)
        plane.polygon([(x + 0.85, 0.9), (x + 1.3, tall - 0.1), (x + 2.8, tall - 0.1), (x + 3.3, 0.9)], GLASS)
        plane.rect(x, 0.25, x + 4.1, 0.9, paint)
        for wheel in (x + 0.85, x + 3.25):
            plane.ellipse(wheel - 0.32, 0, wheel + 0.32, 0.64, (24, 24, 26))
    return plane


def warp(
    plane: Strip, image: Image.Image, left: float, depth: float, camera: Camera, size: tuple[int, int]
) -> np.ndarray:
    """Project the texture of an upright plane into the camera.

    Args:
        plane: the plane, for its height.
        image: its RGBA texture, whose left edge is at `left` metres along the street.
        depth: distance of the plane from the camera in metres.

    Returns:
        float32 array, 4 x height x width: red, green, blue and alpha in 0..1.
    """
    rays = camera.rays(size)
    columns = (camera.x - left) * rays[2] + depth * rays[0]
    rows = (plane.height - camera.height) * rays[2] - depth * rays[1]
    homography = np.stack([columns * PIXELS_PER_METRE, rows * PIXELS_PER_METRE, rays[2]]) / rays[2, 2]
    coefficients = tuple(homography.ravel()[:8])
    warped = image.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(warped).transpose(2, 0, 1).astype(np.float32, order="C") / 255


@dataclass(frozen=True)
class Look:
    """The light and weather of one visit; `light`, `zenith` and `horizon` are 3 x 1 x 1 red, green, blue values."""

    light: np.ndarray
    zenith: np.ndarray
    horizon: np.ndarray
    sunny: bool
    fog: float
    rain: bool
    lit_windows: float


def draw_look(rng: Generator, difficulty: Difficulty) -> Look:
    """Draw the light and weather of one visit."""
    time = rng.choice(4, p=difficulty.times)
    weather = rng.choice(4, p=difficulty.weathers)
    light = np.array([(1, 1, 1), (1.12, 0.92, 0.7), (0.5, 0.52, 0.66), (0.3, 0.28, 0.3)][time])
    zenith = np.array([(0.32, 0.52, 0.86), (0.42, 0.5, 0.72), (0.2, 0.22, 0.4), (0.03, 0.03, 0.07)][time])
    horizon = np.array([(0.75, 0.85, 0.95), (0.98, 0.78, 0.52), (0.6, 0.42, 0.42), (0.12, 0.1, 0.12)][time])
    if weather > 0:
        grey = (0.85, 0.25)[int(time >= 2)] * rng.uniform(0.75, 1.1)
        zenith, horizon = np.full(3, grey * 0.92), np.full(3, grey)
        light = light * np.array([0.82, 0.85, 0.9])
    fog = rng.uniform(0.2, 0.45) * difficulty.lighting if weather == 2 else 0.0
    lit = (0.1, 0.2, 0.5, 0.5)[time]
    # Facades against the light are darker than the sky, sunlit ones under clouds brighter: only the outline stays.
    light = light * 2 ** (difficulty.lighting * rng.uniform(-0.8, 0.6))
    veil = 2 ** (difficulty.lighting * rng.uniform(-1.2, 0.2))
    zenith, horizon = zenith * veil, horizon * veil
    light, zenith, horizon = np.stack([light, zenith, horizon]).astype(np.float32)[..., None, None]
    return Look(light, zenith, horizon, bool(weather == 0 and time < 2), min(fog, 0.8), bool(weather == 3), lit)


def draw_background(camera: Camera, rays: np.ndarray, look: Look, rng: Generator, strength: float) -> np.ndarray:
    """Return the sky above the horizon and the pavement and road below it, 3 x height x width in 0..1."""
    ray_x, ray_y, ray_z = rays
    rgb = look.horizon + (look.zenith - look.horizon) * np.clip(ray_y / ray_z, 0, 1)
    if look.sunny:
        clouds = Image.fromarray(rng.uniform(-1, 1, (4, 6)).astype(np.float32))
        cover = np.asarray(clouds.resize(ray_x.shape[::-1], Image.Resampling.BICUBIC)) * 1.5 * strength
        rgb = rgb + (look.horizon * 1.05 - rgb) * np.clip(cover, 0, 1)

    to_ground = camera.height / np.maximum(-ray_y, 1e-3)
    x, z = camera.x + to_ground * ray_x, to_ground * ray_z - camera.distance
    slabs = np.where((x % 1.5 < 0.06) | (z % 1.0 < 0.05), np.float32(0.48), np.float32(0.58))
    road = np.where(z > -PAVEMENT_WIDTH - 0.25, np.float32(0.72), np.float32(0.3))
    ground = np.where(z > -PAVEMENT_WIDTH, slabs, road) * (0.8 if look.rain else 1.0)
    return np.where(ray_y < 0, ground * look.light, rgb)


def visit_texture(street: Strip, first: int, last: int, look: Look, rng: Generator, strength: float) -> Image.Image:
    """Return the facades between two pixel columns with lamps, reflections or curtains in some of the windows."""
    texture = street.image.crop((first, 0, last, street.image.height))
    pen = ImageDraw.Draw(texture)
    glow = (255, 214, 140) if look.lit_windows > 0.3 else (190, 200, 205)
    for left, top, right, bottom in street.panes:
        if left < last and right > first and rng.random() < look.lit_windows * min(strength, 1.5):
            pen.rectangle((left - first, top, right - first, bottom), fill=shade(glow, rng.uniform(0.7, 1.0)))
    return texture


def cast_shadow(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    """Return where (x, y), in metres on the facades, lies in the shadow of the houses across the street."""
    slant, edges = rng.uniform(-0.8, 0.8), np.cumsum(rng.uniform(3, 9, 12)) - 30
    heights = rng.uniform(-2, 8, 13)
    return np.less(y, heights[np.searchsorted(edges, x - x.mean() + slant * y)])


def render_view(
    street: Strip, camera: Camera, rng: Generator, difficulty: Difficulty, size: tuple[int, int]
) -> Image.Image:
    """Render one visit: what `camera` sees of `street` in a light, weather and traffic drawn from `rng`.

    Args:
        street: the facades; the camera must stand within its length.
        size: width and height of the image in pixels.

    Returns:
        RGB image of `size`.
    """
    look, strength = draw_look(rng, difficulty), difficulty.lighting
    width, height = size
    pixels = np.ones((3, height, width), dtype=np.float32)
    pixels[0], pixels[1] = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    rays = np.tensordot(camera.rays(size).astype(np.float32), pixels, axes=1)
    rgb = draw_background(camera, rays, look, rng, strength)

    reach = camera.distance * 1.6
    first = max(0, round((camera.x - reach) * PIXELS_PER_METRE))
    last = round((camera.x + reach) * PIXELS_PER_METRE)
    texture = visit_texture(street, first, last, look, rng, strength)
    facade = warp(street, texture, first / PIXELS_PER_METRE, camera.distance, camera, size)
    light = look.light
    if look.sunny:
        x = camera.x + camera.distance * rays[0] / rays[2]
        y = camera.height + camera.distance * rays[1] / rays[2]
        dim = 1 - np.array([0.62, 0.58, 0.5], dtype=np.float32)[:, None, None] * min(strength, 1.5)
        light = np.where(cast_shadow(x, y, rng), light * dim, light)
    rgb = rgb + (facade[:3] * light - rgb) * facade[3]

    for plane, depth in (
        (draw_people(rng, 2 * reach, difficulty.occluders), camera.distance - rng.uniform(0.5, 2.5)),
        (draw_cars(rng, 2 * reach, difficulty.occluders / 2), camera.distance - PAVEMENT_WIDTH - 1.0),
    ):
        if plane.image.getbbox() is not None:
            figures = warp(plane, plane.image, camera.x - reach, depth, camera, size)
            rgb = rgb + (figures[:3] * look.light - rgb) * figures[3]

    rgb = rgb + (look.horizon - rgb) * look.fog
    # One side of the street lies brighter than the other.
    rgb = rgb * (1 + strength * rng.uniform(-0.5, 0.5) * np.linspace(-1, 1, width, dtype=np.float32))
    return photograph(rgb, look, rng, difficulty.exposure)


def photograph(rgb: np.ndarray, look: Look, rng: Generator, strength: float) -> Image.Image:
    """Turn a 3 x height x width scene in 0..1 into a photograph: exposure, white balance, rain, blur and noise."""
    _, height, width = rgb.shape
    if look.rain:
        streaks = (rng.random((height // 6 + 1, width)) < 0.03).repeat(6, axis=0)[:height]
        rgb = rgb + np.float32(0.2) * streaks
    # A camera's automatic exposure keeps most pictures readable but never quite evens them out.
    metered = (0.42 / max(float(rgb.mean()), 0.02)) ** 0.75
    white_balance = rng.normal(0, 0.14, (3, 1, 1)).astype(np.float32)
    gain = metered * 2 ** (strength * (rng.uniform(-0.6, 0.6) + white_balance))
    grey = rgb.mean(axis=0)
    rgb = grey + (rgb - grey) * (1 + strength * rng.uniform(-0.6, 0.25))
    rgb = np.clip(rgb * gain, 0, 1) ** (2 ** (strength * rng.uniform(-0.45, 0.45)))
    rgb = (rgb - 0.5) * (1 + strength * rng.uniform(-0.25, 0.2)) + 0.5
    noise = rng.standard_normal(rgb.shape, dtype=np.float32)
    rgb = rgb + noise * strength * rng.uniform(0.005, 0.035)
    pixels = (np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return image.filter(ImageFilter.GaussianBlur(strength * rng.uniform(0.2, 0.9)))


def draw_camera(rng: Generator, x: float, difficulty: Difficulty) -> Camera:
    """Draw the pose of a visit to the place at `x` metres along a street."""

    def around(centre: float, half_width: float) -> float:
        return float(rng.uniform(centre - half_width, centre + half_width))

    return Camera(
        x=around(x, difficulty.position_jitter),
        height=around(2.3, 0.3),
        distance=around(11.0, difficulty.distance_jitter),
        heading=around(0.0, difficulty.heading_jitter),
        pitch=around(13.0, difficulty.tilt_jitter),
        roll=around(0.0, difficulty.tilt_jitter),
        fov=around(66.0, difficulty.fov_jitter),
    )


@dataclass(frozen=True)
class Street:
    """One street to render: everything a worker process needs.

    Attributes:
        group: training city, or evaluation split.
        index: number of the street in its group.
        places: number of places along it.
        spacing: metres between two places.
        visits: images of each place; an evaluation place has a database visit and a query visit.
        folder: where the images of the group go.
    """

    group: str
    index: int
    places: int
    spacing: float
    visits: int
    folder: Path
    seed: int
    size: tuple[int, int]
    difficulty: Difficulty

    @property
    def training(self) -> bool:
        return self.group in CITIES


def training_row(street: Street, place: int, camera: Camera, rng: Generator) -> Row:
    """Return the dataframe row of one visit."""
    lat, lon = CITIES[street.group]
    east, north = camera.x, street.index * STREET_GAP - camera.distance
    return {
        "place_id": street.index * street.places + place,
        "year": int(rng.integers(2008, 2022)),
        "month": int(rng.integers(1, 13)),
        "northdeg": round(camera.heading) % 360,
        "city_id": street.group,
        "lat": round(lat + north / METRES_PER_DEGREE, 7),
        "lon": round(lon + east / (METRES_PER_DEGREE * np.cos(np.radians(lat))), 7),
        "panoid": panorama_name(rng),
    }


def training_name(row: Row) -> str:
    """Return the image file name that GSV-Cities derives from a dataframe row."""
    return "{city_id}_{place_id:07d}_{year:04d}_{month:02d}_{northdeg:03d}_{lat}_{lon}_{panoid}.jpg".format(**row)


def panorama_name(rng: Generator) -> str:
    """Draw a 22-letter panorama name."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), 22))


def evaluation_name(easting: float, northing: float, camera: Camera, rng: Generator) -> str:
    """Return the file name of an evaluation image, which holds where its camera stood, in UTM metres."""
    lat = np.degrees(northing / (UTM_SCALE * EQUATOR_MERIDIAN_RADIUS))
    lon = UTM_CENTRAL_MERIDIAN + np.degrees((easting - FIRST_EASTING) / (UTM_SCALE * EQUATOR_RADIUS))
    date = f"{rng.integers(2008, 2022)}{rng.integers(1, 13):02d}"
    fields = (f"{easting:.2f}", f"{northing:.2f}", UTM_ZONE, UTM_LETTER, f"{lat:.7f}", f"{lon:.7f}", panorama_name(rng),
              "", f"{camera.heading % 360:.2f}", f"{camera.pitch:.2f}", f"{camera.roll:.2f}", f"{camera.height:.2f}",
              date, "")  # fmt: skip
    return "@" + "@".join(map(str, fields)) + "@.jpg"


def render_street(street: Street) -> list[Row]:
    """Render all visits of a street into its folder and return the dataframe rows, none for an evaluation street."""
    rng = np.random.default_rng([street.seed, zlib.crc32(street.group.encode()), street.index])
    length = (street.places - 1) * street.spacing + 2 * STRIP_MARGIN
    facades = draw_facades(rng, length)
    rows = []
    for place in range(street.places):
        for visit in range(street.visits):
            camera = draw_camera(rng, STRIP_MARGIN + place * street.spacing, street.difficulty)
            image = render_view(facades, camera, rng, street.difficulty, street.size)
            if street.training:
                rows.append(training_row(street, place, camera, rng))
                path = street.folder / training_name(rows[-1])
            else:
                block = FIRST_EASTING + street.index * (length + STREET_GAP)
                name = evaluation_name(block + camera.x, SPLIT_NORTHING[street.group] - camera.distance, camera, rng)
                path = street.folder / ("database" if visit == 0 else "queries") / name
            image.save(path, quality=int(rng.integers(55, 93)))
    return rows


def write_toy_city(
    output: Path,
    *,
    seed: int = 0,
    cities: Sequence[str] = ("London", "Boston"),
    train_streets: int = 72,
    places: int = 8,
    visits: int = 5,
    test_streets: int = 22,
    val_streets: int = 10,
    cluster_streets: int = 12,
    spots: int = 10,
    size: tuple[int, int] = (160, 120),
    difficulty: Difficulty | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Path, Path]:
    """Render a made city and write it in the layouts of GSV-Cities and of the evaluation trees.

    The files depend on the seed and the sizes, never on the number of workers.

    Args:
        output: folder that receives `gsv_cities` and `toy_city`.
        seed: source of every random number.
        cities: training cities, names from `CITIES`.
        train_streets: streets of each training city.
        places: places along a training street, 25 metres apart.
        visits: images of each training place.
        test_streets, val_streets, cluster_streets: streets of the splits test, val and train, the last of which only
            serves to initialise the cluster centres.
        spots: places along an evaluation street, 10 metres apart, with one database image and one query each.
        size: width and height of the images in pixels.
        difficulty: how much two visits differ; by default `Difficulty()`.
        workers: processes to render with; by default one for each core.
        overwrite: replace the two folders if they exist.
        progress: show a progress bar.

    Returns:
        The two folders written.

    Raises:
        FileExistsError: a folder exists, is not empty, and `overwrite` is False.
        ValueError: a size is below 1 or a city is unknown.
    """
    if min(train_streets, places, visits, test_streets, val_streets, cluster_streets, spots, *size) < 1:
        raise ValueError("all sizes must be at least 1")
    if unknown := sorted(set(cities) - set(CITIES)):
        raise ValueError(f"unknown cities {', '.join(unknown)}: choose from {', '.join(CITIES)}")
    targets = output / "gsv_cities", output / "toy_city"
    for target in targets:
        if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
            raise FileExistsError(f"{target} exists and is not empty: pass --overwrite to replace it")

    output.mkdir(parents=True, exist_ok=True)
    difficulty = difficulty or Difficulty()
    # Everything is written beside its destination and renamed at the end, so a killed run leaves no half-written city.
    with tempfile.TemporaryDirectory(prefix=".toy_city_", dir=output) as name:
        gsv, trees = Path(name, "gsv_cities"), Path(name, "toy_city")
        (gsv / "Dataframes").mkdir(parents=True)
        (gsv / "MADE.txt").write_text(f"Drawn by datasets.toy_city, seed {seed}; nothing of GSV-Cities is here.\n")
        streets = []
        for city in cities:
            folder = gsv / "Images" / city
            folder.mkdir(parents=True)
            streets += [
                Street(city, i, places, 25.0, visits, folder, seed, size, difficulty) for i in range(train_streets)
            ]
        for split, count in (("train", cluster_streets), ("val", val_streets), ("test", test_streets)):
            folder = trees / "images" / split
            for kind in ("database", "queries"):
                (folder / kind).mkdir(parents=True)
            streets += [Street(split, i, spots, 10.0, 2, folder, seed, size, difficulty) for i in range(count)]

        rows: dict[str, list[Row]] = {city: [] for city in cities}
        with mapped(process_pool(workers), render_street, streets) as rendered:
            done = tqdm(rendered, total=len(streets), unit="street", disable=not progress)
            for street, street_rows in zip(streets, done, strict=True):
                rows.setdefault(street.group, []).extend(street_rows)
        for city in cities:
            with open(gsv / "Dataframes" / f"{city}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[city][0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[city])
        for source, target in zip((gsv, trees), targets, strict=True):
            if target.exists():
                shutil.rmtree(target)
            source.rename(target)
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for bad input, raised as SystemExit."""
    parser = Parser(
        prog="python -m datasets.toy_city",
        usage="%(prog)s [--option value ...]; --help lists all options",
        description="Render a made city for training and evaluation.",
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for gsv_cities and toy_city")
    parser.add_argument("--seed", type=int, default=0, help="source of every random number")
    parser.add_argument("--cities", nargs="+", default=["London", "Boston"], choices=sorted(CITIES))
    parser.add_argument("--train_streets", type=int, default=72, help="streets of each training city")
    parser.add_argument("--places", type=int, default=8, help="places along a training street")
    parser.add_argument("--visits", type=int, default=5, help="images of each training place")
    parser.add_argument("--test_streets", type=int, default=22, help="streets of the test split")
    parser.add_argument("--val_streets", type=int, default=10, help="streets of the val split")
    parser.add_argument("--cluster_streets", type=int, default=12, help="streets of the train split (for k-means)")
    parser.add_argument("--spots", type=int, default=10, help="database images, and queries, of an evaluation street")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--workers", type=int, help="processes to render with (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace the two folders if they exist")
    args = vars(parser.parse(argv))
    args["size"] = tuple(args["size"])
    try:
        with left_on_signals():
            gsv, trees = write_toy_city(args.pop("output"), progress=True, **args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {gsv} and {trees}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
