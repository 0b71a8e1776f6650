"""The page of matches."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from datasets.photos.transforms import read_reduced
from utils.outputs.match_page import THUMBNAIL_SIDE, write_match_page


def read(path, upright=True):
    return read_reduced(path, THUMBNAIL_SIDE, upright=upright)


class Page(HTMLParser):
    """Rows of figures, each with its class, path, image and words; filters by value, with their words."""

    def __init__(self, path):
        super().__init__()
        self.path, self.rows, self.filters, self.texts, self.addresses = path, [], {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "section":
            self.rows.append({"kinds": attrs["class"].split(), "figures": []})
        elif tag == "figure":
            self.texts = []
            self.rows[-1]["figures"].append({"frame": attrs["class"], "path": attrs["title"], "words": self.texts})
        elif tag == "img":
            self.rows[-1]["figures"][-1]["image"] = attrs
        elif tag == "input" and attrs["type"] == "radio":
            self.filters[attrs["value"]] = self.texts = []

    def handle_endtag(self, tag):
        if tag in ("figure", "label"):
            self.texts = []

    def handle_data(self, data):
        self.texts += data.split()

    def figures(self, row):
        return self.rows[row]["figures"]


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


@pytest.fixture
def page(tmp_path, photos):
    """Three queries: the first match is right, the second one is, none is."""
    path = write_match_page(
        tmp_path / "new" / "page",
        title="city <test>, R@1: 33.3",
        queries=photos("q/0.jpg", "q/1.jpg", "q/2.png"),
        database=photos("d/0.jpg", "d/1.jpg", "d/2.png", "d/unused.jpg"),
        predictions=np.array([[0, 1, 2], [1, 0, 2], [2, 1, -1]]),
        correct=np.array([[True, False, False], [False, True, True], [False, False, True]]),
        metres=np.array([[12.34, 999.0, 1234.0], [30.0, 0.0, 24.96], [54321.0, 100.0, np.nan]]),
        read=read,
    )
    return Page(path)


def test_a_row_holds_a_query_and_its_matches(page, tmp_path):
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


def test_filters_say_how_many_they_show(page):
    assert [row["kinds"] for row in page.rows] == [
        ["all"],
        ["all", "first-wrong"],
        ["all", "first-wrong", "none-correct"],
    ]
    assert {value: words[-1] for value, words in page.filters.items()} == {
        "all": "(3)",
        "first-wrong": "(2)",
        "none-correct": "(1)",
    }


def test_thumbnails_are_small_and_one_an_image(page):
    images = {figure["path"]: figure["image"] for row in page.rows for figure in row["figures"]}
    sources = {image["src"] for image in images.values()}
    # Three queries and three database images; the one that nothing matched has none.
    assert len(images) == len(sources) == len(list((page.path.parent / "thumbnails").iterdir())) == 6
    for path, attrs in images.items():
        assert attrs["loading"] == "lazy"
        with Image.open(page.path.parent / attrs["src"]) as thumbnail, Image.open(path) as image:
            assert thumbnail.size == (int(attrs["width"]), int(attrs["height"])) == (240, 150)
            np.testing.assert_allclose(thumbnail.getpixel((99, 99)), image.convert("RGB").getpixel((99, 99)), atol=4)


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page.path.read_text(encoding="utf-8")
    for address in page.addresses:  # thumbnails, and links to the full photos
        assert address.startswith(("thumbnails/", "../../photos/"))
        assert (page.path.parent / address).is_file()
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert "<h1>city &lt;test&gt;, R@1: 33.3</h1>" in text
    assert {path.name for path in page.path.parent.iterdir()} == {"index.html", "thumbnails"}


def write_plain(folder, paths, **facts):
    """A page of one query, the first path, that found all others."""
    predictions = np.arange(len(paths) - 1)[None]
    facts = {"correct": None, "metres": None, "read": read, **facts}
    path = write_match_page(folder, title="x", queries=paths[:1], database=paths[1:], predictions=predictions, **facts)
    return Page(path)


def test_without_labels(tmp_path, photos):
    page = write_plain(tmp_path / "page", photos("0.jpg", "1.jpg", "2.jpg"))
    assert [(figure["frame"], figure["words"]) for figure in page.figures(0)] == [
        ("query", ["query", "0", "0.jpg"]),
        ("unknown", ["1", "1.jpg"]),
        ("unknown", ["2", "2.jpg"]),
    ]
    assert page.filters == {} and page.rows[0]["kinds"] == ["all"]


def test_odd_file_names(tmp_path, photos):
    paths = photos(
        "a/@1.5@-2@.jpg",
        "b/@1.5@-2@.jpg",
        "b/100% #1?.jpg",
        "b/<b> & \"quotes\" 'too' ✓.jpg",
        "b/$title\n.jpg",
        "b/\udcff.jpg",  # a byte that is not UTF-8
    )
    page = write_plain(tmp_path / "a page #1", paths)
    assert [figure["path"] for figure in page.figures(0)] == [*paths[:-1], paths[-1].replace("\udcff", "?")]
    for number, figure in enumerate(page.figures(0)):
        assert set(figure["image"]["src"]) <= set("thumbnails/0123456789abcdef.jpg")
        with Image.open(page.path.parent / figure["image"]["src"]) as thumbnail:
            assert thumbnail.getpixel((9, 9))[0] == pytest.approx(40 * number, abs=4)


def test_photos_stand_upright_and_are_of_one_size(tmp_path, photos):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # the camera was held sideways
    # The maker's tag turned into the image's width: text where a number belongs, which Pillow reads but cannot write.
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    paths = photos("turned.jpg", exif=exif) + photos("odd.jpg", exif=odd) + photos("small.png", size=(30, 50))
    page = write_plain(tmp_path / "page", paths)
    sizes = [(figure["image"]["width"], figure["image"]["height"]) for figure in page.figures(0)]
    assert sizes == [("150", "240"), ("150", "240"), ("144", "240")]


def test_an_image_that_cannot_be_read(tmp_path, photos):
    paths = photos("0.jpg", "bad.jpg", "2.jpg")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*bad\.jpg .*; replace or remove it"):
        write_plain(tmp_path / "page", paths)
    assert not list((tmp_path / "page").glob("index.html*"))


def test_photos_are_shown_as_the_model_saw_them(tmp_path, photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = photos("turned.jpg", "turned.png", exif=exif)
    for name, upright, size in (("upright", True, ("150", "240")), ("stored", False, ("240", "150"))):
        page = write_plain(tmp_path / name, paths, read=lambda path, upright=upright: read(path, upright))
        for figure in page.figures(0):
            assert (figure["image"]["width"], figure["image"]["height"]) == size
    # The model reads the upper 8 of 16 bits, where Pillow's own conversion gives white.
    Image.fromarray(np.full((20, 30), 128 << 8, dtype=np.uint16)).save(tmp_path / "photos/deep.png")
    page = write_plain(tmp_path / "deep", [paths[0], str(tmp_path / "photos/deep.png")])
    with Image.open(page.path.parent / page.figures(0)[1]["image"]["src"]) as thumbnail:
        assert thumbnail.getpixel((9, 9)) == pytest.approx((128, 128, 128), abs=2)


def test_large_and_thin_photos(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many; the model does not
    paths = photos("large.jpg", size=(400, 300)) + photos("thin.jpg", "thinner.jpg", size=(9000, 6))
    paths += photos("tall.jpg", size=(3, 4000))
    page = write_plain(tmp_path / "page", paths, read=lambda path: read(path, upright=False))
    sizes = [(figure["image"]["width"], figure["image"]["height"]) for figure in page.figures(0)]
    assert sizes == [("240", "180"), ("240", "1"), ("240", "1"), ("1", "240")]


def test_what_was_not_to_be_found_is_marked(tmp_path, photos):
    page = Page(
        write_match_page(
            tmp_path / "page",
            title="x",
            queries=photos("q/0.jpg", "q/1.jpg"),
            database=photos("d/0.jpg"),
            predictions=np.array([[0], [0]]),
            correct=np.array([[True], [False]]),
            metres=np.array([[3.0], [134.0]]),
            read=read,
            similarity=np.array([[0.98765], [0.5]]),
            rule="within 25 m",
            findable=np.array([True, False]),
        )
    )
    assert "nothing-to-find" not in page.rows[0]["kinds"] and "nothing-to-find" in page.rows[1]["kinds"]
    assert page.filters["nothing-to-find"][-1] == "(1)"
    assert page.figures(1)[0]["words"] == "query 1 nothing to find within 25 m 1.jpg".split()
    assert page.figures(0)[1]["words"] == "1 ✓ 3.0 m, similarity 0.988 0.jpg".split()
    assert "correct, within 25 m" in page.path.read_text(encoding="utf-8")
