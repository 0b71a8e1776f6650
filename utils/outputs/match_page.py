"""Writes the results of a search as a page: each query beside its first matches."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..system.files import whole

THUMBNAIL_SIDE = 240  # the longer one, in pixels

# Opens from disk and loads only the thumbnails. The current filter is in the address, after the #.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --faint: #59636e; --line: #d1d9e0;
  --correct: #1a7f37; --wrong: #cf222e; --unknown: #818b98; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #30363d;
  --correct: #3fb950; --wrong: #f85149; --unknown: #6e7681; } }
body { margin: 0; background: var(--page); color: var(--text); font: 13px/1.45 system-ui, sans-serif; }
header, section { padding: 10px 12px; border-bottom: 1px solid var(--line); }
h1 { margin: 0 0 2px; font-size: 18px; }
p { margin: 0 0 8px; color: var(--faint); }
form { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; }
input { margin: 0 5px 0 0; vertical-align: -2px; accent-color: currentColor; }
[type=search] { flex: 0 1 320px; padding: 4px 8px; font: inherit; }
@media (min-width: 800px) { header { position: sticky; top: 0; z-index: 1; background: var(--page); } }
section { display: grid; gap: 8px; align-items: start; max-width: calc($cells * 256px); content-visibility: auto;
  grid-template-columns: repeat(auto-fill, minmax(max(105px, 100% / $cells - 8px), 1fr));
  contain-intrinsic-size: auto 215px; }
section[hidden] { display: none; }
figure { margin: 0; min-width: 0; --frame: var(--unknown); }
.correct { --frame: var(--correct); }
.wrong { --frame: var(--wrong); }
img, .gone { max-width: calc(100% - 8px); height: auto; display: block; border: 4px solid var(--frame);
  border-radius: 4px; }
.gone { padding: 40px 8px; text-align: center; color: var(--faint); }
.query img { border-color: transparent; }
.rejected img { border-style: dashed; }
.rejected a { opacity: 0.55; }
figcaption { padding: 2px 4px 0; }
b { font-weight: 600; }
i { font: bold 15px/1 sans-serif; color: var(--frame); }
em { font-style: normal; color: var(--wrong); }
.name { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--faint); }
</style>
<header>
<h1>$title</h1>
<p>$legend</p>
<form onsubmit="return false" autocomplete="off">
$filters
<input type="search" placeholder="file name of a query or a match" aria-label="file name of a query or a match">
<output></output>
</form>
</header>
<main>
$rows
</main>
<script>
const rows = [...document.querySelectorAll("section")];
const names = rows.map(row => [...row.querySelectorAll(".name")].map(name => name.textContent.toLowerCase()));
const filters = [...document.querySelectorAll("[type=radio]")];
const search = document.querySelector("[type=search]");
function update() {
  const filter = filters.find(filter => "#" + filter.value == location.hash) ?? filters[0];
  if (filter) filter.checked = true;
  const kind = filter?.value ?? "all";
  const text = search.value.trim().toLowerCase();
  rows.forEach((row, i) => {
    row.hidden = !row.classList.contains(kind) || !names[i].some(name => name.includes(text));
  });
  document.querySelector("output").value = rows.filter(row => !row.hidden).length + " of " + rows.length + " queries";
  scrollTo(0, 0);
}
for (const filter of filters) filter.onchange = () => location.hash = filter.value;
onhashchange = search.oninput = update;
update();
</script>
</html>
""")


def write_match_page(
    folder: Path,
    *,
    title: str,
    queries: Sequence[str],
    database: Sequence[str],
    predictions: NDArray[np.int64],
    correct: NDArray[np.bool_] | None,
    metres: NDArray[np.float64] | None,
    read: Callable[[str], Image.Image | None],
    judged: NDArray[np.bool_] | None = None,
    similarity: NDArray[np.float64] | None = None,
    rule: str = "",
    findable: NDArray[np.bool_] | None = None,
    accepted: NDArray[np.bool_] | None = None,
    accepted_rule: str = "",
) -> Path:
    """Writes `index.html` and a thumbnail of each image shown: one row per query, to filter in the browser.

    Args:
        folder: created if missing.
        title: e.g. "pitts30k test, R@1: 95.0, R@5: 97.4".
        queries: paths of Q images.
        database: paths of N images.
        predictions: Q x K database indices, best first; -1 is none.
        correct: which of them are correct, Q x K; None if unknown.
        metres: distance of each to its query, Q x K, NaN where a position is unknown; None if all are.
        read: returns an image as the model saw it, or smaller, down to `THUMBNAIL_SIDE`; None for a missing one, for
            which the page shows the name.
        judged: for which matches it is known whether they are correct, Q x K; None for all.
        similarity: cosine of the descriptors of query and match, Q x K; None if unknown.
        rule: the rule by which a match is correct, e.g. "within 25 m".
        findable: which queries have a correct image in the database, Q; None for all.
        accepted: which matches are accepted, Q x K; None without a threshold.
        accepted_rule: the rule by which they are accepted, e.g. "squared distance up to 0.8".

    Returns:
        The path of `index.html`, which is written last.

    Raises:
        ValueError: see `read`.
        OSError: the page cannot be written.
    """
    count, k = predictions.shape
    found = predictions >= 0
    paths = sorted({*queries, *(database[index] for index in np.unique(predictions[found]))})
    (folder / "thumbnails").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        images = pool.map(partial(_write_thumbnail, folder=folder, read=read), paths)
        image_of = dict(zip(paths, tqdm(images, total=len(paths), desc="thumbnails", unit="image"), strict=True))

    kinds: dict[str, NDArray[np.bool_]] = {"all": np.ones(count, dtype=bool)}
    labels, legend = ["all"], "Grey frames: unknown which matches are correct."
    if correct is not None:
        right = correct & found
        judged = np.ones_like(found) if judged is None else judged
        of_queries = judged.any(axis=1)
        kinds["first-wrong"] = np.asarray(judged[:, 0] & ~right[:, 0])
        kinds["none-correct"] = np.asarray(of_queries & ~right.any(axis=1))
        labels += ["first match wrong", f"no correct match among {k}"]
        findable = np.ones(count, dtype=bool) if findable is None else findable
        if not findable.all():
            kinds["nothing-to-find"] = ~findable
            labels.append("nothing to find")
        legend = f"✓ in a green frame: correct{rule and f', {escape(rule)}'}. ✗ in a red frame: wrong."
        if not judged.all():
            legend += " Grey frames: a position is unknown."
    if accepted is not None:
        accepted = accepted & found
        kinds["accepted"], kinds["rejected"] = accepted[:, 0], ~accepted[:, 0]
        labels += ["first match accepted", "not accepted"]
        if correct is not None and judged is not None:
            kinds["false-alarm"] = accepted[:, 0] & judged[:, 0] & ~correct[:, 0]
            labels.append("accepted and wrong")
        legend += f" Whole frames: accepted{accepted_rule and f', {escape(accepted_rule)}'}. Dashed and pale: not."
    filters = "\n".join(
        f'<label><input type="radio" name="show" value="{kind}"{" checked" * (kind == "all")}>{label} '
        f"({has.sum()})</label>"
        for label, (kind, has) in zip(labels, kinds.items(), strict=True)
        if len(labels) > 1
    )
    if similarity is not None:
        legend += " Similarity: cosine of the two descriptors."
    legend += " Click a photo to open it in full size."

    rows = []
    for query, query_path in enumerate(queries):
        caption = f"<b>query {query}</b>"
        if findable is not None and not findable[query]:
            caption += f" <em>nothing to find{rule and f' {escape(rule)}'}</em>"
        figures = [_figure(query_path, image_of[query_path], "query", caption, folder)]
        for rank in np.flatnonzero(found[query]):
            frame, caption, facts = "unknown", f"<b>{rank + 1}</b>", []
            if correct is not None and judged is not None and judged[query, rank]:
                frame, sign = ("correct", "✓") if correct[query, rank] else ("wrong", "✗")
                caption += f" <i>{sign}</i>"
            if metres is not None and not np.isnan(metres[query, rank]):
                facts.append(_distance(metres[query, rank]))
            if similarity is not None:
                facts.append(f"similarity {similarity[query, rank]:.3f}")
            caption += f" {', '.join(facts)}" if facts else ""
            if accepted is not None and not accepted[query, rank]:
                frame += " rejected"
            path = database[predictions[query, rank]]
            figures.append(_figure(path, image_of[path], frame, caption, folder))
        classes = " ".join(kind for kind, has in kinds.items() if has[query])
        rows.append(f'<section class="{classes}">\n' + "\n".join(figures) + "\n</section>")

    page = PAGE.substitute(title=escape(title), legend=legend, filters=filters, cells=k + 1, rows="\n".join(rows))
    with whole(folder / "index.html") as path_of_page:
        path_of_page.write_text(page, encoding="utf-8", errors="replace")  # file names may contain other bytes
    return folder / "index.html"


def _write_thumbnail(path: str, folder: Path, read: Callable[[str], Image.Image | None]) -> str:
    """Writes an image's thumbnail below `folder` and returns the `<img>` that shows it; "" without an image."""
    image = read(path)
    if image is None:
        return ""
    scale = THUMBNAIL_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)  # at least 1, for very thin images
    small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    # Named by the whole path: safe in a URL, and unique, also among those of an older page in this folder.
    source = f"thumbnails/{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.jpg"
    small.save(folder / source, quality=80)
    return f'<img src="{source}" width="{small.width}" height="{small.height}" loading="lazy" alt="">'


def _figure(path: str, image: str, frame: str, caption: str, folder: Path) -> str:
    """An image with its caption and file name, linked to the full one; `frame` is its kind.

    Kinds are query, correct, wrong and unknown, the last three optionally followed by rejected. The link is relative to
    the page, so that it works if both are moved or served together.
    """
    name = escape(os.path.basename(path))
    shown = '<div class="gone">the photo is not here</div>'
    if image:
        link = quote(os.fsencode(os.path.relpath(path, folder)))
        shown = f'<a href="{link}" target="_blank">{image}</a>'
    return (
        f'<figure class="{frame}" title="{escape(path)}">{shown}'
        f'<figcaption>{caption}<span class="name">{name}</span></figcaption></figure>'
    )


def _distance(metres: float) -> str:
    return f"{metres:.1f} m" if metres < 1000 else f"{metres / 1000:.1f} km"
