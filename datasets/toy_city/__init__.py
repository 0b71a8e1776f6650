"""A made city: rendered street views in the layouts of GSV-Cities (training) and of the evaluation trees.

Place recognition data sets are large and some need a licence. This package renders a small stand-in within a minute,
so that training, evaluation and the tests run anywhere. Streets are rows of houses told apart by their structure
(rooflines, window grids, doors, shop fronts), while all colours come from one shared palette, and every visit has its
own camera pose, light, weather and passers-by. A model must therefore learn what stays: the buildings. Numbers
measured here say that the code works; they say nothing about real cities.

    python -m datasets.toy_city --output data

    strip.py    the surface that is drawn on, in metres, and the palette
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
