"""Draws the VLAD layer's soft assignment: photos with their patches coloured by cluster."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..system.plotting import load_matplotlib
from .figures import drawable, save_figure

# Distinct for colour-blind readers too (Okabe and Ito 2008); more clusters than these get rainbow colours.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
GHOST = (72, 72, 80)
SHOWN_SIDE = 480  # longer side of a photo in pixels
TITLE_WIDTH = 44  # characters per line above a photo
MOST_MAPS = 8  # soft assignments drawn beside a photo, at most


def cluster_colours(clusters: int, ghost_clusters: int) -> NDArray[np.float64]:
    """A colour for each cluster, and the same dark one for all ghosts: (K+G) x 3, from 0 to 1."""
    if clusters <= len(COLOURS):
        colours = np.array(COLOURS[:clusters], dtype=np.float64) / 255
    else:
        colours = load_matplotlib().colormaps["rainbow"](np.linspace(0, 1, clusters))[:, :3]
    return np.concatenate((colours, np.tile(np.divide(GHOST, 255), (ghost_clusters, 1))))


def coloured(pixels: NDArray[np.uint8], assignment: NDArray[np.float32], ghost_clusters: int) -> NDArray[np.float64]:
    """A photo, H x W x 3 bytes, in grey and tinted by the strongest cluster of each patch: H x W x 3, from 0 to 1."""
    height, width = pixels.shape[:2]
    count, h, w = assignment.shape
    colours = cluster_colours(count - ghost_clusters, ghost_clusters)
    patches = assignment.argmax(axis=0)  # (h, w)
    # The patch of each pixel: the grid covers the photo, independently of the size it was resized to.
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    grey = pixels.mean(axis=2)[:, :, None] / 255
    return colours[patches[np.ix_(rows, columns)]] * (0.35 + 0.65 * grey)


def draw_assignments(
    path: Path, photos: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.float32]]], *, ghost_clusters: int
) -> None:
    """Draws one row per photo into a PNG: the photo, its patches coloured by cluster, and the share of each cluster.

    Args:
        path: the PNG.
        photos: of each the title, the pixels, H x W x 3, and the soft assignment, (K+G) x h x w, of its patches to the
            clusters, ghosts last.
        ghost_clusters: G; their sum is drawn as one picture.
    """
    matplotlib = load_matplotlib()
    clusters = len(photos[0][2]) - ghost_clusters
    names = [f"cluster {k + 1}" for k in range(clusters)] + ["ghost"] * bool(ghost_clusters)
    maps = len(names) if len(names) <= MOST_MAPS else 0
    colours = cluster_colours(clusters, min(1, ghost_clusters))
    figure = matplotlib.figure.Figure(figsize=(2 * 3.2 + maps * 1.9, 2.75 * len(photos)), layout="constrained")
    grid = figure.subplots(len(photos), 2 + maps, squeeze=False, width_ratios=[1.7, 1.7, *[1] * maps])
    for row, (title, pixels, assignment) in zip(grid, photos, strict=True):
        shape = pixels.shape[0] / pixels.shape[1]
        # Width and height, at least 1 for very thin photos.
        size = tuple(max(1, min(SHOWN_SIDE, round(SHOWN_SIDE * side))) for side in (1 / shape, shape))
        shown = np.asarray(Image.fromarray(pixels).resize(size))
        row[0].imshow(shown)
        wrapped = "\n".join(textwrap.wrap(drawable(title), TITLE_WIDTH))
        row[0].set_title(wrapped, fontsize=8, loc="left", parse_math=False)
        row[1].imshow(coloured(shown, assignment, ghost_clusters))
        row[1].set_title("patches by cluster" + ", ghosts dark" * bool(ghost_clusters), fontsize=9)
        soft = list(assignment[:clusters])
        if ghost_clusters:
            soft.append(assignment[clusters:].sum(axis=0))
        for axes, name, colour, share in zip(row[2:], names, colours, soft, strict=False):
            tint = matplotlib.colors.LinearSegmentedColormap.from_list(name, ["white", tuple(colour)])
            axes.imshow(share, cmap=tint, vmin=0, vmax=1, extent=(0, size[0], size[1], 0))
            axes.set_title(f"{name}: {share.mean():.0%}", fontsize=9)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    save_figure(figure, path, dpi=110)
