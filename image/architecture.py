"""Draws the method's figure, from photos to descriptors, to `architecture.png` beside this script."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from sklearn.cluster import KMeans

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT, DPI = 1800, 930, 200  # pixels; shown at half of that, so that 8 points stay readable
INK, SOFT, EDGE, FROZEN, PANEL = "#1F2328", "#57606A", "#8A8F98", "#CDD2D8", "#F6F8FA"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#2B2B2B")  # Okabe-Ito, for the colour-blind; the ghost last
K, PATCHES, CELL = 4, 16, 90  # clusters; patches a side of a 224 x 224 photo; the side of an assignment map
ROWS = [218 + 104 * k for k in range(K + 1)]  # a cluster's top edge, the same through the whole figure
TALL, MIDDLE = ROWS[K - 1] + CELL - ROWS[0], ROWS[2] + CELL / 2
STAGES = (  # where, name, what it is, shape of its result
    (124, "Photos", "a batch of B", "B × 3 × H × W"),
    (360, "DINOv2", "ViT-B/14", ""),
    (594, "Local features", "L2-normalised", "B × D × h × w"),
    (993, "SuperVLAD layer", "each photo by itself", ""),
    (928, "", "", "B × (K+G) × h × w"),
    (1146, "", "", "B × K × D"),
    (1427, "Cross-image encoder", "optional; across photos", "B × K × D"),
    (1700, "Descriptor", "L2-normalised", "B × K·D"),
)
LETTERS = "By default D = 768 channels, K = 4 clusters, G = 1 ghost, K·D = 3072;  h × w = H/14 × W/14 patches"


def photo(row: int, column: int) -> np.ndarray:
    """A square view of the contact sheet, whose tiles are 160 x 120 with 4 pixels between them."""
    left, top = 164 * column + 30, 124 * row
    with Image.open(FOLDER / "toy_city.jpg") as sheet:
        return np.asarray(sheet.convert("RGB").crop((left, top, left + 120, top + 120)))


def assignment(image: np.ndarray) -> np.ndarray:
    """Soft assignment K+G x h x w of a photo's patches, the ghost last.

    An illustration: k-means on the patches' brightness, hue and position, where the network has learned weights.
    """
    colour = np.asarray(Image.fromarray(image).resize((PATCHES, PATCHES), Image.Resampling.BOX)) / 255
    brightness = colour.mean(axis=2, keepdims=True)
    position = np.stack(np.mgrid[:PATCHES, :PATCHES], axis=2) / PATCHES
    features = np.concatenate([brightness, 2 * (colour - brightness), 0.3 * position], axis=2).reshape(PATCHES**2, -1)
    scores = np.exp(-20 * KMeans(K + 1, n_init=10, random_state=0).fit_transform(features))
    soft = (scores / scores.sum(axis=1, keepdims=True)).T.reshape(-1, PATCHES, PATCHES)
    height = (soft * position[..., 0]).sum(axis=(1, 2)) / soft.sum(axis=(1, 2))
    return np.roll(soft[np.argsort(height)], -1, axis=0)  # the topmost, the sky, tells least: it is the ghost


def shade(colour: str, amount: np.ndarray) -> np.ndarray:
    """From white (0) to the colour (1)."""
    return 1 - amount[..., None] * (1 - np.array(to_rgb(colour)))


def picture(ax: Axes, pixels: np.ndarray, x: float, y: float, width: float, height: float, edge: str = INK) -> None:
    """Pixels in a frame, over what was drawn before: bytes are a photo and drawn smooth, fractions are cells."""
    look = {"interpolation": "bicubic" if pixels.dtype == np.uint8 else "nearest", "zorder": 2 + len(ax.images) / 1000}
    ax.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", **look)
    ax.add_patch(Rectangle((x, y), width, height, fill=False, ec=edge, lw=0.8, zorder=look["zorder"]))


def text(ax: Axes, x: float, y: float, words: str, size: float = 8, **options) -> None:
    ax.text(x, y, words, **{"size": size, "ha": "center", "va": "center", "color": INK, "zorder": 5} | options)


def box(ax: Axes, x: float, y: float, width: float, height: float, label: str = "", **options) -> None:
    """A rounded box; its label reads upwards."""
    style = {"fc": "white", "ec": INK, "lw": 0.9, "zorder": 1} | options
    ax.add_patch(FancyBboxPatch((x, y), width, height, f"round,pad=0,rounding_size={min(10, width / 4)}", **style))
    text(ax, x + width / 2, y + height / 2, label, rotation=90)


def arrow(ax: Axes, *points: tuple[float, float], **options) -> None:
    """An arrow around corners; between two points it may be bent by `connectionstyle`."""
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "lw": 1.1, "color": INK, "shrinkA": 0, "shrinkB": 0, "zorder": 4}
    ax.add_patch(FancyArrowPatch(*points[-2:], **style | options))
    if len(points) > 2:
        ax.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.1, ls=options.get("ls", "-"), zorder=4)


def draw_backbone(ax: Axes, photos: list[np.ndarray], vector: np.ndarray) -> None:
    """Photos, the transformer's blocks, local features."""
    lines = np.arange(1, PATCHES) * 176 / PATCHES
    for depth in (2, 1, 0):  # the last one drawn lies in front
        x, y = 490 + 16 * depth, MIDDLE + 34 - 122 * depth
        picture(ax, photos[depth], x - 470, y, 176, 176)
        picture(ax, photos[depth], x, y, 176, 176)
        ax.vlines(x + lines, y, y + 176, color="white", lw=0.5, zorder=ax.images[-1].zorder)
        ax.hlines(y + lines, x, x + 176, color="white", lw=0.5, zorder=ax.images[-1].zorder)
    for block in range(12):
        box(ax, 270 + 16 * block, MIDDLE - 210, 11, 420, fc=FROZEN if block < 8 else SOFT, ec="none")
    text(ax, 328, MIDDLE + 250, "blocks 0–7\nfrozen", color=SOFT)
    text(ax, 434, MIDDLE + 250, "8–11\ntrained")
    arrow(ax, (234, MIDDLE), (264, MIDDLE))
    arrow(ax, (462, MIDDLE), (486, MIDDLE))
    left, top = x + lines[8], y + lines[9]  # a patch of the photo in front, and its vector
    bold = {"lw": 1.4, "zorder": 4, "path_effects": [withStroke(linewidth=3, foreground="white")]}
    ax.add_patch(Rectangle((left, top), 11, 11, fc="none", ec=INK, **bold))
    arrow(ax, (left + 5.5, top + 14), (left + 5.5, 708), **bold)
    picture(ax, shade(INK, vector), x, 711, 176, 24)
    text(ax, x + 88, 760, "$x_i$: D numbers")


def draw_layer(ax: Axes, soft: np.ndarray, vectors: np.ndarray) -> None:
    """The SuperVLAD layer: a row for each cluster."""
    box(ax, 738, 108, 510, 720, fc=PANEL, ec=EDGE)
    arrow(ax, (702, MIDDLE), (752, MIDDLE))
    arrow(ax, (716, MIDDLE), (716, 164), (1051, 164), (1051, ROWS[0] - 2))
    text(ax, 895, 142, "the features $x_i$")
    box(ax, 754, ROWS[0], 46, TALL + 104, "1 × 1 convolution to K+G logits")
    box(ax, 808, ROWS[0], 46, TALL + 104, "softmax over the K+G clusters")
    text(ax, 932, 192, "soft assignment")
    box(ax, 1028, ROWS[0], 46, TALL, "weighted sums of the features")
    box(ax, 1186, ROWS[0], 46, TALL, "intra-normalisation (L2)")
    for k, (top, colour) in enumerate(zip(ROWS, COLOURS, strict=True)):
        y = top + CELL / 2
        picture(ax, shade(colour, soft[k]), 900, top, CELL, CELL, colour)
        text(ax, 878, y, f"$a_{k + 1}$", 9)
        if k < K:
            arrow(ax, (994, y), (1026, y), color=colour)
            picture(ax, shade(colour, vectors[k]), 1082, y - 13, 96, 26, colour)
            text(ax, 1130, y - 33, f"$v_{k + 1}$", 9)
            arrow(ax, (1234, y), (1296, y), color=colour)
    text(ax, 1112, ROWS[K] + CELL / 2, "× ghost: dropped")
    text(ax, 905, 780, r"$v_k\;=\;\sum_i\;a_k(x_i)\;x_i$", 11)
    text(ax, 1130, 778, "no centroid\nsubtracted")


def draw_batch(ax: Axes, photos: list[np.ndarray], vectors: np.ndarray) -> None:
    """The encoder across the batch, the way past it, and the descriptors: the cluster vectors end to end."""
    box(ax, 1298, 108, 258, 640, fc=PANEL, ec=EDGE, ls=(0, (4, 3)))
    columns = [1347, 1427, 1507]
    for x, image in zip(columns, photos, strict=True):
        picture(ax, image, x - 29, 124, 58, 58)
    for y, colour in zip(np.array(ROWS[:K]) + CELL / 2, COLOURS[:K], strict=True):
        for x in columns:
            ax.add_patch(Rectangle((x - 17, y - 17), 34, 34, fc=colour, ec="none", zorder=3))
        for a, b, side, inset, bend in ((0, 1, -20, 4, -0.45), (1, 2, -20, 4, -0.45), (0, 2, 20, 0, 0.2)):
            both = {"arrowstyle": "<|-|>", "mutation_scale": 6, "lw": 0.9, "connectionstyle": f"arc3,rad={bend}"}
            arrow(ax, (columns[a] + inset, y + side), (columns[b] - inset, y + side), color=colour, **both)
        arrow(ax, (1558, y), (1594, y), color=colour)
    text(ax, 1427, ROWS[K] + CELL / 2 + 12, "2 transformer layers;\nthe batch is\nthe sequence")
    arrow(ax, (1250, 804), (1619, 804), (1619, ROWS[0] + TALL + 2), ls=(0, (4, 3)))
    text(ax, 1427, 782, "or without it")
    box(ax, 1596, ROWS[0], 46, TALL, "flatten, L2-normalise")
    arrow(ax, (1644, ROWS[0] + TALL / 2), (1678, ROWS[0] + TALL / 2))
    for depth in (2, 1, 0):
        for k in range(K):
            strip = shade(COLOURS[k], np.roll(vectors[k].T, depth, axis=0))
            picture(ax, strip, 1682 + 20 * depth, ROWS[k] - 7 - 16 * depth, 42, 104, COLOURS[k])


def main() -> None:
    photos = [photo(1, 1), photo(3, 2), photo(2, 1)]
    vectors = np.random.default_rng(3).uniform(0.2, 1, (K, 1, 8))  # any numbers: a vector is drawn as a strip of them
    with rc_context({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavuserif"}):
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        ax = figure.add_axes((0, 0, 1, 1))
        draw_backbone(ax, photos, vectors[:2].reshape(1, 16))
        draw_layer(ax, assignment(photos[0]), vectors)
        draw_batch(ax, photos, vectors)
        for x, name, kind, shape in STAGES:
            text(ax, x, 34, name, 9, weight="bold")
            text(ax, x, 70, kind)
            text(ax, x, 862, shape)
        text(ax, WIDTH / 2, 915, LETTERS, color=SOFT)
        ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        ax.axis("off")
        figure.savefig(buffer := BytesIO())
    # A palette is enough, and a third of the size; k-means fits it to the photos.
    Image.open(buffer).convert("RGB").quantize(256, kmeans=1).save(FOLDER / "architecture.png")


if __name__ == "__main__":
    main()
