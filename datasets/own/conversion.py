"""What becomes of each photo: part of a place to train on, held out for an evaluation, or dropped; and the files."""

import csv
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import to_pil_image

from utils.system.command_line import printable
from utils.system.files import atomic_write
from utils.system.plotting import load_matplotlib

from ..photos.transforms import read_pixels
from ..training.gsv_cities import COLUMNS, image_name
from . import Settings
from .photos import LABELS, Collection, Photo, collect
from .places import apart, cells_of, connected_share, heading_bins, nearer

Uses = NDArray[np.object_]
Places = NDArray[np.int64]

METRES_PER_DEGREE = 111_320.0
POSITIVE = 25.0  # metres from a query to a correct database photo, the default of train.py
IMAGES_PER_PLACE = 4  # the default of train.py
TRAIN, SPLITS = "train", ("val", "test")
KEPT = (TRAIN, *(f"{split}/{part}" for split in SPLITS for part in ("database", "queries")))


def hold_out(collection: Collection, cells: NDArray[np.int64], settings: Settings) -> tuple[Uses, list[str]]:
    """The use of each photo, dropping only what is too near to held-out photos; and lines to print."""
    photos, metres, gap = collection.photos, collection.metres, settings.gap
    rng, lines = np.random.default_rng(settings.seed), list[str]()
    uses = np.full(len(photos), TRAIN, dtype=object)
    for split, area, share in (
        ("val", settings.val_area, settings.val_share),
        ("test", settings.test_area, settings.test_share),
    ):
        free = uses == TRAIN
        if area and share:
            raise ValueError(f"--{split}_area and --{split}_share both say what to hold out; give one of them")
        if area:
            if collection.kind == LABELS:
                raise ValueError(f"--{split}_area needs positions, but there are only labels; use --{split}_share")
            given, corners = np.array([photo.position for photo in photos]), np.reshape(area, (2, 2))
            inside = ((given >= corners.min(axis=0)) & (given <= corners.max(axis=0))).all(axis=1)
            held = free & inside
            if taken := int((inside & ~free).sum()):
                lines.append(f"{taken} photos in --{split}_area are not in {split}: they are in val or near it")
            if not held.any():
                ends = f"{given.min(axis=0).tolist()} and {given.max(axis=0).tolist()}"
                raise ValueError(f"--{split}_area {area} contains no photo; the photos lie between {ends}")
        elif share:
            if (left := int(free.sum())) < 2:
                raise ValueError(
                    f"--{split}_share {share:g}: what is held out and within --gap {gap:g} m of it leaves {left} of "
                    f"{len(photos)} photos; lower --gap, or hold out less before"
                )
            held = np.zeros(len(photos), dtype=bool)
            held[free] = connected_share(metres[free], cells[free], share * len(photos) / left, gap, rng)
            if not 0.5 <= (reached := held.mean() / share) <= 2:
                lines.append(
                    f"--{split}_share {share:g}: {reached * share:.0%} of the photos are held out, since cells stay "
                    f"whole, and the largest has {np.bincount(cells).max()} of {len(photos)} photos"
                )
        else:
            continue
        is_query, how = _queries([photos[index] for index in np.flatnonzero(held)], split, settings.queries, rng)
        uses[held] = np.where(is_query, f"{split}/queries", f"{split}/database").astype(object)
        near = nearer(metres[held][is_query], metres[held][~is_query], np.nextafter(POSITIVE, 99))
        lines.append(f"{split}: {int((~is_query).sum())} database photos and {len(near)} queries, {how}")
        if alone := len(near) - int(near.sum()):
            lines[-1] += f"; {alone} queries have no database photo within {POSITIVE:g} m"
        uses[nearer(metres, metres[held], gap) & (uses == TRAIN)] = f"nearer than --gap to what is held out for {split}"
    return uses, lines


def _queries(held: list[Photo], split: str, queries: str | None, rng: Generator) -> tuple[NDArray[np.bool_], str]:
    """Which of the held-out photos are the queries: the later half, or a random half; and that in words."""
    times = [photo.time for photo in held if photo.time is not None]
    if queries == "time" and len(times) < len(held):
        lacking = f"{len(held) - len(times)} of {len(held)} photos held out for {split}"
        raise ValueError(f"--queries time: {lacking} have no time; use --queries random")
    if len(held) < 2:
        raise ValueError(f"photos held out for {split}: {len(held)}, but two are needed; raise --{split}_share")
    if queries == "random" or len(times) < len(held):
        is_query = np.zeros(len(held), dtype=bool)
        is_query[rng.permutation(len(held))[: len(held) // 2]] = True
        return is_query, "drawn at random, so the answer to one may be a photo of the same walk"
    seconds = np.array([(time - datetime.min).total_seconds() for time in times])
    beginnings = np.unique(seconds)[1:]
    if not len(beginnings):
        raise ValueError(f"all photos held out for {split} were taken at {times[0]}; use --queries random")
    later = len(held) - np.searchsorted(np.sort(seconds), beginnings)
    return seconds >= beginnings[np.abs(later - len(held) / 2).argmin()], "the later ones"


def assign(collection: Collection, settings: Settings) -> tuple[Uses, Places, list[str]]:
    """Decides what becomes of each photo.

    Of places closer than the gap only the one with more photos stays, since a batch must not hold a place under two
    labels. Merging them instead would turn whole streets into places: of a walk with a photo every 10 m, 111 cells, it
    made 1 place, while leaving out keeps 23.

    Returns:
        For each of N photos one of `KEPT` or why it was dropped; its place, -1 for none; and lines to print.
    """
    photos, metres = collection.photos, collection.metres
    if collection.kind == LABELS:
        settings = replace(settings, gap=0.0)  # labels are distinct places
    labels = [photo.label or "" for photo in photos]
    if any(labels) and not all(labels):
        raise ValueError(f"{labels.count('')} of {len(labels)} photos have no label; give labels to all, or none")
    cells = np.unique(labels, return_inverse=True)[1] if any(labels) else cells_of(metres, settings.cell)
    uses, lines = hold_out(collection, cells, settings)
    train, bins = np.flatnonzero(uses == TRAIN), settings.heading_bins
    directions = heading_bins(np.array([photos[index].heading for index in train]), bins)
    uses[train[directions < 0]] = "no heading, which --heading_bins asks for"
    train, directions = train[directions >= 0], directions[directions >= 0]
    groups = np.unique(np.column_stack((cells[train], directions)), axis=0, return_inverse=True)[1].ravel()
    enough = np.bincount(groups)[groups] >= settings.min_images
    uses[train[~enough]] = f"a place of fewer than {settings.min_images} photos (--min_images)"
    stays = np.zeros(len(train), dtype=bool)
    stays[enough] = apart(metres[train[enough]], groups[enough], directions[enough], settings.gap, bins)
    uses[train[enough & ~stays]] = "a place nearer than --gap to one with as many photos or more"
    places = np.full(len(photos), -1)
    places[train[stays]] = np.unique(groups[stays], return_inverse=True)[1]
    count = int(places.max()) + 1
    if count < 2:
        lost = _lost(collection, uses, kept=(TRAIN,)).most_common()
        reasons = ", ".join(f"{number} photos: {reason}" for reason, number in lost) or "none dropped"
        raise ValueError(
            f"{len(photos)} photos in {len(np.unique(cells))} cells make {count} places to train on, but two are "
            f"needed ({reasons}); lower --min_images, --heading_bins or --gap, change --cell, or hold out less"
        )
    return uses, places, lines


def _lost(collection: Collection, uses: Uses, kept: Sequence[str] = KEPT) -> Counter[str]:
    """How many photos were dropped for each reason, or have another use than these."""
    lost = Counter({reason: len(paths) for reason, paths in collection.dropped.items()})
    lost.update(use for use in uses if use not in kept)
    return lost


def convert(sources: Sequence[Path], output: Path, settings: Settings, notes: list[str]) -> list[str]:
    """Converts the sources into a new folder, completely or not at all, and returns the lines of its summary; for
    `notes` see `collect`."""
    with atomic_write(output) as folder:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed one
        folder.mkdir(parents=True)  # now, since reading many photos takes long
        collection = collect(sources, notes)
        uses, places, lines = assign(collection, settings)
        lines = summary(collection, uses, places) + lines + write(folder, collection, uses, places, settings)
        lines = [printable(line) for line in lines]
        (folder / "summary.txt").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return lines


def write(folder: Path, collection: Collection, uses: Uses, places: Places, settings: Settings) -> list[str]:
    """Writes what `assign` decided: photos, tables and the plot. Returns lines to print."""
    photos, metres, name, lines = collection.photos, collection.metres, settings.name, list[str]()
    degrees = np.array([photo.degrees for photo in photos])
    if not (np.abs(degrees) <= (90, 180)).all():  # also if a number is missing
        degrees = metres[:, ::-1] / METRES_PER_DEGREE
        if collection.kind != LABELS:
            lines.append("the columns lat and lon hold metres / 111,320, since not all photos have degrees")
    table, evaluation = [COLUMNS], folder / name / "images"
    for index in np.argsort(places, kind="stable").tolist():
        photo, use, panoid = photos[index], uses[index], f"{index:07d}"
        latitude, longitude = (f"{value:.7f}" for value in degrees[index])
        heading = str(round(np.nan_to_num(photo.heading % 360)) % 360)
        if use == TRAIN:
            year, month = (photo.time.year, photo.time.month) if photo.time else (0, 0)
            table.append((str(places[index]), str(year), str(month), heading, name, latitude, longitude, panoid))
            target = folder / "gsv_cities" / "Images" / name / image_name(table[-1])
        elif use in KEPT:
            east, north = metres[index]
            stamp = photo.time.strftime("%Y%m%d_%H%M%S") if photo.time else ""
            fields = (f"{east:.2f}", f"{north:.2f}", "", "", latitude, longitude, panoid, "", heading)
            target = evaluation / use / ("@" + "@".join((*fields, "", "", "", stamp, "", ".jpg")))
        else:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        place_photo(photo, target, copy=settings.copy)
    if turned := sum(photo.turn != 1 and use in KEPT for photo, use in zip(photos, uses, strict=True)):
        lines.append(f"{turned} photos were rewritten, turned as EXIF says")
    (folder / "gsv_cities" / "Dataframes").mkdir()
    _write_csv(folder / "gsv_cities" / "Dataframes" / f"{name}.csv", table)
    for there, missing in (SPLITS, SPLITS[::-1]):
        if (evaluation / there).is_dir() and not (evaluation / missing).is_dir():
            (evaluation / missing).symlink_to(there)
            lines.append(f"{missing} is a link to {there}: the best epoch is chosen and tested on the same photos")
    fates: list[tuple[object, ...]] = [("path", "use", "place")]
    for photo, use, place in zip(photos, uses, places, strict=True):
        fates.append((photo.path, use, "" if place < 0 else place))
    fates += [(path, reason, "") for reason, paths in collection.dropped.items() for path in paths]
    _write_csv(folder / "photos.csv", fates)
    if collection.kind == LABELS:
        lines.append("no plot: there are only labels; held-out photos have made-up positions, places 1 km apart")
    else:
        try:
            draw_map(folder / "places.png", metres, uses, places)
        except Exception as error:  # the photos are converted
            lines.append(f"no plot: {error}")
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


def draw_map(path: Path, metres: NDArray[np.float64], uses: Uses, places: Places) -> None:
    """Plots where the photos are, those to train on in the colour of their place, and what became of the others."""
    figure = load_matplotlib().figure.Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots()
    kinds = np.array([use if use in KEPT else "dropped" for use in uses])
    for kind, style in {
        "dropped": {"color": "0.8", "marker": "."},
        TRAIN: {"c": places[kinds == TRAIN] % 20, "cmap": "tab20", "marker": "."},
        "val/database": {"color": "black", "marker": "+"},
        "val/queries": {"color": "black", "marker": "x"},
        "test/database": {"color": "red", "marker": "+"},
        "test/queries": {"color": "red", "marker": "x"},
    }.items():
        if (kinds == kind).any():
            east, north = (metres - metres.min(axis=0))[kinds == kind].T
            axes.scatter(east, north, s=25, label=f"{kind} ({len(east)})", linewidths=0.8, **style)  # type: ignore
    axes.set(xlabel="metres east", ylabel="metres north")
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(loc="outside upper center", ncols=3)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def summary(collection: Collection, uses: Uses, places: Places) -> list[str]:
    """Lines about what was kept and dropped."""
    counts = np.bincount(places[places >= 0])
    read = len(uses) + sum(map(len, collection.dropped.values()))
    lines = [*collection.notes, f"{read} photos, of which {counts.sum()} make {len(counts)} places to train on"]
    lines.append(f"photos per place: {counts.min()} to {counts.max()}")
    if small := int((counts < IMAGES_PER_PLACE).sum()):
        advice = "train.py leaves them out unless --images_per_place is lower"
        lines.append(f"{small} places have fewer than {IMAGES_PER_PLACE} photos: {advice}")
    lines += [f"dropped: {count}, {reason}" for reason, count in _lost(collection, uses).items()]
    return lines
