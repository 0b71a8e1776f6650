"""The surface to draw the toy city on: an upright strip in metres, and the palette that all streets share."""

from collections.abc import Sequence

from numpy.random import Generator
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

PIXELS_PER_METRE = 16
STRIP_HEIGHT = 17.0

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


class Strip:
    """An RGBA texture of an upright plane along a street, drawn in metres; alpha is 0 where the sky shows."""

    def __init__(self, length: float, height: float = STRIP_HEIGHT) -> None:
        self.height = height
        self.image = Image.new("RGBA", (round(length * PIXELS_PER_METRE), round(height * PIXELS_PER_METRE)))
        self.draw = ImageDraw.Draw(self.image)
        self.panes: list[tuple[int, int, int, int]] = []  # of windows, which change: left, top, right, bottom in pixels

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
