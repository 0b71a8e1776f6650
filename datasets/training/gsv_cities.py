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
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from utils.system import distributed

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
    """The cities in a GSV-Cities folder: the known ones in their order, then any others alphabetically.

    Raises:
        FileNotFoundError: the folder, or any csv in it, is missing.
    """
    present = {path.stem for path in tables(folder)}
    if not present:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no GSV-Cities in {folder}: {first_missing(folder)}; check --eval_datasets_folder, whose gsv_cities "
                "is read by default, or download GSV-Cities and name its folder with --train_dataset_folder"
            )
        below = folder / "gsv_cities"  # as in the toy city and in converted photos
        remedy = f"give {below}" if tables(below) else "download GSV-Cities, or name its folder"
        raise FileNotFoundError(
            f"no GSV-Cities in {folder}: {folder}/Dataframes/<City>.csv is missing; {remedy} with "
            "--train_dataset_folder"
        )
    return [city for city in CITIES if city in present] + sorted(present.difference(CITIES))


def select_cities(folders: Sequence[Path], cities: Sequence[str] | None = None) -> list[tuple[Path, str]]:
    """The selected cities, each with its folder; a name in several folders is a city in each of them.

    Args:
        folders: folders in GSV-Cities' format.
        cities: names, in the order of the labels; None takes all, folder by folder, as `find_cities` sorts them.

    Raises:
        FileNotFoundError: a folder has no table, or no folder has a name.
        ValueError: a folder is given twice.
    """
    for i, folder in enumerate(folders):
        if twin := next((other for other in folders[:i] if other.resolve() == folder.resolve()), None):
            raise ValueError(f"--train_dataset_folder {twin} and {folder} are the same folder; name each once")
    found = [(folder, city) for folder in folders for city in find_cities(folder)]
    if cities:
        if absent := [city for city in cities if all(name != city for _, name in found)]:
            raise FileNotFoundError(
                f"no table {', '.join(f'{city}.csv' for city in absent)} in "
                f"{', '.join(f'{folder}/Dataframes' for folder in folders)}; leave {' '.join(absent)} out of --cities "
                "or add the file"
            )
        found = [(folder, name) for city in cities for folder, name in found if name == city]
        if unused := [str(folder) for folder in folders if all(folder != other for other, _ in found)]:
            logger.warning("--cities %s uses nothing from %s", " ".join(cities), " and ".join(unused))
    else:
        _warn_of_missing(found)
    for city, count in Counter(name for _, name in found).items():
        if count > 1:
            logger.warning(
                "%s is in %s: read as %d cities, so a place in two of them would count as two places",
                city,
                " and ".join(str(folder) for folder, name in found if name == city),
                count,
            )
    return found


def _warn_of_missing(found: Sequence[tuple[Path, str]]) -> None:
    """Names the missing ones of the 23 known cities, unless all are missing."""
    # A folder with none of them holds other data, as does the toy city's: nothing is missing there.
    present = {city: folder for folder, city in found if city in CITIES and not (folder / MADE).exists()}
    if missing := [city for city in CITIES if city not in present] if present else []:
        folders = " and ".join(dict.fromkeys(map(str, present.values())))
        logger.warning("%d of the 23 cities of GSV-Cities are not in %s: %s", len(missing), folders, " ".join(missing))


def _is_whole(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


class _Padded(dict[str, str]):
    """Whole numbers as text, zero-padded to a width; each is computed once."""

    def __init__(self, width: int):
        self.width = width

    def __missing__(self, text: str) -> str:
        if not _is_whole(text):  # int() takes 1_0 too
            raise ValueError(f"{text!r} is not a whole number")
        self[text] = f"{int(text):0{self.width}d}"
        return self[text]


_PLACES, _YEARS, _MONTHS, _DEGREES = _Padded(7), _Padded(4), _Padded(2), _Padded(3)


def image_name(
    place_id: str,
    year: str,
    month: str,
    northdeg: str,
    city_id: str,
    lat: str,
    lon: str,
    panoid: str,
    latitude: type[float] = float,
    longitude: type[float] = float,
) -> str:
    """The file name of a csv row's image, without its folder; lat and lon as Python prints those types."""
    return (
        f"{city_id}_{_PLACES[place_id]}_{_YEARS[year]}_{_MONTHS[month]}_{_DEGREES[northdeg]}"
        f"_{latitude(lat)!r}_{longitude(lon)!r}_{panoid}.jpg"
    )


def _text_of(path: Path) -> str:
    """A table's UTF-8 text with \n between its lines; a byte order mark is dropped.

    Raises:
        ValueError: it is not UTF-8; the message names the line.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b".").splitlines())
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the table as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_city(folder: Path, city: str) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """Reads the table of one city.

    Returns:
        The place_id and the path below `<folder>/Images` (UTF-8) of each row.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a row does not follow the format.
    """
    path = folder / "Dataframes" / f"{city}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}; leave {city} out of --cities or add the file")
    text = _text_of(path)
    # Half a million rows in all: csv.DictReader would take twice the time; csv.reader is only for quoted fields.
    reader = csv.reader(io.StringIO(text, newline="")) if '"' in text else None
    rows = (line.split(",") for line in text.split("\n")) if reader is None else iter(reader)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: {error}; a table starts with the columns {','.join(COLUMNS)}") from error
    if missing := [column for column in COLUMNS if column not in header]:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)}; a table starts with the columns {','.join(COLUMNS)}, in "
            "any order, separated by commas"
        )
    columns = itemgetter(*map(header.index, COLUMNS))
    table, places, names, line = [], [], [], 1
    try:
        for row in rows:
            line += 1
            if len(row) > 1 or (row and row[0].strip()):  # skip blank lines
                table.append(values := columns(row))
                places.append(int(_PLACES[values[0]]))
                names.append(f"{values[4]}/{image_name(*values)}".encode())
                if "_" in values[5] or "_" in values[6]:  # float() takes 5_1.0 too
                    raise ValueError(f"{values[5]}, {values[6]} is not a latitude and longitude")
    except (IndexError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {line if reader is None else reader.line_num}: {error!r}; the columns "
            f"{','.join(COLUMNS)} are needed, the first four as whole numbers"
        ) from error
    # GSV-Cities' own loader reads a column of only whole numbers as integers: _51_0_ instead of _51.0_0.0_. No
    # published table has such a column, so the files decide.
    types = [int if all(_is_whole(values[column]) for values in table) else float for column in (5, 6)]
    if table and int in types:
        integers = [f"{values[4]}/{image_name(*values, *types)}".encode() for values in table]
        if (folder / "Images" / integers[0].decode()).exists():
            names = integers
    if places and not 0 <= min(places) <= max(places) < LABELS_PER_CITY:
        raise ValueError(f"{path} has a place_id outside 0 to {LABELS_PER_CITY - 1}, so cities would share labels")
    return np.array(places, dtype=np.int64), np.array(names, dtype=np.bytes_)


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

    Attributes:
        cities: their names, in the order of the labels.

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
        labels = np.concatenate([ids + LABELS_PER_CITY * index for index, (ids, _) in enumerate(rows)])
        names = np.concatenate([names for _, names in rows])
        order = np.argsort(labels, kind="stable")
        unique, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
        enough = counts >= images_per_place
        self.names = names[order]
        self.labels, self.first, self.counts = unique[enough], first[enough], counts[enough]
        if not len(self.labels):
            raise ValueError(
                f"no place in {', '.join(map(str, self.folders))} ({', '.join(self.cities)}) has {images_per_place} "
                "images; "
                "lower --images_per_place or add cities"
            )

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
        found = hashlib.sha256(self.names.tobytes())
        for array in (self.labels, self.first, self.counts):
            found.update(array.tobytes())
        return found.hexdigest()[:16]

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
        """The images (bytes, K x 3 x H x W) and the label of a place.

        Args:
            key: epoch and place; with the seed they decide every random draw, in any process.
        """
        epoch, place = key
        rng = np.random.default_rng((self.seed, epoch, place))
        paths = self.image_paths(place)
        chosen = rng.choice(len(paths), size=self.images_per_place, replace=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            images = torch.stack([self.transform(open_image(paths[index])) for index in chosen])
        return images, int(self.labels[place])


class PlaceBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, place) keys for `GSVCities`; before each pass set `epoch`, and `start` to skip batches.

    Each city's rows are shuffled and its places taken in order of first appearance, city after city. So nearly every
    batch comes from one city, and its negatives are harder. The last batch may be short.

    Args:
        dataset: the places.
        batch_size: places per batch.
        place_order: "fixed" keeps the first epoch's order, as the released code does; "reshuffled" draws a new one each
            epoch, as GSV-Cities' own code does, and so does "similar", as the starting point of `mined`.

    Attributes:
        mined: order of the current epoch by what the model confuses, if there is one; see `similar_places`.

    Raises:
        ValueError: there are fewer than two places, or a batch holds too few of them.

    With several processes, each gets a contiguous share of every batch, so that the shares together are the batch in
    order. If its share of a short last batch is empty, it gets a place that does not count, see `shares`.
    """

    def __init__(self, dataset: GSVCities, *, batch_size: int, place_order: str = "fixed"):
        if len(dataset) < 2:
            raise ValueError(
                f"{dataset}: training needs at least two places; add cities, or lower --images_per_place to keep "
                "places with fewer images"
            )
        if batch_size < distributed.world_size():
            raise ValueError(
                f"--train_batch_size {batch_size} is too small for {distributed.world_size()} processes, which need a "
                "place each; use at least that many"
            )
        if batch_size < 2:
            raise ValueError(
                f"--train_batch_size {batch_size} leaves the loss no negatives (the other places of a batch); "
                "use 2 or more"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.place_order = place_order
        self.epoch = 0
        self.mined: NDArray[np.int64] | None = None
        self.start = 0  # the next batch of the epoch

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return -(-len(self.dataset) // self.batch_size)

    @property
    def by_similarity(self) -> bool:
        """Whether `mined` must be set from the second epoch on: the order is "similar", and there are several
        batches."""
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
