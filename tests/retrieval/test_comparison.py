"""Two runs compared: hand-made queries, scipy's values, and how often chance is called a difference."""

import csv
import json
import math

import numpy as np
import pytest

from utils import compare
from utils.retrieval.comparison import bootstrap_interval, compare_hits, in_words, mcnemar, wilson_interval

TEN = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], bool), np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], bool)


def test_ten_queries_by_hand():
    row = compare_hits(*TEN)
    assert (row["a"], row["b"], row["difference"]) == (50.0, 60.0, pytest.approx(10.0))
    assert (row["only_a"], row["only_b"], row["p"]) == (1, 2, 1.0)
    # Wilson's interval of 5 of 10, from its formula by hand: (5 + 1.92) / 13.84 -+ 0.263.
    assert row["a_interval"] == pytest.approx([23.66, 76.34], abs=0.01)
    assert row["interval"][0] < 0 < row["interval"][1]
    # (1.96^2 * (0.3 - 0.01)) / 0.01 queries would tell 10 points with 3 of 10 split.
    assert in_words(1, row, 10).endswith("the difference can be chance; at least about 112 queries would be needed")
    assert "more than chance" in in_words(1, compare_hits(np.zeros(50, bool), np.ones(50, bool)), 50)
    assert "the same queries" in in_words(5, compare_hits(TEN[0], TEN[0]), 10)


@pytest.mark.parametrize(("successes", "count"), [(88, 220), (0, 10), (10, 10), (1, 1), (25_000, 27_592), (3.4, 15)])
def test_the_ends_of_an_interval_solve_the_equation_that_defines_them(successes, count):
    """They are the roots p of (share - p)^2 = z^2 p (1 - p) / count."""
    share, z = successes / count, 1.959963984540054
    a, b, c = 1 + z * z / count, -(2 * share + z * z / count), share * share
    root = math.sqrt(b * b - 4 * a * c)
    expected = (-b - root) / (2 * a), (-b + root) / (2 * a)
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(  # scipy.stats.binomtest(min(a, b), a + b).pvalue, scipy 1.16
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (3, 11, 0.057373046875),
        (700, 800, 0.010559255466711506),
        (900, 1200, 6.337277315775641e-11),
    ],
)
def test_mcnemar_is_scipys_binomial_test(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p, rel=1e-9)


def test_the_bootstrap_is_that_of_plain_draws():
    """Of blocks too: what is drawn are runs of neighbours, as many queries as there are."""
    differences = np.repeat([1, 0, -1, 0, 0], 40)
    rng = np.random.default_rng(3)
    for block in (1, 7):
        starts = rng.integers(0, 200 - block + 1, (4000, -(-200 // block)))
        drawn = (starts[:, :, None] + np.arange(block)).reshape(4000, -1)[:, :200]
        expected = np.percentile(100 * differences[drawn].mean(axis=1), [2.5, 97.5])
        assert bootstrap_interval(differences, block=block) == pytest.approx(tuple(expected), abs=1.0)
    assert bootstrap_interval(differences, block=7) == bootstrap_interval(differences, block=7), "seeded"
    independent, together = (bootstrap_interval(differences, block=block) for block in (1, 20))
    assert together[1] - together[0] > 2 * (independent[1] - independent[0]), "neighbours resemble each other"


def test_equal_models_seldom_differ():
    rng = np.random.default_rng(1)
    misses = significant = 0
    for _ in range(400):
        ease = 0.1 + 0.8 * rng.random(500)
        row = compare_hits(rng.random(500) < ease, rng.random(500) < ease)
        misses += not row["interval"][0] <= 0 <= row["interval"][1]
        significant += row["p"] < 0.05
    assert 12 <= misses <= 28 and significant <= 20  # 3 to 7%, and 5% or fewer


@pytest.fixture
def run(tmp_path):
    """Writes what a run leaves: the rank of each query's correct match, 0 for none."""

    def write(name, ranks, *, digests=True, set_name="town test", seed=None, **results):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        dataset = {"name": set_name, "database": 9, "queries": len(ranks)}
        dataset |= {"digests": {"database": "d", "queries": "q", "labels": "l"}} if digests is True else digests or {}
        recalls = {str(n): 100 * np.mean([0 < rank <= n for rank in ranks]) for n in (1, 5)}
        content = {"recalls": recalls, "dataset": dataset, "contexts": {"file_order": {"orders": 1}}, **results}
        if seed is not None:
            content["checkpoint"] = {"training": {"seed": seed, "lr": 1e-3}}
        (folder / "results.json").write_text(json.dumps(content))
        with open(folder / "predictions.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["query", "rank", "database", "correct"])
            for query, correct in enumerate(ranks):
                for rank in range(1, 6):
                    rows.writerow([f"/q/{query}.jpg", rank, f"/d/{rank}.jpg", int(rank == correct)])
        return folder

    return write


def test_two_runs(run, capsys):
    a, b = run("a", [1, 1, 0, 3, 2]), run("b/1", [1, 0, 1, 1, 2])
    assert compare.main([str(a), str(b / "results.json")]) == 0
    shown = capsys.readouterr().out
    assert "B finds 20.0 points more at R@1" in shown and "can be chance" in shown
    row = json.loads((b / "compare.json").read_text())["sets"]["town test"]["1"]
    assert (row["a"], row["b"], row["only_a"], row["only_b"]) == (40.0, 60.0, 1, 2)
    with open(b / "compare.csv") as file:
        assert [(r["rank_a"], r["rank_b"]) for r in csv.DictReader(file)] == [
            ("1", "1"), ("1", ""), ("", "1"), ("3", "1"), ("2", "2")
        ]  # fmt: skip


def test_seeds_of_a_recipe(run, capsys, tmp_path):
    first, second = ([run(f"{name}{s}", [1] * k + [0] * (9 - k), seed=s) for s, k in enumerate(of)] for name, of in
                     (("a", (3, 4, 5)), ("b", (6, 6, 9))))  # fmt: skip
    assert compare.main([*map(str, first), "--against", *map(str, second), f"--output={tmp_path}/out"]) == 0
    row = json.loads((tmp_path / "out/compare.json").read_text())["recipes"]["town test"]["1"]
    assert row["a"] == {
        "mean": pytest.approx(400 / 9), "range": pytest.approx([300 / 9, 500 / 9]), "deviation": pytest.approx(100 / 9),
        "runs": 3,
    }  # fmt: skip
    assert row["difference"] == pytest.approx(300 / 9)
    assert "+33.3 points" in capsys.readouterr().out


def test_what_cannot_be_compared(run, tmp_path, capsys):
    a = run("a", [1, 0], seed=0)
    other = {"database": "d", "queries": "q", "labels": "x"}
    (tmp_path / "link").symlink_to(a)
    old, moved = run("old", [1, 0], digests=None), run("moved", [1, 1], digests=None)
    gap = run("gap", [1, 0])  # as if an index had found nothing for the first query
    table = gap / "predictions.csv"
    table.write_text("".join(line for line in table.open() if not line.startswith("/q/0")))
    for runs, told in (
        ([a, gap], "queries in predictions.csv"),
        ([a, tmp_path / "link"], "each once"),
        ([a, run("labels", [1, 0], digests={"digests": other})], "labels"),
        ([a, run("set", [1, 0], set_name="city test")], "city test"),
        ([old, moved], "labels"),
        ([a, run("seed", [1, 1], seed=0), run("third", [1, 1], seed=1)], "seeds [0, 0, 1]"),
        ([a, old, moved], "old"),
        ([a, tmp_path / "nowhere"], "nowhere"),
        ([a, run("b", [0, 1]), "--block=3"], "block 3"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare.main(list(map(str, runs)))
        assert ended.value.code == 2 and told in capsys.readouterr().err
    assert compare.main([str(a), str(run("of_1_0_0", [1, 0], digests=None))]) == 0
    assert "1.0.0" in capsys.readouterr().out
