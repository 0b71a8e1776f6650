"""Turns your photos into GSV-Cities' format, and a held-out area into an evaluation dataset.

    python -m datasets.to_gsv_cities photos --output my_city --name MyCity --val_share 0.15 --test_share 0.15

A source is a folder of photos with positions in their names (`@<UTM east>@<UTM north>@...`, as in evaluation datasets)
or in EXIF data (phones), or a csv with the columns path, and east,north (metres) or lat,lon (degrees) or label, and
optionally heading, time and label. Degrees become UTM metres. The output holds

    gsv_cities/Dataframes/<Name>.csv, gsv_cities/Images/<Name>/...    what train.py trains on
    <Name>/images/{val,test}/{database,queries}/...                   what it is evaluated on, if an area is held out
    photos.csv, summary.txt, places.png                               what became of each photo: list, summary, plot

Photos are links to the originals, except those that EXIF data turn: they are written turned, since training does not
turn photos. A place lies within `--cell` metres: a group of photos that reaches no farther or, of photos that follow
each other along a street, those in one square of a grid. Of places closer than `--gap` only the one with more photos
stays, since a batch must not hold a place under two labels. Merging them instead would turn whole streets into places:
of a walk with a photo every 10 m, 111 cells, it made 1 place, while leaving out keeps 23; of the toy city's 576 cells,
25 m apart along 72 streets, it made 72, while leaving out keeps 216.
"""

from pathlib import Path

from utils.system.command_line import Parser
from utils.system.signals import left_on_signals, quiet_ctrl_c


def command_line() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m datasets.to_gsv_cities",
        usage="%(prog)s SOURCE [SOURCE ...] --output FOLDER [--option value ...]; --help lists all options",
        description="Turn photos into GSV-Cities' format.",
    )
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="SOURCE", help="folder of photos, or a csv")
    add("--output", type=Path, required=True, help="folder to create")
    add("--name", default="Mine", help="name of the city and of the evaluation dataset (default: Mine)")
    add("--copy", action="store_true", help="copy photos instead of linking to them")
    add("--cell", type=float, default=10.0, help="largest extent of a place in metres (default: 10)")
    add("--min_images", type=int, default=4, help="fewest photos per place (default: 4)")
    add(
        "--heading_bins",
        type=int,
        default=1,
        help="split places into this many directions; 1 for no split (default: 1)",
    )
    add("--gap", type=float, default=50.0, help="metres between places, and around what is held out (default: 50)")
    two_corners = "hold out the area between two corners, given as positions in the source are, for"
    add("--val_area", type=float, nargs=4, metavar=("A", "B", "C", "D"), help=f"{two_corners} validation")
    add("--test_area", type=float, nargs=4, metavar=("A", "B", "C", "D"), help=f"{two_corners} the test")
    add("--val_share", type=float, default=0.0, help="or hold out connected cells with this share of the photos")
    add("--test_share", type=float, default=0.0, help="the same for the test")
    add(
        "--queries",
        choices=("time", "random"),
        help="queries are the later half of what is held out, or a random half (default: time if all photos have one)",
    )
    add("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    return parser


if __name__ == "__main__":
    command_line().parse()  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import csv
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import to_pil_image

from utils.system.files import whole

from .own.photos import LABELS, REMEDIES, Collection, Photo, collect
from .own.places import apart, cells_of, connected_share, heading_bins, in_area, map_shape, nearer
from .photos.transforms import read_pixels
from .training.gsv_cities import COLUMNS, LABELS_PER_CITY, image_name

METRES_PER_DEGREE = 111_320.0
POSITIVE = 25.0  # metres from a query to a correct database photo, the default of train.py
IMAGES_PER_PLACE = 4  # the default of train.py
TRAIN, SPLITS = "train", ("val", "test")
NEAR_HELD_OUT, NEAR_PLACE = "nearer than --gap to what is held out for", "a place nearer than --gap to one with"
NO_HEADING, TOO_FEW = "no heading, which --heading_bins asks for", "a place of fewer than"
KEPT = (TRAIN, *(f"{split}/{part}" for split in SPLITS for part in ("database", "queries")))


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a split takes from training: an area, or else a share of the photos.

    Attributes:
        area: two corners, given as positions in the source are; None for none.
        share: share of all photos; 0 for none.
    """

    area: Sequence[float] | None
    share: float


@dataclass(frozen=True)
class Fate:
    """What becomes of the photos.

    Attributes:
        uses: for each photo, one of `KEPT` or why it was dropped.
        places: place of each photo, -1 for none.
        lines: lines to print.
    """

    uses: list[str]
    places: NDArray[np.int64]
    lines: list[str]


def hold_out(
    collection: Collection,
    cells: NDArray[np.int64],
    held_out: Mapping[str, HeldOut],
    *,
    gap: float,
    queries: str | None,
    seed: int,
) -> tuple[NDArray[np.object_], list[str]]:
    """The use of each photo, dropping only what is too near to held-out photos; and lines to print.

    Args:
        collection: the photos.
        cells: cell of each photo.
        held_out: what to hold out, by split.
        gap: metres between held-out photos and others.
        queries: "time", "random", or None for time if all photos have one.
        seed: seed of all random choices.

    Raises:
        ValueError: this cannot be held out.
    """
    photos, metres = collection.photos, collection.metres
    rng, lines = np.random.default_rng(seed), list[str]()
    uses = np.full(len(photos), TRAIN, dtype=object)
    for split, wanted in held_out.items():
        free = uses == TRAIN
        if wanted.area:
            if collection.kind == LABELS:
                raise ValueError(f"--{split}_area needs positions, but there are only labels; use --{split}_share")
            inside = in_area(np.array([photo.position for photo in photos]), wanted.area)
            held = free & inside
            if taken := int((inside & ~free).sum()):
                lines.append(f"{taken} photos in --{split}_area are not in {split}: they are in val or near it")
            if not held.any():
                area = " ".join(f"{value:.10g}" for value in wanted.area)
                raise ValueError(f"--{split}_area {area} contains no photo{_extent(collection)}")
        elif wanted.share:
            if (left := int(free.sum())) < 2:
                raise ValueError(
                    f"--{split}_share {wanted.share:g}: what is held out before, and what is within --gap {gap:g} m of "
                    f"it, leave {left} of {len(photos)} photos; lower --gap, or the share or area held out before"
                )
            held = np.zeros(len(photos), dtype=bool)
            share = wanted.share * len(photos) / max(int(free.sum()), 1)
            held[free] = connected_share(metres[free], cells[free], share, gap, rng)
        else:
            continue
        uses[held] = _database_and_queries(photos, held, split, queries, rng, lines)
        asked = metres[uses == f"{split}/queries"]
        alone = len(asked) - int(nearer(asked, metres[uses == f"{split}/database"], np.nextafter(POSITIVE, 99)).sum())
        lines[-1] += f"; {alone} queries have no database photo within {POSITIVE:g} m" * bool(alone)
        uses[nearer(metres, metres[held], gap) & (uses == TRAIN)] = f"{NEAR_HELD_OUT} {split}"
    return uses, lines


def assign(
    collection: Collection,
    held_out: Mapping[str, HeldOut],
    *,
    cell: float,
    min_images: int,
    bins: int,
    gap: float,
    queries: str | None,
    seed: int,
) -> Fate:
    """Decides what becomes of each photo; for the arguments see the command's options and `hold_out`.

    Raises:
        ValueError: there are fewer than two places to train on, or too many, or nothing can be held out.
    """
    photos, metres = collection.photos, collection.metres
    gap = 0.0 if collection.kind == LABELS else gap  # labels are distinct places
    labels = [photo.label or "" for photo in photos]
    if any(labels) and not all(labels):
        raise ValueError(f"{labels.count('')} of {len(labels)} photos have no label; give labels to all, or none")
    cells = np.unique(labels, return_inverse=True)[1] if any(labels) else cells_of(metres, cell)
    uses, lines = hold_out(collection, cells, held_out, gap=gap, queries=queries, seed=seed)
    if any(labels):
        lines.append(_of_labels(collection, cells, gap))

    train = np.flatnonzero(uses == TRAIN)
    directions = heading_bins([photos[index] for index in train], bins)
    uses[train[directions < 0]] = NO_HEADING
    train, directions = train[directions >= 0], directions[directions >= 0]
    if not len(train):
        fates = ", ".join(f"{count} photos: {use}" for use, count in _lost(collection, uses, KEPT[1:]).items())
        raise ValueError(
            f"no photo is left to train on ({fates}); {_remedy(collection, uses, min_images=min_images, bins=bins)}"
        )
    found = np.unique(np.column_stack((cells[train], directions)), axis=0, return_inverse=True)[1].ravel()
    enough = np.bincount(found)[found] >= min_images
    uses[train[~enough]] = f"{TOO_FEW} {min_images} photos (--min_images)"
    stays = np.zeros(len(train), dtype=bool)
    stays[enough] = apart(metres[train[enough]], found[enough], directions[enough], gap, bins)
    uses[train[enough & ~stays]] = f"{NEAR_PLACE} as many photos or more"
    places = np.full(len(photos), -1)
    places[train[stays]] = np.unique(found[stays], return_inverse=True)[1]
    count = int(places.max()) + 1
    if count < 2:
        reasons = ", ".join(f"{count} photos: {use}" for use, count in _lost(collection, uses).items())
        raise ValueError(
            f"{len(photos)} photos in {len(np.unique(cells))} cells make {count} place{'s' * (count != 1)} to train "
            f"on, but two are needed ({reasons or 'nothing was dropped'}); "
            f"{_remedy(collection, uses, min_images=min_images, bins=bins)}"
        )
    if count > LABELS_PER_CITY:
        raise ValueError(f"{count} places, but a table holds at most {LABELS_PER_CITY}; convert a region at a time")
    return Fate(uses.tolist(), places, lines)


def _of_labels(collection: Collection, cells: NDArray[np.int64], gap: float) -> str:
    """A line on what labels decide, and how many of them cover too large an area for one place."""
    if collection.kind == LABELS:
        return "labels define the places: --cell and --gap have no effect"
    low, high = (np.full((int(cells.max()) + 1, 2), value) for value in (np.inf, -np.inf))
    np.minimum.at(low, cells, collection.metres)
    np.maximum.at(high, cells, collection.metres)
    reach = np.hypot(*(high - low).T)
    line = "labels define the places: --cell has no effect"
    if large := int((reach > max(gap, POSITIVE)).sum()):
        example = collection.photos[int(np.flatnonzero(cells == reach.argmax())[0])].label
        line += f"; {large} labels reach farther than {max(gap, POSITIVE):g} m, {example} {reach.max():.0f} m"
    return line


def _lost(collection: Collection, uses: NDArray[np.object_], also: Sequence[str] = ()) -> Counter[str]:
    """How many photos were dropped for each reason, or have one of these other uses."""
    lost = Counter({reason: len(paths) for reason, paths in collection.dropped.items()})
    lost.update(use for use in uses.tolist() if use not in KEPT or use in also)
    return lost


def _remedy(collection: Collection, uses: NDArray[np.object_], *, min_images: int, bins: int) -> str:
    """What to do about too few places: it follows what most photos were dropped for."""
    labelled = collection.photos[0].label is not None
    held_out = bool(np.isin(uses.astype(str), KEPT[1:]).any())
    fewer = " or ".join(
        ["lower --min_images"] * (min_images > 2)
        + ["lower --heading_bins"] * (bins > 1)
        + ["raise --cell"] * (not labelled)
    )
    options = {
        TOO_FEW: f"{fewer}, or add photos of the same places" if fewer else "add photos of the same places",
        NEAR_PLACE: "lower --gap, or add photos from farther away",
        NEAR_HELD_OUT: "lower --gap, or hold out a smaller share or area",
        NO_HEADING: "leave out --heading_bins, or give all photos headings",
    }
    remedies = Counter[str]()
    for reason, count in _lost(collection, uses).items():
        name = next((name for name in options if reason.startswith(name)), "")
        remedies[options[name] if name else REMEDIES[reason]] += count
    if remedies:
        return remedies.most_common(1)[0][0]
    if held_out:
        return "hold out a smaller share or area, or add photos"
    if labelled:
        return "add photos with another label"
    return (
        "lower --cell, or add photos from farther away" if np.ptp(collection.metres) else "add photos of other places"
    )


def _extent(collection: Collection) -> str:
    given = np.array([photo.position for photo in collection.photos])
    (a, b), (c, d) = given.min(axis=0), given.max(axis=0)
    return f"; the photos lie between {a:.10g} {b:.10g} and {c:.10g} {d:.10g}"


def _database_and_queries(
    photos: Sequence[Photo], held: NDArray[np.bool_], split: str, queries: str | None, rng: Generator, lines: list[str]
) -> NDArray[np.object_]:
    """The use of each held-out photo: the later half, or a random half, are the queries.

    Raises:
        ValueError: there are too few photos, or times do not split them.
    """
    chosen = [photo for photo, is_held in zip(photos, held, strict=True) if is_held]
    times = [photo.time for photo in chosen if photo.time is not None]
    if queries == "time" and len(times) < len(chosen):
        raise ValueError(
            f"--queries time: {len(chosen) - len(times)} of {len(chosen)} photos held out for {split} have no time; "
            "use --queries random"
        )
    if len(chosen) < 2:
        raise ValueError(
            f"held-out photos for {split}: {len(chosen)}, but two are needed; hold out more (--{split}_share)"
        )
    by_time = queries != "random" and len(times) == len(chosen)
    is_query = np.zeros(len(chosen), dtype=bool)
    if by_time:
        seconds = np.array([(time - datetime.min).total_seconds() for time in times])
        beginnings = np.unique(seconds)[1:]
        if not len(beginnings):
            raise ValueError(f"all photos held out for {split} were taken at {times[0]}; use --queries random")
        later = len(chosen) - np.searchsorted(np.sort(seconds), beginnings)
        is_query = seconds >= beginnings[np.abs(later - len(chosen) / 2).argmin()]
    else:
        is_query[rng.permutation(len(chosen))[: len(chosen) // 2]] = True
    how = "the later ones" if by_time else "drawn at random, so the answer to one may be a photo of the same walk"
    lines.append(f"{split}: {int((~is_query).sum())} database photos and {int(is_query.sum())} queries, {how}")
    return np.where(is_query, f"{split}/queries", f"{split}/database").astype(object)


def write(folder: Path, collection: Collection, fate: Fate, *, name: str, copy: bool) -> list[str]:
    """Writes table, photo folders, photos.csv and the plot into a new folder; returns lines to print."""
    photos, metres, lines = collection.photos, collection.metres, list[str]()
    degrees = np.array([photo.degrees for photo in photos])
    if not (np.abs(degrees) <= (90, 180)).all():  # also if a number is missing
        degrees = metres[:, ::-1] / METRES_PER_DEGREE
        if collection.kind != LABELS:
            lines.append("the columns lat and lon hold metres / 111,320, since not all photos have degrees")
    table: list[tuple[Any, ...]] = []
    for index in np.argsort(fate.places, kind="stable").tolist():
        photo, use = photos[index], fate.uses[index]
        latitude, longitude = (f"{value:.7f}" for value in degrees[index])
        heading = round(photo.heading or 0.0) % 360
        if use == TRAIN:
            year, month = (photo.time.year, photo.time.month) if photo.time else (0, 0)
            row: tuple[Any, ...] = (
                *map(str, (fate.places[index], year, month, heading)),
                name,
                latitude,
                longitude,
                f"{index:07d}",
            )
            table.append(row)
            target = folder / "gsv_cities" / "Images" / name / image_name(*row)
        elif use in KEPT:
            east, north = metres[index]
            stamp = photo.time.strftime("%Y%m%d_%H%M%S") if photo.time else ""
            fields = (f"{east:.2f}", f"{north:.2f}", "", "", latitude, longitude, f"{index:07d}", "", heading)
            file = "@" + "@".join(map(str, (*fields, "", "", "", stamp, ""))) + "@.jpg"
            target = folder / name / "images" / use / file
        else:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        place_photo(photo, target, copy=copy)
    if turned := sum(photo.turn != 1 and use in KEPT for photo, use in zip(photos, fate.uses, strict=True)):
        lines.append(f"{turned} photos were rewritten, turned as EXIF says")
    (folder / "gsv_cities" / "Dataframes").mkdir()
    _write_csv(folder / "gsv_cities" / "Dataframes" / f"{name}.csv", [COLUMNS, *table])
    evaluation = folder / name / "images"
    for there, missing in (SPLITS, SPLITS[::-1]):
        if (evaluation / there).is_dir() and not (evaluation / missing).is_dir():
            (evaluation / missing).symlink_to(there)
            lines.append(f"{missing} is a link to {there}: the best epoch is chosen and tested on the same photos")
    rows = zip((photo.path for photo in photos), fate.uses, fate.places.tolist(), strict=True)
    known = [(path, use, "" if place < 0 else place) for path, use, place in rows]
    known += [(path, reason, "") for reason, paths in collection.dropped.items() for path in paths]
    _write_csv(folder / "photos.csv", [("path", "use", "place"), *known])
    if collection.kind == LABELS:
        lines.append("no plot: there are only labels; held-out photos have made-up positions, places 1 km apart")
    else:
        draw_map(folder / "places.png", metres, fate)
    return lines


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def place_photo(photo: Photo, target: Path, *, copy: bool) -> None:
    """Creates a photo at `target`: a link, a copy, or turned as its EXIF data says."""
    if photo.turn != 1:
        to_pil_image(read_pixels(photo.path, upright=True)).save(target, "JPEG", quality=95)
    elif copy:
        shutil.copyfile(photo.path, target)
    else:
        target.symlink_to(os.path.realpath(photo.path))


def draw_map(path: Path, metres: NDArray[np.float64], fate: Fate) -> None:
    """Plots where the photos are, those to train on in the colour of their place, and what became of the others."""
    from matplotlib.figure import Figure  # takes a quarter of a second to import

    metres = metres - metres.min(axis=0)
    shape = map_shape(metres.max(axis=0))
    figure = Figure(figsize=shape.inches, layout="constrained")
    axes = figure.subplots()
    kinds = np.array([use if use in KEPT else "dropped" for use in fate.uses])
    for kind, style in {
        "dropped": {"color": "0.8", "marker": "."},
        TRAIN: {"c": fate.places[kinds == TRAIN] % 20, "cmap": "tab20", "marker": "."},
        "val/database": {"color": "black", "marker": "+"},
        "val/queries": {"color": "black", "marker": "x"},
        "test/database": {"color": "red", "marker": "+"},
        "test/queries": {"color": "red", "marker": "x"},
    }.items():
        if (kinds == kind).any():
            east, north = metres[kinds == kind].T
            axes.scatter(east, north, s=25, label=f"{kind} ({len(east)})", linewidths=0.8, **style)  # type: ignore
    labels = {
        f"{axis}label": f"metres {what}" + f", drawn {times:.3g} times as large" * (times > 1)
        for axis, what, times in zip("xy", ("east", "north"), shape.stretch, strict=True)
    }
    limits = {f"{axis}lim": limit for axis, limit in zip("xy", shape.limits, strict=True)}
    axes.set(aspect=shape.stretch[1] / shape.stretch[0], **labels, **limits)  # type: ignore[arg-type]
    figure.legend(loc="outside upper center", ncols=3 if shape.inches[0] > 7 else 1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def summary(collection: Collection, fate: Fate) -> list[str]:
    """Lines about what was kept and dropped."""
    counts = np.bincount(fate.places[fate.places >= 0])
    lost = Counter({reason: len(paths) for reason, paths in collection.dropped.items()})
    lost.update(use for use in fate.uses if use not in KEPT)
    read = len(fate.uses) + sum(map(len, collection.dropped.values()))
    lines = [*collection.notes, f"{read} photos, of which {counts.sum()} make {len(counts)} places to train on"]
    lines.append(f"photos per place: {counts.min()} to {counts.max()}")
    if small := int((counts < IMAGES_PER_PLACE).sum()):
        lines.append(
            f"{small} places have fewer than {IMAGES_PER_PLACE} photos: train.py leaves them out unless "
            f"--images_per_place is lower"
        )
    lines += [*(f"dropped: {count}, {reason}" for reason, count in lost.items()), *fate.lines]
    if collection.copies:  # an easy pair within a place, or the answer to its copy
        copy, original = next(iter(collection.copies.items()))
        lines.append(
            f"{len(collection.copies)} photos are copies of others, byte for byte, e.g. {copy} of {original}: kept, "
            "but they teach nothing, and a query finds its copy; remove them and convert again"
        )
    return printable(lines)


def printable(lines: Sequence[str]) -> list[str]:
    """The same, since a name may contain a line break, or bytes that are not text."""
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]


def require_new(output: Path, sources: Sequence[Path]) -> None:
    """Raises ValueError if the output exists, cannot be created, or lies in a source."""
    try:
        there = output.exists() or output.is_symlink()
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise _not_made(output, error) from error
    if there:
        raise ValueError(f"--output {output} already exists; remove it, or name another folder")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "is not writable" if above.is_dir() else "is not a folder"
        raise ValueError(f"--output {output} cannot be created: {above} {reason}; name another folder")
    for source in sources:
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"--output {output} lies in {source}, whose photos are converted; name a folder outside")


def _not_made(output: Path, error: OSError) -> ValueError:
    return ValueError(f"--output {output} cannot be created ({error.strerror or error}); name another folder")


def _require_sense(
    name: str, queries: str | None, held_out: Mapping[str, HeldOut], **least: tuple[float, float]
) -> None:
    """Raises ValueError for invalid options; `least` has values and their minima."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]*", name):
        raise ValueError(f"--name {name!r} becomes part of file names; use letters, digits and -")
    for flag, (value, smallest) in least.items():
        if not smallest <= value < float("inf"):
            raise ValueError(f"--{flag} {value:g} is too small or not a number; use {smallest:g} or more")
    for split, wanted in held_out.items():
        if not 0 <= wanted.share < 1:
            raise ValueError(f"--{split}_share {wanted.share:g} is not a share; use at least 0 and below 1, e.g. 0.15")
        if wanted.area and wanted.share:
            raise ValueError(f"--{split}_area and --{split}_share both say what to hold out; give one of them")
    if sum(wanted.share for wanted in held_out.values()) >= 1:
        shares = " and ".join(f"--{split}_share {wanted.share:g}" for split, wanted in held_out.items())
        raise ValueError(f"{shares} leave no photo to train on; use shares that add up to less than 1")
    if queries and not any(wanted.area or wanted.share for wanted in held_out.values()):
        raise ValueError(f"--queries {queries} needs held-out photos; give --val_area or --val_share")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the output is written completely or not at all.

    Returns:
        The exit status, 0; 2 for bad input is raised as SystemExit.
    """
    parser = command_line()
    args = parser.parse(argv)
    output, name = args.output, args.name
    held_out = {
        "val": HeldOut(area=args.val_area, share=args.val_share),
        "test": HeldOut(area=args.test_area, share=args.test_share),
    }
    notes: list[str] = []
    try:
        _require_sense(
            name,
            args.queries,
            held_out,
            cell=(args.cell, 0.01),
            min_images=(args.min_images, 2),
            heading_bins=(args.heading_bins, 1),
            gap=(args.gap, 0),
            seed=(args.seed, 0),
        )
        require_new(output, args.sources)
        with left_on_signals():
            collection = collect(args.sources, notes=notes, progress=True)
            fate = assign(
                collection,
                held_out,
                cell=args.cell,
                min_images=args.min_images,
                bins=args.heading_bins,
                gap=args.gap,
                queries=args.queries,
                seed=args.seed,
            )
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _not_made(output, error) from error
            with whole(output) as folder:
                shutil.rmtree(folder, ignore_errors=True)  # left by a killed one
                folder.mkdir()
                lines = summary(collection, fate) + write(folder, collection, fate, name=name, copy=args.copy)
                (folder / "summary.txt").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    except (OSError, ValueError) as error:
        for note in printable(notes):  # such as that only a part was converted
            print(note, flush=True)
        parser.error(str(error))
    print("\n".join(lines))
    if (output / name / "images").is_dir():
        options = f"--eval_datasets_folder={shlex.quote(str(output))} --eval_dataset_name={name}"
    else:
        options = f"--train_dataset_folder {shlex.quote(str(output / 'gsv_cities'))}"
    print(*printable([f"wrote {output}; train with {options}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
