"""Writes the results of a search as a page, from the template `matches.html`: each query beside its first matches."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..system.files import absolute, atomic_write

TEMPLATE = Path(__file__).with_name("matches.html")
THUMBNAIL_SIDE = 240  # the longer one, in pixels


def write_match_page(
    folder: Path,
    *,
    title: str,
    queries: Sequence[str],
    database: Sequence[str],
    predictions: NDArray[np.int64],
    read: Callable[[str], Image.Image | None],
    shown: int,
    correct: NDArray[np.bool_] | None = None,
    judged: NDArray[np.bool_] | None = None,
    metres: NDArray[np.float64] | None = None,
    metres_to: Callable[[int], NDArray[np.float64] | None] = lambda _: None,
    similarity: NDArray[np.float64] | None = None,
    rule: str = "",
    has_positive: NDArray[np.bool_] | None = None,
    accepted: NDArray[np.bool_] | None = None,
    accepted_rule: str = "",
    groups: Mapping[str, NDArray[np.bool_]] | None = None,
) -> None:
    """Writes `index.html` and a thumbnail of each image shown: one row per query, to filter in the browser.

    Args:
        title: e.g. "pitts30k test, R@1: 95.0, R@5: 97.4".
        queries: paths of Q images.
        database: paths of N images.
        predictions: Q x K database indices, best first; -1 is none.
        read: returns an image as the model saw it, or smaller, down to `THUMBNAIL_SIDE`; None for a missing one.
        shown: how many matches of a query are shown. If none of these is correct, the best-ranked correct one of the
            others follows, or else the database image nearest to the query.
        correct: which of them are correct, Q x K; None if unknown.
        judged: for which matches this is known, Q x K; None for all or, without `correct`, for none.
        metres: distance of each to its query, Q x K, NaN where a position is unknown; None if all are.
        metres_to: returns the distances of a query to all database images, N, NaN if unknown; None if all are.
        similarity: cosine of the descriptors of query and match, Q x K; None if unknown.
        rule, accepted_rule: by which a match is correct, e.g. "within 25 m", and by which it is accepted.
        has_positive: which queries have a correct image in the database, Q; None if unknown.
        accepted: which matches are accepted, Q x K; None without a threshold.
        groups: further groups of queries to filter by, Q each, by label.
    """
    from jinja2 import Environment, StrictUndefined

    count, depth = predictions.shape
    k = min(shown, depth)
    matched = predictions >= 0
    judged = np.full(matched.shape, correct is not None) if judged is None else judged
    right = matched & judged & (correct is not None and correct)
    has_positive = np.ones(count, dtype=bool) if has_positive is None else has_positive
    failed: NDArray[np.bool_] = np.zeros(count, dtype=bool)
    filters: list[tuple[str, str, Any]] = [("all", "all", np.ones(count, dtype=bool))]  # value, label, queries
    filters += [(label.replace(" ", "-"), label, members) for label, members in (groups or {}).items()]
    if correct is not None:
        filters.append(("first-wrong", "first match wrong", judged[:, 0] & ~right[:, 0]))
        failed = np.asarray(judged[:, :k].any(axis=1) & ~right[:, :k].any(axis=1))
        filters.append(("none-correct", f"no correct match among {k}", failed))
        if not has_positive.all():
            filters.append(("nothing-to-find", "nothing to find", ~has_positive))
    if accepted is not None:
        taken = accepted[:, 0] & matched[:, 0]
        filters += [("accepted", "first match accepted", taken), ("rejected", "not accepted", ~taken)]
        if correct is not None:
            filters.append(("false-alarm", "accepted and wrong", taken & judged[:, 0] & ~right[:, 0]))

    is_shown = matched & (np.arange(depth) < k)
    nearest: dict[int, tuple[int, float]] = {}  # database index and metres, by query
    for query in np.flatnonzero(failed).tolist():
        if right[query].any():
            is_shown[query, right[query].argmax()] = True
        elif (away := metres_to(query)) is not None and not np.isnan(away).all():
            image = int(np.nanargmin(away))
            if image not in predictions[query][is_shown[query]]:
                nearest[query] = image, float(away[image])
    indices = {*predictions[is_shown].tolist(), *(image for image, _ in nearest.values())}
    more = bool(nearest) or bool(is_shown[:, k:].any())
    paths = sorted({*queries, *(database[image] for image in indices)})
    (folder / "thumbnails").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        thumbnails = pool.map(partial(_write_thumbnail, folder=folder, read=read), paths)
        images = dict(zip(paths, tqdm(thumbnails, total=len(paths), desc="thumbnails", unit="image"), strict=True))

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8"),
        {"basename": os.path.basename, "in_words": _in_words, "unknown": np.isnan},
    )
    text = page.stream(
        title=title,
        labelled=correct is not None,
        rule=rule,
        accepted_rule=accepted_rule,
        filters=filters,
        cells=k + 1 + more,
        queries=queries,
        database=database,
        images=images,
        predictions=predictions,
        shown=is_shown,
        nearest=nearest,
        more=more,
        judged=judged,
        right=right,
        has_positive=has_positive,
        accepted=accepted,
        metres=metres,
        similarity=similarity,
    )
    with atomic_write(folder / "index.html") as path:
        text.dump(str(path), encoding="utf-8", errors="replace")  # file names may contain other bytes


def _write_thumbnail(path: str, folder: Path, read: Callable[[str], Image.Image | None]) -> dict[str, Any] | None:
    """Writes an image's thumbnail below `folder`; returns its size and address and the link to the full image, or None.

    Both are relative to the page, so that they work if page and photos are moved or served together.
    """
    image = read(path)
    if image is None:
        return None
    scale = THUMBNAIL_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)  # at least 1, for very thin images
    # Named by the whole path: safe in a URL, and unique, also among those of an older page in this folder.
    source = f"thumbnails/{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.jpg"
    image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0).save(folder / source, quality=80)
    link = quote(os.fsencode(os.path.relpath(absolute(path), absolute(str(folder)))))
    return {"source": source, "width": width, "height": height, "link": link}


def _in_words(metres: float) -> str:
    return f"{metres:.1f} m" if metres < 1000 else f"{metres / 1000:.1f} km"
