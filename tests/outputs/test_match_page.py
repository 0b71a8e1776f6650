"""The page of matches."""

import os
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from pages import Page
from PIL import Image

from datasets.photos.transforms import read_reduced
from utils.outputs.match_page import THUMBNAIL_SIDE, write_match_page


def read(path, upright=True):
    return read_reduced(path, THUMBNAIL_SIDE, upright=upright)


@pytest.fixture
def photos(tmp_path):
    """Writes images of one colour below `photos` and returns their paths."""

    def write(*names, size=(320, 200), **settings):
        paths = [tmp_path / "photos" / name for name in names]
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (40 * number, 90, 160)).save(path, **settings)
        return [str(path) for path in paths]

    return write


def write(folder, **facts):
    """A page of what is given; the rest is unknown."""
    write_match_page(folder, **{"title": "x", "read": read, "shown": 9, **facts})
    return Page(folder / "index.html")


@pytest.fixture
def page(tmp_path, photos):
    """Three queries: the first match is right, the second one is, none is."""
    return write(
        tmp_path / "new" / "page",
        title="city <test>, R@1: 33.3",
        queries=photos("q/0.jpg", "q/1.jpg", "q/2.png"),
        database=photos("d/0.jpg", "d/1.jpg", "d/2.png", "d/unused.jpg"),
        predictions=np.array([[0, 1, 2], [1, 0, 2], [2, 1, -1]]),
        correct=np.array([[True, False, False], [False, True, True], [False, False, True]]),
        metres=np.array([[12.34, 999.0, 1234.0], [30.0, 0.0, 24.96], [54321.0, 100.0, np.nan]]),
    )


def test_a_row_holds_a_query_and_its_matches_and_filters_say_how_many(page, tmp_path):
    assert page.path == tmp_path / "new" / "page" / "index.html"
    assert [[figure["frame"] for figure in row["figures"]] for row in page.rows] == [
        ["query", "correct", "wrong", "wrong"],
        ["query", "wrong", "correct", "correct"],
        ["query", "wrong", "wrong"],  # -1 is no match
    ]
    assert [figure["words"] for figure in page.figures(0)] == [
        ["query", "0", "0.jpg"],
        ["1", "✓", "12.3", "m", "0.jpg"],
        ["2", "✗", "999.0", "m", "1.jpg"],
        ["3", "✗", "1.2", "km", "2.png"],
    ]
    assert page.figures(2)[1]["words"] == ["1", "✗", "54.3", "km", "2.png"]
    assert page.figures(2)[0]["path"] == str(tmp_path / "photos" / "q" / "2.png")
    kinds = [["all"], ["all", "first-wrong"], ["all", "first-wrong", "none-correct"]]
    assert [row["kinds"] for row in page.rows] == kinds
    counts = {"all": "(3)", "first-wrong": "(2)", "none-correct": "(1)"}
    assert {value: words[-1] for value, words in page.filters.items()} == counts


def test_the_page_needs_nothing_from_elsewhere_and_small_thumbnails(page):
    text = page.path.read_text(encoding="utf-8")
    for address in page.addresses:  # thumbnails, and links to the full photos
        assert address.startswith(("thumbnails/", "../../photos/"))
        assert (page.path.parent / address).is_file()
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert "<h1>city &lt;test&gt;, R@1: 33.3</h1>" in text
    assert {path.name for path in page.path.parent.iterdir()} == {"index.html", "thumbnails"}
    images = {figure["path"]: figure["image"] for row in page.rows for figure in row["figures"]}
    sources = {image["src"] for image in images.values()}
    # Three queries and three database images; the one that nothing matched has none.
    assert len(images) == len(sources) == len(list((page.path.parent / "thumbnails").iterdir())) == 6
    for path, attrs in images.items():
        assert attrs["loading"] == "lazy"
        with Image.open(page.path.parent / attrs["src"]) as thumbnail, Image.open(path) as image:
            assert thumbnail.size == (int(attrs["width"]), int(attrs["height"])) == (240, 150)
            np.testing.assert_allclose(thumbnail.getpixel((99, 99)), image.convert("RGB").getpixel((99, 99)), atol=4)


def write_plain(folder, paths, **facts):
    """A page of one query, the first path, that found all others."""
    predictions = np.arange(len(paths) - 1)[None]
    return write(folder, queries=paths[:1], database=paths[1:], predictions=predictions, **facts)


def sizes(page):
    return [(int(figure["image"]["width"]), int(figure["image"]["height"])) for figure in page.figures(0)]


def test_odd_file_names(tmp_path, photos):
    paths = photos(
        "a/@1.5@-2@.jpg",
        "b/@1.5@-2@.jpg",
        "b/100% #1?.jpg",
        "b/<b> & \"quotes\" 'too' ✓.jpg",
        "b/{{ title }}\n.jpg",
        "b/\udcff.jpg",  # a byte that is not UTF-8
    )
    page = write_plain(tmp_path / "a page #1", paths)  # without labels
    assert [figure["frame"] for figure in page.figures(0)] == ["query", *["unknown"] * 5]
    assert page.filters == {} and page.rows[0]["kinds"] == ["all"]
    assert page.figures(0)[1]["words"] == ["1", "@1.5@-2@.jpg"]
    assert [figure["path"] for figure in page.figures(0)] == [*paths[:-1], paths[-1].replace("\udcff", "?")]
    for number, figure in enumerate(page.figures(0)):
        assert set(figure["image"]["src"]) <= set("thumbnails/0123456789abcdef.jpg")
        with Image.open(page.path.parent / figure["image"]["src"]) as thumbnail:
            assert thumbnail.getpixel((9, 9))[0] == pytest.approx(40 * number, abs=4)
    links = [address for address in page.addresses if not address.startswith("thumbnails/")]
    assert all((page.path.parent / os.fsdecode(unquote_to_bytes(link))).is_file() for link in links)


def test_photos_are_shown_as_the_model_saw_them(tmp_path, photos, monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # the camera was held sideways
    # The maker's tag turned into the image's width: text where a number belongs, which Pillow reads but cannot write.
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    paths = photos("turned.jpg", "turned.png", exif=exif) + photos("odd.jpg", exif=odd) + photos("s.png", size=(30, 50))
    assert sizes(write_plain(tmp_path / "upright", paths)) == [(150, 240), (150, 240), (150, 240), (144, 240)]
    paths = [paths[0], *photos("thin.jpg", size=(9000, 6))]
    with monkeypatch.context() as small:  # Pillow refuses twice as many pixels; the model does not
        small.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        stored = write_plain(tmp_path / "stored", paths, read=lambda path: read(path, upright=False))
    assert sizes(stored) == [(240, 150), (240, 1)]
    # The model reads the upper 8 of 16 bits, where Pillow's own conversion gives white.
    Image.fromarray(np.full((20, 30), 128 << 8, dtype=np.uint16)).save(tmp_path / "photos/deep.png")
    page = write_plain(tmp_path / "deep", [paths[0], str(tmp_path / "photos/deep.png")])
    with Image.open(page.path.parent / page.figures(0)[1]["image"]["src"]) as thumbnail:
        assert thumbnail.getpixel((9, 9)) == pytest.approx((128, 128, 128), abs=2)


def test_an_image_that_cannot_be_read(tmp_path, photos):
    paths = photos("0.jpg", "bad.jpg", "2.jpg")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        write_plain(tmp_path / "page", paths)
    assert not list((tmp_path / "page").glob("index.html*"))


def test_what_was_right_follows_where_no_match_is(tmp_path, photos):
    """Query 0 finds it at rank 1, query 1 at rank 4, query 2 not at all: it is shown the nearest photo."""
    database = photos("d/0.jpg", "d/1.jpg", "d/2.jpg", "d/3.jpg", "d/4.jpg")
    predictions = np.array([[0, 1, 2, 3], [1, 2, 3, 0], [1, 2, 3, 0]])
    apart = np.array([[3.0, 90.0, 91.0, 92.0, 4.0], [1.0, 80.0, 81.0, 82.0, 90.0], [134.0, 70.0, 71.0, 72.0, 61.5]])
    page = write(
        tmp_path / "page",
        queries=photos("q/0.jpg", "q/1.jpg", "q/2.jpg"),
        database=database,
        predictions=predictions,
        correct=np.take_along_axis(apart, predictions, 1) <= 25,
        metres=np.take_along_axis(apart, predictions, 1),
        similarity=np.array([[0.98765, 0.5, 0.4, 0.3]] * 3),
        rule="within 25 m",
        has_positive=np.array([True, True, False]),
        accepted=np.array([[True, True, False, False], [False] * 4, [True] + [False] * 3]),
        accepted_rule="squared descriptor distance up to 0.8",
        shown=2,
        metres_to=lambda query: apart[query],
    )
    frames = [[figure["frame"] for figure in row["figures"]] for row in page.rows]
    assert frames == [
        ["query", "correct", "wrong"],
        ["query", "wrong rejected", "wrong rejected", "correct rejected"],
        ["query", "wrong", "wrong rejected", "nearest"],
    ]
    assert page.figures(0)[1]["words"] == "1 ✓ 3.0 m, similarity 0.988 0.jpg".split()
    assert page.figures(1)[3]["words"] == "4 ✓ 1.0 m, similarity 0.300 0.jpg".split()
    assert page.figures(2)[3]["words"] == "nearest 61.5 m 4.jpg".split()
    assert page.figures(2)[0]["words"] == "query 2 nothing to find within 25 m 2.jpg".split()
    assert [row["kinds"] for row in page.rows] == [
        ["all", "accepted"],
        ["all", "first-wrong", "none-correct", "rejected"],
        ["all", "first-wrong", "none-correct", "nothing-to-find", "accepted", "false-alarm"],
    ]
    assert page.filters["none-correct"] == "no correct match among 2 (2)".split()
    text = page.path.read_text(encoding="utf-8")
    assert "correct, within 25 m" in text and "accepted, squared descriptor distance up to 0.8" in text
    # The row of a query is of the kind `rejected` too, which must not make the query pale.
    assert text.count(".rejected") == text.count("figure.rejected") == 2
