"""Camera and light: renders what a visit sees of a street, from its pose, in its light and weather, as a photograph."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from .facades import draw_cars, draw_people
from .strip import PIXELS_PER_METRE, Strip, shade

PAVEMENT_WIDTH = 3.0


# How much two visits of a place differ: in what happens in the street (sunlight against sky, shadows, fog, lit windows)
# and in the camera (exposure, white balance, contrast, saturation, noise, blur).
LIGHTING, EXPOSURE = 0.6, 0.2
TIMES = (0.70, 0.15, 0.13, 0.02)  # how often it is day, golden hour, dusk, night
WEATHERS = (0.50, 0.30, 0.08, 0.12)  # clear, overcast, fog, rain


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


def draw_camera(rng: Generator, x: float) -> Camera:
    """Draw the pose of a visit to the place at `x` metres along a street."""
    middle = np.array([x, 2.3, 11.0, 0.0, 13.0, 0.0, 66.0])  # of the fields in their order
    reach = np.array([2.5, 0.3, 1.2, 7.0, 1.0, 1.0, 3.0])  # to either side
    return Camera(*rng.uniform(middle - reach, middle + reach).tolist())


def warp(
    plane: Strip, image: Image.Image, left: float, depth: float, camera: Camera, size: tuple[int, int]
) -> np.ndarray:
    """Project `image`, the RGBA texture of an upright plane from `left` metres along the street on, `depth` metres from
    the camera: float32, 4 x height x width, in 0..1."""
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


def draw_look(rng: Generator) -> Look:
    """Draw the light and weather of one visit."""
    time = rng.choice(4, p=TIMES)
    weather = rng.choice(4, p=WEATHERS)
    light = np.array([(1, 1, 1), (1.12, 0.92, 0.7), (0.5, 0.52, 0.66), (0.3, 0.28, 0.3)][time])
    zenith = np.array([(0.32, 0.52, 0.86), (0.42, 0.5, 0.72), (0.2, 0.22, 0.4), (0.03, 0.03, 0.07)][time])
    horizon = np.array([(0.75, 0.85, 0.95), (0.98, 0.78, 0.52), (0.6, 0.42, 0.42), (0.12, 0.1, 0.12)][time])
    if weather > 0:
        grey = (0.85, 0.25)[int(time >= 2)] * rng.uniform(0.75, 1.1)
        zenith, horizon = np.full(3, grey * 0.92), np.full(3, grey)
        light = light * np.array([0.82, 0.85, 0.9])
    fog = rng.uniform(0.2, 0.45) * LIGHTING if weather == 2 else 0.0
    lit = (0.1, 0.2, 0.5, 0.5)[time]
    # Facades against the light are darker than the sky, sunlit ones under clouds brighter: only the outline stays.
    light = light * 2 ** (LIGHTING * rng.uniform(-0.8, 0.6))
    veil = 2 ** (LIGHTING * rng.uniform(-1.2, 0.2))
    zenith, horizon = zenith * veil, horizon * veil
    light, zenith, horizon = np.stack([light, zenith, horizon]).astype(np.float32)[..., None, None]
    return Look(light, zenith, horizon, bool(weather == 0 and time < 2), fog, bool(weather == 3), lit)


def draw_background(camera: Camera, rays: np.ndarray, look: Look, rng: Generator) -> np.ndarray:
    """Return the sky above the horizon and the pavement and road below it, 3 x height x width in 0..1."""
    ray_x, ray_y, ray_z = rays
    rgb = look.horizon + (look.zenith - look.horizon) * np.clip(ray_y / ray_z, 0, 1)
    if look.sunny:
        clouds = Image.fromarray(rng.uniform(-1, 1, (4, 6)).astype(np.float32))
        cover = np.asarray(clouds.resize(ray_x.shape[::-1], Image.Resampling.BICUBIC)) * 1.5 * LIGHTING
        rgb = rgb + (look.horizon * 1.05 - rgb) * np.clip(cover, 0, 1)

    to_ground = camera.height / np.maximum(-ray_y, 1e-3)
    x, z = camera.x + to_ground * ray_x, to_ground * ray_z - camera.distance
    slabs = np.where((x % 1.5 < 0.06) | (z % 1.0 < 0.05), np.float32(0.48), np.float32(0.58))
    road = np.where(z > -PAVEMENT_WIDTH - 0.25, np.float32(0.72), np.float32(0.3))
    ground = np.where(z > -PAVEMENT_WIDTH, slabs, road) * (0.8 if look.rain else 1.0)
    return np.where(ray_y < 0, ground * look.light, rgb)


def visit_texture(street: Strip, first: int, last: int, look: Look, rng: Generator) -> Image.Image:
    """Return the facades between two pixel columns with lamps, reflections or curtains in some of the windows."""
    texture = street.image.crop((first, 0, last, street.image.height))
    pen = ImageDraw.Draw(texture)
    glow = (255, 214, 140) if look.lit_windows > 0.3 else (190, 200, 205)
    for left, top, right, bottom in street.panes:
        if left < last and right > first and rng.random() < look.lit_windows * LIGHTING:
            pen.rectangle((left - first, top, right - first, bottom), fill=shade(glow, rng.uniform(0.7, 1.0)))
    return texture


def render_view(street: Strip, camera: Camera, rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Render one visit, an RGB image of `size` (width, height): what `camera`, which must stand within the length of
    `street`, sees of it in a light, weather and traffic drawn from `rng`."""
    look, (width, height) = draw_look(rng), size
    pixels = np.ones((3, height, width), dtype=np.float32)
    pixels[0], pixels[1] = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    rays = np.tensordot(camera.rays(size).astype(np.float32), pixels, axes=1)
    rgb = draw_background(camera, rays, look, rng)

    reach = camera.distance * 1.6
    first = max(0, round((camera.x - reach) * PIXELS_PER_METRE))
    last = round((camera.x + reach) * PIXELS_PER_METRE)
    texture = visit_texture(street, first, last, look, rng)
    facade = warp(street, texture, first / PIXELS_PER_METRE, camera.distance, camera, size)
    light = look.light
    if look.sunny:
        x = camera.x + camera.distance * rays[0] / rays[2]
        y = camera.height + camera.distance * rays[1] / rays[2]
        dim = 1 - np.array([0.62, 0.58, 0.5], dtype=np.float32)[:, None, None] * LIGHTING
        # The houses across the street, each from an edge to the next, cast their shadow.
        slant, edges, heights = rng.uniform(-0.8, 0.8), np.cumsum(rng.uniform(3, 9, 12)) - 30, rng.uniform(-2, 8, 13)
        light = np.where(y < heights[np.searchsorted(edges, x - x.mean() + slant * y)], light * dim, light)
    rgb = rgb + (facade[:3] * light - rgb) * facade[3]

    for plane, depth in (
        (draw_people(rng, 2 * reach), camera.distance - rng.uniform(0.5, 2.5)),
        (draw_cars(rng, 2 * reach), camera.distance - PAVEMENT_WIDTH - 1.0),
    ):
        if plane.image.getbbox() is not None:
            figures = warp(plane, plane.image, camera.x - reach, depth, camera, size)
            rgb = rgb + (figures[:3] * look.light - rgb) * figures[3]

    rgb = rgb + (look.horizon - rgb) * look.fog
    # One side of the street lies brighter than the other.
    rgb = rgb * (1 + LIGHTING * rng.uniform(-0.5, 0.5) * np.linspace(-1, 1, width, dtype=np.float32))
    return photograph(rgb, look, rng)


def photograph(rgb: np.ndarray, look: Look, rng: Generator) -> Image.Image:
    """Turn a 3 x height x width scene in 0..1 into a photograph: exposure, white balance, rain, blur and noise."""
    _, height, width = rgb.shape
    if look.rain:
        streaks = (rng.random((height // 6 + 1, width)) < 0.03).repeat(6, axis=0)[:height]
        rgb = rgb + np.float32(0.2) * streaks
    # A camera's automatic exposure keeps most pictures readable but never quite evens them out.
    metered = (0.42 / max(float(rgb.mean()), 0.02)) ** 0.75
    white_balance = rng.normal(0, 0.14, (3, 1, 1)).astype(np.float32)
    gain = metered * 2 ** (EXPOSURE * (rng.uniform(-0.6, 0.6) + white_balance))
    grey = rgb.mean(axis=0)
    rgb = grey + (rgb - grey) * (1 + EXPOSURE * rng.uniform(-0.6, 0.25))
    rgb = np.clip(rgb * gain, 0, 1) ** (2 ** (EXPOSURE * rng.uniform(-0.45, 0.45)))
    rgb = (rgb - 0.5) * (1 + EXPOSURE * rng.uniform(-0.25, 0.2)) + 0.5
    noise = rng.standard_normal(rgb.shape, dtype=np.float32)
    rgb = rgb + noise * EXPOSURE * rng.uniform(0.005, 0.035)
    pixels = (np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return image.filter(ImageFilter.GaussianBlur(EXPOSURE * rng.uniform(0.2, 0.9)))
