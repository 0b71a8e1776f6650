"""The toy city on disk: its streets, their positions, and the names and tables of their photos."""

import csv
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from utils.system.signals import mapped, process_pool

from .facades import draw_facades
from .views import Camera, draw_camera, render_view

Row = dict[str, Any]

# As GSV-Cities derives it from a row.
IMAGE_NAME = "{city_id}_{place_id:07d}_{year:04d}_{month:02d}_{northdeg:03d}_{lat}_{lon}_{panoid}.jpg"

STRIP_MARGIN = 20.0  # metres of facades beyond the outermost places

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
class Street:
    """One street to render: everything a worker process needs."""

    group: str  # training city, or evaluation split
    index: int  # in its group
    places: int
    spacing: float  # metres between two places
    visits: int  # images of each place; an evaluation place has a database visit and a query visit
    folder: Path  # where the images of the group go
    seed: int
    size: tuple[int, int]


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


def panorama_name(rng: Generator) -> str:
    """Draw a 22-letter panorama name."""
    return "".join(rng.choice(list(ascii_letters + digits), 22))


def evaluation_name(easting: float, northing: float, camera: Camera, rng: Generator) -> str:
    """Return the file name of an evaluation image, with the camera position in UTM metres."""
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
            camera = draw_camera(rng, STRIP_MARGIN + place * street.spacing)
            image = render_view(facades, camera, rng, street.size)
            if street.group in CITIES:
                rows.append(training_row(street, place, camera, rng))
                path = street.folder / IMAGE_NAME.format(**rows[-1])
            else:
                block = FIRST_EASTING + street.index * (length + STREET_GAP)
                name = evaluation_name(block + camera.x, SPLIT_NORTHING[street.group] - camera.distance, camera, rng)
                path = street.folder / ("database" if visit == 0 else "queries") / name
            path.parent.mkdir(parents=True, exist_ok=True)
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
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Path, Path]:
    """Render a synthetic city and write it in the layouts of GSV-Cities and of evaluation datasets.

    The files depend on the seed and the sizes, never on the number of workers.

    Args:
        output: folder that receives `gsv_cities` and `toy_city`; for what is not listed here see the command's options.
        places: places per training street, 25 metres apart.
        cluster_streets: streets of the train split, which only serves to initialise the cluster centres.
        spots: places along an evaluation street, 10 metres apart, with one database image and one query each.

    Returns:
        The two folders written.

    Raises:
        FileExistsError: a folder exists, and `overwrite` is False.
    """
    if min(train_streets, places, visits, test_streets, val_streets, cluster_streets, spots, *size) < 1:
        raise ValueError("all sizes must be at least 1")
    targets = output / "gsv_cities", output / "toy_city"
    if (existing := [target for target in targets if target.exists()]) and not overwrite:
        raise FileExistsError(f"{existing[0]} exists: pass --overwrite to replace it")
    output.mkdir(parents=True, exist_ok=True)
    # Everything is written beside its destination and renamed at the end, so a killed run leaves no half-written city.
    with tempfile.TemporaryDirectory(prefix=".toy_city_", dir=output) as name:
        gsv, trees = Path(name, "gsv_cities"), Path(name, "toy_city")
        (gsv / "Dataframes").mkdir(parents=True)
        (gsv / "MADE.txt").write_text(f"Drawn by datasets.toy_city, seed {seed}; nothing of GSV-Cities is here.\n")
        streets = []
        for city in cities:
            folder = gsv / "Images" / city
            streets += [Street(city, i, places, 25.0, visits, folder, seed, size) for i in range(train_streets)]
        for split, count in (("train", cluster_streets), ("val", val_streets), ("test", test_streets)):
            folder = trees / "images" / split
            streets += [Street(split, i, spots, 10.0, 2, folder, seed, size) for i in range(count)]
        with mapped(process_pool(workers), render_street, streets) as rendered:
            rows = list(tqdm(rendered, total=len(streets), unit="street", disable=not progress))
        for city in cities:
            city_rows = [row for street_rows in rows for row in street_rows if row["city_id"] == city]
            with open(gsv / "Dataframes" / f"{city}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(city_rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(city_rows)
        for source, target in zip((gsv, trees), targets, strict=True):
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
    return targets
