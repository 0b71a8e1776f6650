"""Each benchmark runs, on something tiny, and measures what it says."""

from functools import partial

import numpy as np
import pytest
from helpers import results_of

from benchmarks import compare, end_to_end, measuring, memory, place_map, search_memory, stages

pytestmark = pytest.mark.slow

TINY = "--backbone=dino_tiny --size 56 56 --train_size 56 56 --places=2 --batch=2 --num_workers=1 --device=cpu".split()


@pytest.fixture(autouse=True)
def tiny(city, monkeypatch, tmp_path):
    """Few photos, and results in a folder of the test's own."""
    photos = [str(path) for path in sorted((city / "toy_city").rglob("*.jpg"))]
    for module in (compare, end_to_end, stages):
        monkeypatch.setattr(module, "made_photos", lambda count, size=None: photos[: min(count, 8)])
        monkeypatch.setattr(module, "medians", partial(measuring.medians, rounds=1))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def left(tmp_path):
    """Reads the figures of the one benchmark that has run."""

    def read():
        (path,) = tmp_path.glob("logs/benchmarks/*/*/results.json")
        return results_of(path.parent)

    return read


def test_stages(left, capsys, monkeypatch):
    monkeypatch.setattr(stages, "matrix_rate", lambda device, precision: 1e10)
    nearest = stages.search.nearest
    monkeypatch.setattr(stages.search, "nearest", lambda queries, *given: nearest(queries[:10], *given))
    stages.main(TINY)
    figures, printed = left(), capsys.readouterr().out
    for stage in ("backbone", "evaluation, whole", "training: whole step", "search, queries in 10,000 x 3072"):
        assert figures[stage]["images/s"] > 0 and f"\n{stage} " in printed
    assert figures["settings"]["places"] == 2 and 0 <= figures["waiting for data"] < 1


def test_end_to_end(left, capsys):
    """Both ways describe a photo alike."""
    end_to_end.main([*TINY, "--count=4"])
    figures = left()
    assert figures["evaluation, least cosine similarity"] == pytest.approx(1, abs=1e-5)
    assert figures["training, ratio"] > 0 and "evaluation, ratio" in capsys.readouterr().out


def test_compare(city, monkeypatch, left, capsys):
    monkeypatch.setitem(compare.STAGES, "start", lambda: compare.compare_start(images=200, queries=20))
    monkeypatch.setitem(compare.STAGES, "table", lambda: compare.compare_table(rows=2000))
    compare.main(["--only", "input", "start", "table"])
    figures = left()
    assert figures["evaluation input, largest difference"] < 1e-5 and figures["table loaded, s"] > 0
    assert "listing 200 images, s" in capsys.readouterr().out


def test_memory(monkeypatch):
    parser = measuring.parser_of(None, "backbone", "train_size", "places", "precision")
    settings = measuring.settings_of(parser, TINY[:1])
    settings.train_size, settings.freeze_te, settings.chunk = (56, 56), 0, 4
    for way in memory.WAYS:
        gigabytes, seconds = memory.measure(way, settings)
        assert 0 <= gigabytes < 10 and seconds > 0


def test_search_memory(tmp_path, left, capsys):
    """All neighbours are candidates of an index that looks at all of its lists."""
    flags = "--database=2000 --queries=20 --dim=64 --indices binary IVF4,Flat --parameters=nprobe=4".split()
    search_memory.main([*flags, f"--folder={tmp_path}"])
    figures, printed = left(), capsys.readouterr().out
    assert "equal to brute force on 20 queries: 100.00% of their first 20" in printed
    assert figures["IVF4,Flat, nprobe=4"]["first 20"] == figures["binary, --rerank 1000"]["nearest"] == 100
    assert not (tmp_path / "search_memory").exists()


def test_place_map(left):
    place_map.main("--photos=300 --dim=64 --queries=10".split())
    assert left()["float16"]["same photo"] == 100


def test_medians_are_of_the_rounds_that_count():
    clock = iter(np.cumsum([0, 100, 0, 1, 0, 9, 0, 2]))
    assert measuring.medians({"way": lambda: None}, rounds=3, clock=lambda: next(clock)) == {"way": 2}
