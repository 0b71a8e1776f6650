"""Tables and sentences of the pages say what the records of the runs say."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from corridor import RECALLS

from benchmarks import measuring, tables

RECORDS = sorted((tables.ROOT / tables.RESULTS).glob("*.json"))
TABLES = [
    pytest.param(path.relative_to(tables.ROOT), match[3], id=f"{path.relative_to(tables.ROOT)}: {match[3]}")
    for path in tables.pages(tables.ROOT)
    for match in tables.marked(path, path.read_text())
]


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages, their definitions and the records."""
    for path in [*tables.pages(tables.ROOT), tables.ROOT / tables.DEFINITIONS, *RECORDS]:
        (tmp_path / path.relative_to(tables.ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(tables.ROOT))
    return tmp_path


def check(root, capsys):
    """The exit status of --check and its lines."""
    status = tables.main(["--check"], root)
    return status, capsys.readouterr().out.splitlines()


def refused(argv, root, capsys):
    """The last line of what exits with status 2."""
    with pytest.raises(SystemExit, match="^2$"):
        tables.main(argv, root)
    return capsys.readouterr().err.splitlines()[-1]


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_pages_say_what_their_records_say(capsys):
    status, lines = check(tables.ROOT, capsys)
    assert status == 0, "\n".join(lines)


def test_all_that_is_defined_is_shown():
    shown = {table.values[1] for table in TABLES}
    assert shown == set(tables.Definitions(tables.ROOT).tables)


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_digit_of_a_table_is_noticed_and_put_right(page, name, copy, capsys):
    path = copy / page
    before = path.read_text()
    (match,) = [match for match in tables.marked(path, before) if match[3] == name]
    digits = [digit for digit in re.finditer(r"\d", before) if match.start(4) <= digit.start() < match.end(4)]
    for digit in (digits[-1], digits[len(digits) // 2]):
        wrong = str((int(digit[0]) + 1) % 10)
        path.write_text(before[: digit.start()] + wrong + before[digit.end() :])
        status, lines = check(copy, capsys)
        assert status == 1 and len(lines) == 1
        assert lines[0].startswith(f"{page.as_posix()}: the table {name} is not that of its records")
        assert tables.main([], copy) == 0
        assert path.read_text() == before
        assert capsys.readouterr().out.splitlines() == [f"written: {page}", "all tables are those of their records"]


def bumped(value):
    """The same with other figures."""
    if isinstance(value, dict):
        return {key: of if key in ("options", "kind", "source") else bumped(of) for key, of in value.items()}
    if isinstance(value, list):
        return [bumped(of) for of in value]
    return value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_each_record_is_shown(record, copy, capsys):
    path = copy / record.relative_to(tables.ROOT)
    path.write_text(json.dumps(bumped(json.loads(path.read_text()))))
    assert check(copy, capsys)[0] == 1, "nothing shows what this record says"


def test_a_figure_of_a_record_is_that_of_each_page(copy, capsys):
    """The authors' R@1 on Pitts30k stands in three tables."""
    change(copy / tables.RESULTS / "published_authors.json", '"1": 95.0', '"1": 95.1')
    _, lines = check(copy, capsys)
    assert [line.split(" is not")[0] for line in lines] == [
        "README.md: the table published",
        "REPRODUCE.md: the table published_with_time",
        "REPRODUCE.md: the table published_training",
    ]
    tables.main([], copy)
    assert "| Pitts30k | 95.1 | 97.4 | 98.2 |" in (copy / "README.md").read_text()
    assert "95.1/97.4/98.2" in (copy / "REPRODUCE.md").read_text()
    changed = {
        page for page in tables.pages(copy) if page.read_text() != (tables.ROOT / page.relative_to(copy)).read_text()
    }
    assert changed == {copy / "README.md", copy / "REPRODUCE.md"}


@pytest.mark.parametrize(
    ("page", "figure", "other"),
    [
        ("REPRODUCE.md", "1.4 photos per second", "1.5 photos per second"),
        ("docs/programs.md", "1.2 to 1.5 ms", "1.2 to 1.6 ms"),
        ("docs/speed.md", "load in 1.8 s", "load in 1.9 s"),
    ],
)
def test_a_sentence_is_checked_and_left_to_its_writer(page, figure, other, copy, capsys):
    change(copy / page, figure, other)
    for argv in (["--check"], []):
        assert tables.main(argv, copy) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{page}: no sentence says ") and other in (copy / page).read_text()


def test_sentences_of_a_page_that_is_gone_are_missed(copy, capsys):
    (copy / "docs/programs.md").rename(copy / "docs/robots.md")
    status, lines = check(copy, capsys)
    assert status == 1 and lines == [
        "docs/programs.md: there is no such page, but benchmarks/tables.md has figures of its sentences"
    ]


@pytest.mark.parametrize("flags", RECALLS)
def test_records_on_real_photos_are_the_released_codes_recalls(flags):
    name = "encoder" if "encoder" in flags else "plain" if "s=4" in flags else "one_cluster"
    record = tables.read_record(tables.ROOT / tables.RESULTS / f"corridor_{name}.json")
    assert tuple(round(record["recalls"][n], 1) for n in (1, 5, 10, 20)) == RECALLS[flags]
    options = record["options"]
    assert options["crossimage_encoder"] == ("encoder" in flags) and options["resize"] == [112, 112]
    assert f"s={options['supervlad_clusters']}" in flags


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_records_have_no_paths_of_a_machine(record):
    text = record.read_text()
    assert not re.search(r'["\s(][~/]\w', text)
    options = json.loads(text).get("options", {})
    assert "/" not in json.dumps(options)


def test_a_run_becomes_a_record(copy, tmp_path, monkeypatch, capsys):
    """As eval.py leaves it: paths go, figures, options and versions stay, to the last digit."""
    run = tmp_path / "elsewhere" / "2026-11-25_20-13-39" / "results.json"
    run.parent.mkdir(parents=True)
    content = {
        "recalls": {"1": 100 / 3},
        "contexts": {"file_order": {"recalls": {"1": 100 / 3}, "orders": 1, "first_match": {"queries": 3}}},
        "options": {"resume": "/home/ann/models/best.pth", "eval_datasets_folder": "~/data", "resize": [112, 112]},
        "environment": {"device": "Some GPU 40/80 GB", "git": "cb96e83"},
    }
    content["options"] |= {"train_dataset_folder": ["/data/gsv_cities", "mine"], "index": None}
    run.write_text(json.dumps(content))
    assert tables.main(["--add", str(run), "--name=mine", "--note=by hand"], copy) == 0
    assert json.loads((copy / tables.RESULTS / "mine.json").read_text()) == {
        "kind": "measured",
        "run": "2026-11-25_20-13-39",
        "note": "by hand",
        "recalls": {"1": 100 / 3},
        "contexts": {"file_order": {"recalls": {"1": 100 / 3}, "orders": 1}},
        "options": {
            "resume": "best.pth",
            "eval_datasets_folder": "data",
            "resize": [112, 112],
            "train_dataset_folder": ["gsv_cities", "mine"],
            "index": None,
        },
        "environment": content["environment"],
    }
    definitions = copy / tables.DEFINITIONS
    definitions.write_text(
        definitions.read_text() + "<!-- table: mine -->\n| {mine[contexts][file_order][recalls]:1} |\n<!-- end -->\n"
    )
    page = copy / "docs/data.md"
    page.write_text(page.read_text() + "<!-- table: mine -->\n<!-- end -->\n")
    assert tables.main([], copy) == 0
    assert page.read_text().endswith("<!-- table: mine -->\n| 33.3 |\n<!-- end -->\n")


def test_a_benchmark_leaves_what_becomes_a_record(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    measuring.record("stages", {"decode (one core)": {"images/s": 330.5}}, torch.device("cpu"))
    command = capsys.readouterr().out.split("benchmarks.tables ")[1].split(" makes")[0]
    assert tables.main(command.split(), copy) == 0
    record = tables.read_record(copy / tables.RESULTS / "stages.json")
    assert record["decode (one core)"]["images/s"] == 330.5 and record["environment"]["threads"] >= 1


def test_what_is_no_record_is_refused(copy, capsys):
    results = copy / "results.json"
    add = ["--add", str(results), "--name=mine"]
    remedy = "; name the results.json that train.py, eval.py or a benchmark left"
    line = refused(add, copy, capsys)
    assert line.endswith(f"error: --add {results} cannot be read (No such file or directory){remedy}")
    for folder in (copy, copy / "docs/data.md/results.json"):
        line = refused(["--add", str(folder), "--name=mine"], copy, capsys)
        assert f"--add {folder} cannot be read (" in line and line.endswith(remedy) and "Errno" not in line
    for content, reason in (
        (b"{", "is not JSON"),
        (b"\xff\xd8\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a record"),
        (b"{}", "is not the results.json of a run"),
        (b'{"environment": {}}', "is not the results.json of a run"),
        (b'{"environment": "GPU"}', "is not the results.json of a run"),
        (b'{"kind": "measured", "environment": {"git": "cb96e83"}}', "is a record already"),
    ):
        results.write_bytes(content)
        line = refused(add, copy, capsys)
        assert f"--add {results} {reason}" in line and line.endswith(remedy)
    results.write_text('{"environment": {"git": "cb96e83"}}')
    for name in ("a-b", "derived"):
        line = refused([*add[:2], f"--name={name}"], copy, capsys)
        assert f"--name {name}: a record's name is letters, digits and _" in line
    for flag in ("--name=mine", "--note=mine", "--replace"):
        assert f"{flag.split('=')[0]} is about the record that --add makes" in refused([flag], copy, capsys)
    assert "--add needs a --name" in refused(add[:2], copy, capsys)
    assert not (copy / tables.RESULTS / "mine.json").exists()
    for content in ('{"kind": "measured"}', '{"kind": "guessed", "source": "me"}', '{"kind": "noted"}'):
        (copy / tables.RESULTS / "mine.json").write_text(content)
        assert "mine.json: a record's kind is one of measured with its environment" in refused([], copy, capsys)


@pytest.fixture
def run(copy):
    """Writes what a run of a git revision left; returns the options that make it a record of a name."""

    def left(name, git="cb96e83", **figures):
        path = copy / "elsewhere" / "results.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**figures, "environment": {"git": git}}))
        return ["--add", str(path), f"--name={name}"]

    return left


def test_a_record_is_replaced_only_if_this_is_asked_for(copy, run, capsys):
    for name in ("corridor_plain", "published_authors"):
        path = copy / tables.RESULTS / f"{name}.json"
        before = path.read_bytes()
        line = refused(run(name, recalls={"1": 5.0}), copy, capsys)
        assert line.endswith(f"--name {name}: {path} already exists; choose another name, or replace it with --replace")
        assert path.read_bytes() == before
        assert tables.main([*run(name, recalls={"1": 5.0}), "--replace"], copy) == 0
        assert capsys.readouterr().out.startswith(f"replaced: {path}\n")
        assert json.loads(path.read_text())["recalls"] == {"1": 5.0}
    assert tables.main([*run("mine"), "--replace"], copy) == 0
    assert capsys.readouterr().out.startswith(f"written: {copy / tables.RESULTS / 'mine.json'}\n")


@pytest.mark.parametrize(
    ("git", "what"),
    [
        ("cb96e83-dirty", "is cb96e83-dirty, with changes that no commit has"),
        ("v2-3-gcb96e83-dirty", "is v2-3-gcb96e83-dirty, with changes that no commit has"),
        ("unknown", "is unknown"),
        (None, "is unknown"),
        ("cb96e83", None),
    ],
)
def test_a_run_that_nobody_can_repeat_is_warned_of(git, what, copy, run, capsys):
    assert tables.main(run("mine", git), copy) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [what in line for line in warnings] == [True] * (what is not None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine", "no table shows it yet: add a row to benchmarks/tables.md"),
        ("corridor", "no table shows it yet: add a row to benchmarks/tables.md"),  # only the beginning of a name
        ("published_authors", "shown by the table published, "),
        ("noted_place_map", "sentences of docs/programs.md"),
        ("noted_rate", "shown by the table "),  # by what follows from it
    ],
)
def test_it_is_said_which_tables_show_a_record(name, said, copy, run, capsys):
    assert tables.main([*run(name), "--replace"], copy) == 0
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_a_page_that_cannot_be_read_is_named(copy, capsys):
    (copy / tables.DEFINITIONS).unlink()
    line = refused(["--check"], copy, capsys)
    assert f"{copy / tables.DEFINITIONS} cannot be read or written (No such file or directory); restore it" in line


def test_no_torch_is_imported_to_read_text():
    code = "import sys, benchmarks.tables; print(sorted({'torch', 'faiss', 'sklearn', 'numpy'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tables.ROOT, check=True, capture_output=True, text=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{published_authors[Nordland]", "{published_author[Nordland]", "published: KeyError: 'published_author'"),
        (
            "{published_authors[Nordland][recalls]:1 5 10}",
            "{published_authors[Nordland][recalls]}",
            "no figure, but 1, 5",
        ),
        ("{published_authors[Nordland][recalls]:1 5 10}", "{published_authors[Nordland][recalls]:7}", "KeyError: 7"),
        ("{demo_after[options][seed]}", "{demo_after[options][resume]}", "demo_seeds: KeyError: 'resume'"),  # null
        ("<!-- end -->\n\n<!-- table: published -->", "<!-- table: published -->", "must come in pairs"),
    ],
)
def test_a_field_without_a_figure_is_refused(old, new, reason, copy, capsys):
    before = (copy / "README.md").read_text()
    change(copy / tables.DEFINITIONS, old, new)
    change(copy / tables.RESULTS / "published_authors.json", "95.0", "95.1")
    line = refused([], copy, capsys)
    assert tables.DEFINITIONS in line and reason in line
    assert (copy / "README.md").read_text() == before


def test_a_marker_that_leads_nowhere_is_refused(copy, capsys):
    page = copy / "docs/data.md"
    before = page.read_text()
    page.write_text(before + "<!-- table: nothing -->\n<!-- end -->\n")
    assert "docs/data.md: benchmarks/tables.md has no table nothing; it has demo, " in refused([], copy, capsys)
    page.write_text(before + "<!-- table: demo -->\n")
    assert "docs/data.md: <!-- table: name --> and <!-- end --> must come in pairs" in refused(
        ["--check"], copy, capsys
    )
