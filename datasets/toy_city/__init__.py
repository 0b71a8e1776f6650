"""A synthetic city: rendered street views in the layouts of GSV-Cities (training) and of evaluation datasets.

Place recognition datasets are large and some need a licence. This package renders a small substitute within a minute,
so that training, evaluation and the tests run anywhere. Streets are rows of houses that differ in structure (rooflines,
window grids, doors, shop fronts), while all colours come from one shared palette, and every visit has its own camera
pose, light, weather and passers-by. So a model must learn what stays: the buildings. Numbers measured here show that
the code works; they say nothing about real cities.

    python -m datasets.toy_city --output data

    strip.py    the surface to draw on, in metres, and the palette
    facades.py  houses and gaps, people and cars
    views.py    camera, light and weather, the photograph
    layout.py   streets, names and tables on disk: `write_toy_city`
    command.py  the command line

World frame of a street, in metres: x runs east along the facades, y up from the pavement, z north; the facades stand
in the plane z = 0 and the camera south of it, so a heading of 0 degrees looks straight at them.
"""

from .command import main
from .layout import CITIES, write_toy_city
from .strip import Strip
from .views import Camera, Difficulty, warp

__all__ = ["CITIES", "Camera", "Difficulty", "Strip", "main", "warp", "write_toy_city"]
