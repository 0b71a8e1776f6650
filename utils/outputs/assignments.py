"""Draws the VLAD layer's soft assignment: photos with their patches coloured by cluster."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..system.files import whole
from .report import drawable, save_figure

# Distinct for colour-blind readers too (Okabe and Ito 2008); more clusters than these get rainbow colours.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
GHOST = (72, 72, 80)
SHOWN_SIDE = 480  # longer side of a photo in pixels
TITLE_WIDTH = 44  # characters per line above a photo
MOST_MAPS = 8  # soft assignments drawn beside a photo, at most


@dataclass(frozen=True, kw_only=True)
class AssignedPhoto:
    """A photo and its soft assignment.

    Attributes:
        title: title above the photo.
        pixels: H x W x 3, bytes.
        assignment: (K+G) x h x w, of each patch to each cluster, ghosts last; it covers the whole photo.
    """

    title: str
    pixels: NDArray[np.uint8]
    assignment: NDArray[np.float32]


def cluster_colours(clusters: int, ghost_clusters: int) -> NDArray[np.float64]:
    """A colour for each cluster, and the same dark one for all ghosts: (K+G) x 3, from 0 to 1."""
    if clusters <= len(COLOURS):
        colours = np.array(COLOURS[:clusters], dtype=np.float64) / 255
    else:
        import matplotlib

        colours = matplotlib.colormaps["rainbow"](np.linspace(0, 1, clusters))[:, :3]
    return np.concatenate((colours, np.tile(np.divide(GHOST, 255), (ghost_clusters, 1))))


def coloured(photo: AssignedPhoto, ghost_clusters: int) -> NDArray[np.float64]:
    """The photo in grey, tinted by the strongest cluster of each patch: H x W x 3, from 0 to 1."""
    height, width = photo.pixels.shape[:2]
    count, h, w = photo.assignment.shape
    colours = cluster_colours(count - ghost_clusters, ghost_clusters)
    patches = photo.assignment.argmax(axis=0)  # (h, w)
    # The patch of each pixel: the grid covers the photo, independently of the size it was resized to.
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    grey = photo.pixels.mean(axis=2)[:, :, None] / 255
    return colours[patches[np.ix_(rows, columns)]] * (0.35 + 0.65 * grey)


def draw_assignments(path: Path, photos: Sequence[AssignedPhoto], *, ghost_clusters: int) -> None:
    """Draws one row per photo: the photo, its patches coloured by cluster, and the share of each cluster.

    Args:
        path: the PNG to write.
        photos: photos with assignments of the same K+G.
        ghost_clusters: G; their sum is drawn as one picture.
    """
    from matplotlib.colors import LinearSegmentedColormap  # slow to import
    from matplotlib.figure import Figure

    clusters = photos[0].assignment.shape[0] - ghost_clusters
    names = [f"cluster {k + 1}" for k in range(clusters)] + ["ghost"] * bool(ghost_clusters)
    maps = len(names) if len(names) <= MOST_MAPS else 0
    colours = cluster_colours(clusters, min(1, ghost_clusters))
    figure = Figure(figsize=(2 * 3.2 + maps * 1.9, 2.75 * len(photos)), layout="constrained")
    grid = figure.subplots(len(photos), 2 + maps, squeeze=False, width_ratios=[1.7, 1.7, *[1] * maps])
    for row, photo in zip(grid, photos, strict=True):
        shape = photo.pixels.shape[0] / photo.pixels.shape[1]
        # Width and height, at least 1 for very thin photos.
        size = tuple(max(1, min(SHOWN_SIDE, round(SHOWN_SIDE * side))) for side in (1 / shape, shape))
        shown = AssignedPhoto(
            title=photo.title,
            pixels=np.asarray(Image.fromarray(photo.pixels).resize(size)),
            assignment=photo.assignment,
        )
        row[0].imshow(shown.pixels)
        title = "\n".join(textwrap.wrap(drawable(photo.title), TITLE_WIDTH))
        row[0].set_title(title, fontsize=8, loc="left", parse_math=False)
        row[1].imshow(coloured(shown, ghost_clusters))
        row[1].set_title("patches by cluster, ghosts dark" if ghost_clusters else "patches by cluster", fontsize=9)
        soft = list(photo.assignment[:clusters])
        if ghost_clusters:
            soft.append(photo.assignment[clusters:].sum(axis=0))
        for axes, name, colour, share in zip(row[2:], names, colours, soft, strict=False):
            tint = LinearSegmentedColormap.from_list(name, ["white", tuple(colour)])
            axes.imshow(share, cmap=tint, vmin=0, vmax=1, extent=(0, size[0], size[1], 0))
            axes.set_title(f"{name}: {share.mean():.0%}", fontsize=9)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    with whole(path) as unfinished:
        save_figure(figure, unfinished, dpi=110)
