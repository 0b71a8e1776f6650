"""Tables of the pages say what the records of the runs say."""

import json
import re
import shutil

import pytest
from corridor import RECALLS

from benchmarks import measuring, tables

RECORDS = sorted((tables.ROOT / tables.RESULTS).glob("*.json"))


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages, their definitions and the records."""
    for path in [*tables.pages(tables.ROOT), tables.ROOT / tables.DEFINITIONS, *RECORDS]:
        (tmp_path / path.relative_to(tables.ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(tables.ROOT))
    return tmp_path


def test_pages_say_what_their_records_say_and_show_all_that_is_defined(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    shown = [tables.TABLE.findall(path.read_text()) for path in tables.pages(tables.ROOT)]
    assert {name for page in shown for _, name, _, _ in page} == set(tables.tables_of(tables.ROOT))


def test_a_wrong_digit_on_a_page_is_noticed_and_put_right(copy, capsys):
    for page in (path for path in tables.pages(copy) if tables.TABLE.search(path.read_text())):
        right = page.read_text()
        digit = list(re.finditer(r"\d", tables.TABLE.search(right)[3]))[-1]
        at = tables.TABLE.search(right).start(3) + digit.start()
        page.write_text(right[:at] + str((int(digit[0]) + 1) % 10) + right[at + 1 :])
        capsys.readouterr()
        assert tables.main(["--check"], copy) == 1
        assert capsys.readouterr().out.startswith(f"{page.relative_to(copy)}: ")
        assert tables.main([], copy) == 0
        assert page.read_text() == right


@pytest.mark.parametrize("flags", RECALLS)
def test_records_on_real_photos_are_the_released_codes_recalls(flags):
    name = "encoder" if "encoder" in flags else "plain" if "s=4" in flags else "one_cluster"
    record = tables.read_record(tables.ROOT / tables.RESULTS / f"corridor_{name}.json")
    assert tuple(round(record["recalls"][n], 1) for n in (1, 5, 10, 20)) == RECALLS[flags]
    options = record["options"]
    assert options["crossimage_encoder"] == ("encoder" in flags) and options["resize"] == [112, 112]
    assert f"s={options['supervlad_clusters']}" in flags


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_whence_and_has_no_path_of_a_machine(record):
    content = json.loads(record.read_text())
    assert content[{"measured": "environment", "published": "source", "noted": "source"}[content["kind"]]]
    assert not re.search(r'["\s(][~/]\w', record.read_text())
    assert "/" not in json.dumps(content.get("options", {}))


def test_a_run_becomes_a_record(copy, capsys):
    """As eval.py leaves it: paths and curves go, figures, options and versions stay, to the last digit."""
    run = copy / "elsewhere" / "2026-11-25_20-13-39" / "results.json"
    run.parent.mkdir(parents=True)
    content = {
        "contexts": {"file_order": {"recalls": {"1": 100 / 3}, "first_match": {"queries": 3}}},
        "options": {"resume": "/home/ann/best.pth", "train_dataset_folder": ["/data/gsv_cities"], "resize": [112, 112]},
        "environment": {"device": "Some GPU 40/80 GB", "git": "cb96e83-dirty"},
    }
    run.write_text(json.dumps(content))
    assert tables.main(["--add", "mine", str(run)], copy) == 0
    assert "warning: " in capsys.readouterr().out
    assert json.loads((copy / tables.RESULTS / "mine.json").read_text()) == {
        "kind": "measured",
        "run": "2026-11-25_20-13-39",
        "contexts": {"file_order": {"recalls": {"1": 100 / 3}}},
        "options": {"resume": "best.pth", "train_dataset_folder": ["gsv_cities"], "resize": [112, 112]},
        "environment": content["environment"],
    }
    page = copy / "docs/data.md"
    for path, row in ((copy / tables.DEFINITIONS, "| {mine[contexts][file_order][recalls]:1} |\n"), (page, "")):
        path.write_text(path.read_text() + f"<!-- table: mine -->\n{row}<!-- end -->\n")
    assert tables.main([], copy) == 0
    assert page.read_text().endswith("<!-- table: mine -->\n| 33.3 |\n<!-- end -->\n")


def test_a_benchmark_leaves_what_becomes_a_record(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    settings = measuring.settings_of(measuring.parser_of(None), [])
    measuring.record("stages", {"decode (one core)": {"images/s": 330.5}}, settings)
    command = capsys.readouterr().out.split("benchmarks.tables ")[1].split(" makes")[0]
    assert tables.main(command.split(), copy) == 0
    record = tables.read_record(copy / tables.RESULTS / "stages.json")
    assert record["decode (one core)"]["images/s"] == 330.5 and record["environment"]["threads"] >= 1


@pytest.mark.parametrize(
    ("new", "reason"), [("published_author[Nordland][recalls]:1", "published_author"), ("demo_after:7", "KeyError: 7")]
)
def test_a_field_without_a_figure_is_refused(new, reason, copy):
    definitions = copy / tables.DEFINITIONS
    definitions.write_text(definitions.read_text().replace("published_authors[Nordland][recalls]:1 5 10", new, 1))
    before = (copy / "README.md").read_text()
    with pytest.raises(ValueError, match=f"published: .*{reason}"):
        tables.main([], copy)
    assert (copy / "README.md").read_text() == before
