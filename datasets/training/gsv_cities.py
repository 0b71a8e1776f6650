"""GSV-Cities (Ali-bey et al. 2022): street-view photos grouped by place, the training set.

<folder>/Dataframes/<City>.csv     place_id,year,month,northdeg,city_id,lat,lon,panoid
<folder>/Images/<City>/<City>_<place_id, 7 digits>_<year>_<month>_<northdeg>_<lat>_<lon>_<panoid>.jpg
"""

import csv
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from utils.system import distributed
from utils.system.files import read_text

from ..photos.listing import first_missing
from ..photos.transforms import open_image

logger = logging.getLogger(__name__)

# The order matters for labels: label = place_id + 100,000 * index of the city.
CITIES = (
    "Bangkok", "BuenosAires", "LosAngeles", "MexicoCity", "OSL", "Rome", "Barcelona", "Chicago", "Madrid", "Miami",
    "Phoenix", "TRT", "Boston", "Lisbon", "Medellin", "Minneapolis", "PRG", "WashingtonDC", "Brussels", "London",
    "Melbourne", "Osaka", "PRS",
)  # fmt: skip
LABELS_PER_CITY = 100_000
MADE = "MADE.txt"  # marks a folder in this format that holds synthetic photos
COLUMNS = ("place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid")


def tables(folder: Path) -> list[Path]:
    """The csv files of a GSV-Cities folder, sorted; without hidden ones, such as macOS leaves."""
    return sorted(path for path in (folder / "Dataframes").glob("*.csv") if not path.name.startswith("."))


def find_cities(folder: Path) -> list[str]:
    """The cities in a GSV-Cities folder, at least one: known ones in their order, then any others alphabetically."""
    if present := {path.stem for path in tables(folder)}:
        return [city for city in CITIES if city in present] + sorted(present.difference(CITIES))
    missing = f"{folder}/Dataframes/<City>.csv is missing" if folder.is_dir() else first_missing(folder)
    below = folder / "gsv_cities"  # as in the toy city and in converted photos
    remedy = f"give {below}" if tables(below) else "check eval_datasets_folder, or name the folder of GSV-Cities"
    raise FileNotFoundError(f"no GSV-Cities in {folder}: {missing}; {remedy} with train_dataset_folder")


def select_cities(folders: Sequence[Path], cities: Sequence[str] | None = None) -> list[tuple[Path, str]]:
    """The selected cities, each with its folder; a name in several folders is a city in each of them.

    Args:
        folders: folders in GSV-Cities' format.
        cities: names, in the order of the labels; None takes all, folder by folder, as `find_cities` sorts them.

    Raises:
        FileNotFoundError: a folder has no table, or no folder has a name.
    """
    selected = [(folder, city) for folder in folders for city in find_cities(folder)]
    if cities:
        if absent := sorted(set(cities).difference(city for _, city in selected)):
            where = ", ".join(f"{folder}/Dataframes" for folder in folders)
            raise FileNotFoundError(f"no table for cities {' '.join(absent)} in {where}; leave them out or add it")
        selected = [(folder, name) for city in cities for folder, name in selected if name == city]
    # A folder with none of the 23 holds other data, as does the toy city's: nothing is missing there.
    present = {city: folder for folder, city in selected if city in CITIES and not (folder / MADE).exists()}
    missing = [city for city in CITIES if city not in present]
    if present and missing and not cities:
        where = " and ".join(dict.fromkeys(map(str, present.values())))
        logger.warning("%d of the 23 cities of GSV-Cities are not in %s: %s", len(missing), where, " ".join(missing))
    for city, count in Counter(name for _, name in selected).items():
        if count > 1:
            where = " and ".join(str(folder) for folder, name in selected if name == city)
            logger.warning("%s is in %s: read as %d cities; a place in two of them counts twice", city, where, count)
    return selected


@cache  # a quarter of the time of reading a table
def _padded(text: str, width: int) -> str:
    return f"{int(text):0{width}d}"


def image_name(row: Sequence[str]) -> str:
    """The file name of the image of a row, in the order of `COLUMNS`; lat and lon as Python prints floats."""
    place_id, year, month, northdeg, city_id, lat, lon, panoid = row
    return (
        f"{city_id}_{_padded(place_id, 7)}_{_padded(year, 4)}_{_padded(month, 2)}_{_padded(northdeg, 3)}"
        f"_{float(lat)!r}_{float(lon)!r}_{panoid}.jpg"
    )


def read_city(folder: Path, city: str) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """The place_id and the path below `<folder>/Images` (UTF-8) of each row of a city's table."""
    path = folder / "Dataframes" / f"{city}.csv"
    # Half a million rows in all: csv.DictReader would take twice the time.
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    places, names = [], []
    try:
        header = next(reader, [])
        if missing := [column for column in COLUMNS if column not in header]:
            raise ValueError(f"no column {', '.join(missing)}")
        columns = itemgetter(*map(header.index, COLUMNS))
        for row in reader:
            if len(row) > 1 or (row and row[0].strip()):  # skip blank lines
                values = columns(row)
                places.append(int(values[0]))
                names.append(f"{values[4]}/{image_name(values)}".encode())
    except (IndexError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; a table has the columns {','.join(COLUMNS)}, separated by "
            "commas, the first four as whole numbers, in UTF-8"
        ) from error
    if places and not 0 <= min(places) <= max(places) < LABELS_PER_CITY:
        raise ValueError(f"{path} has a place_id outside 0 to {LABELS_PER_CITY - 1}, so cities would share labels")
    return np.array(places, dtype=np.int64), np.array(names, dtype=np.bytes_)


def _require_one_label(
    selected: Sequence[tuple[Path, str]], rows: Sequence[tuple[NDArray[np.int64], NDArray[np.bytes_]]]
) -> None:
    """Refuses photos of two tables, which would be their own negatives, and warns of rows that a table repeats."""
    tables_of: dict[tuple[Path, bytes], Path] = {}
    for (folder, city), (_, names) in zip(selected, rows, strict=True):
        table, root = folder / "Dataframes" / f"{city}.csv", folder.resolve()
        photos = dict.fromkeys((root, name) for name in names.tolist())
        if len(photos) < len(names):
            logger.warning("%s repeats %d of its rows; these photos count twice", table, len(names) - len(photos))
        if shared := [photo for photo in photos if photo in tables_of]:
            raise ValueError(
                f"{table} and {tables_of[shared[0]]} share {len(shared)} photos, e.g. {shared[0][1].decode()}; remove "
                "one of the tables, name the others with cities, or give each train_dataset_folder once"
            )
        tables_of |= dict.fromkeys(photos, table)


class GSVCities(Dataset[tuple[Tensor, int]]):
    """Places of GSV-Cities; an item is one place: K of its images and its label.

    The table is kept in NumPy arrays sorted by place: a place's images are one slice, and worker processes share the
    arrays instead of copying them.

    Args:
        folders: one or several folders with `Dataframes` and `Images`; their cities follow each other.
        cities: the cities in the order of the labels; None takes all. See `select_cities`.
        images_per_place: K; places with fewer images are left out.
        transform: a Pillow image to bytes 3 x H x W; any random numbers come from torch's global generator.
        seed: seed of the choice of images and of their augmentation.

    Raises:
        FileNotFoundError, ValueError: a city's table is missing or broken, or no place has K images.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        *,
        cities: Sequence[str] | None = None,
        images_per_place: int = 4,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
    ):
        self.folders = [folders] if isinstance(folders, Path) else list(folders)
        selected = select_cities(self.folders, cities)
        self._city_folders = [folder for folder, _ in selected]
        self.cities = [city for _, city in selected]
        self.images_per_place = images_per_place
        self.transform = transform
        self.seed = seed
        rows = [read_city(folder, city) for folder, city in selected]
        _require_one_label(selected, rows)
        labels = np.concatenate([ids + LABELS_PER_CITY * index for index, (ids, _) in enumerate(rows)])
        names = np.concatenate([names for _, names in rows])
        order = np.argsort(labels, kind="stable")
        unique, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
        enough = counts >= images_per_place
        self.names = names[order]
        self.labels, self.first, self.counts = unique[enough], first[enough], counts[enough]
        if not len(self.labels):
            where = f"{', '.join(map(str, self.folders))} ({', '.join(self.cities)})"
            raise ValueError(f"no place in {where} has {images_per_place} images; lower images_per_place or add cities")

    def __str__(self) -> str:
        several = f", {len(self.folders)} folders" if len(self.folders) > 1 else ""
        cities = f"{len(self.cities)} cities" if len(self.cities) > 1 else self.cities[0]
        return f"{len(self.labels)} places ({self.image_count} images, {cities}{several})"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_count(self) -> int:
        """Number of images of all places."""
        return int(self.counts.sum())

    @property
    def digest(self) -> str:
        """Digest of the tables, which differs for other places and images even if their numbers are the same."""
        digest = hashlib.sha256(self.names.tobytes())
        for array in (self.labels, self.first, self.counts):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def image_paths(self, place: int) -> list[str]:
        """Paths of all images of a place."""
        names = self.names[self.first[place] : self.first[place] + self.counts[place]]
        folder = self._city_folders[self.labels[place] // LABELS_PER_CITY] / "Images"
        return [f"{folder}/{name.decode()}" for name in names.tolist()]

    def drawn_paths(self, place: int, count: int, rng: np.random.Generator) -> list[str]:
        """Paths of `count` images of a place, drawn without replacement, or of all if there are fewer."""
        paths = self.image_paths(place)
        return [paths[index] for index in rng.choice(len(paths), size=min(count, len(paths)), replace=False)]

    def all_image_paths(self) -> list[str]:
        """Paths of the images of every place."""
        return [path for place in range(len(self)) for path in self.image_paths(place)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Images (bytes, K x 3 x H x W) and label of a place; epoch, place and seed decide every random draw."""
        epoch, place = key
        rng = np.random.default_rng((self.seed, epoch, place))
        paths = self.drawn_paths(place, self.images_per_place, rng)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            images = torch.stack([self.transform(_open_image(path)) for path in paths])
        return images, int(self.labels[place])


def _open_image(path: str) -> Image.Image:
    try:
        return open_image(path)
    except ValueError as error:  # its remedies are those of an evaluation
        what, _, _ = str(error).partition("; ")
        raise ValueError(f"{what}; replace the file; python3 -m datasets.check finds all such files") from error


class PlaceBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, place) keys for `GSVCities`; before each pass set `epoch`, and `start` to skip batches.

    Each city's rows are shuffled and its places taken in order of first appearance, city after city. So nearly every
    batch comes from one city, and its negatives are harder. The last batch may be short.

    With several processes, each gets a contiguous share of every batch, so that the shares together are the batch in
    order. If its share of a short last batch is empty, it gets a place that does not count, see `shares`.

    Args:
        place_order: "fixed" keeps the first epoch's order, as the released code does; "reshuffled" draws a new one each
            epoch, as GSV-Cities' own code does, and so does "similar", as the starting point of `mined`.

    Raises:
        ValueError: there are fewer than two places, or a batch holds too few of them.
    """

    def __init__(self, dataset: GSVCities, *, batch_size: int, place_order: str = "fixed"):
        if len(dataset) < 2:
            raise ValueError(f"{dataset}: training needs at least two places; add cities, or lower images_per_place")
        if batch_size < max(processes := distributed.world_size(), 2):
            of = f"{processes} process{'es' * (processes > 1)}, each with a place, and for a loss that compares places"
            raise ValueError(f"train_batch_size {batch_size} is too small for {of}; use {max(processes, 2)} or more")
        self.dataset = dataset
        self.batch_size = batch_size
        self.place_order = place_order
        self.epoch = 0
        self.mined: NDArray[np.int64] | None = None  # the epoch's order by what the model confuses, if there is one
        self.start = 0  # the next batch of the epoch

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return -(-len(self.dataset) // self.batch_size)

    @property
    def by_similarity(self) -> bool:
        """Whether `mined` must be set from the second epoch on: the order is "similar", with several batches."""
        return self.place_order == "similar" and len(self) > 1

    def shares(self, step: int) -> list[int]:
        """How many places of an epoch's batch (counted from 0) each process has."""
        places = min(self.batch_size, len(self.dataset) - step * self.batch_size)
        return [share.stop - share.start for share in distributed.shares(places)]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The places in the order of an epoch."""
        rng = np.random.default_rng((self.dataset.seed, 0 if self.place_order == "fixed" else epoch))
        cities = self.dataset.labels // LABELS_PER_CITY
        order = []
        for city in np.unique(cities):
            places = np.flatnonzero(cities == city)
            rows = rng.permutation(np.repeat(places, self.dataset.counts[places]))
            shuffled, first = np.unique(rows, return_index=True)
            order.append(shuffled[np.argsort(first)])
        return np.concatenate(order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order(self.epoch) if self.mined is None else self.mined
        for start in range(self.start * self.batch_size, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            share = batch[distributed.shares(len(batch))[distributed.rank()]]
            yield [(self.epoch, int(place)) for place in (share if len(share) else batch[:1])]
