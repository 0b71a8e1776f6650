"""Contexts of the cross-image encoder that tell whether the batches give the answer away, and sets of queries."""

import shutil

import numpy as np
import pytest
import torch
from helpers import refusal, results_of, rows_of
from PIL import Image

import eval as eval_script
import test as evaluation
from datasets.evaluation.alignment import alignment, pair_up
from datasets.evaluation.protocols import PROTOCOLS, Protocol, protocol_of, warn_of_counts
from datasets.evaluation.query_sets import select
from datasets.evaluation.tree import DatabaseQueries
from model import build_model
from parser import EvalData
from utils.retrieval.contexts import Search
from utils.retrieval.descriptor_store import DescriptorStore


@pytest.fixture(scope="module")
def one_to_one(tmp_path_factory):
    """A tree of 18 + 18 photos, which pair up by their names as in SPED, 100 metres apart."""
    folder = tmp_path_factory.mktemp("trees")
    rng = np.random.default_rng(0)
    for part in ("database", "queries"):
        (folder / "pairs/images/test" / part).mkdir(parents=True)
        for place in range(18):
            name = f"@{100 * place:08.1f}@0.00@@.jpg"
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 48)).save(folder / "pairs/images/test" / part / name)
    return folder


@pytest.fixture
def compared(evaluated):
    """Runs eval.py with the encoder and batches of four."""
    return lambda *flags: evaluated("--infer_batch_size=4", *flags, model="encoder")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A model with made cluster vectors of 14 database images, and of 14 and 5 queries."""
    torch.manual_seed(1)
    model = build_model(backbone="dino_tiny", clusters=2, crossimage_encoder=True).eval()
    rng = np.random.default_rng(0)
    folder, by_name = tmp_path_factory.mktemp("stores"), {}
    for name, count in (("database", 14), ("queries", 14), ("queries_night", 5)):
        store = by_name[name] = DescriptorStore(folder, name, (count, 1, *model.vectors_shape))
        store.write(np.arange(count), rng.standard_normal(store.shape).astype("f"))
    return model, by_name


@torch.inference_mode()
def by_hand(model, store, batches):
    """The descriptors where the images of each batch share one: N x K*D, in the order of the batches."""
    vectors = torch.from_numpy(store.read(np.arange(len(store)))[:, 0])
    return np.concatenate([model.describe(vectors[batch], len(batch)).numpy() for batch in map(list, batches)])


def search_of(stores, context, names=("database", "queries"), batch=4):
    model, of = stores
    settings = {"context": context, "infer_batch_size": batch, "seed": (7, 2), "device": torch.device("cpu")}
    return Search(model, {name: of[name] for name in names}, **settings)


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
@pytest.mark.parametrize("batch", [4, 5])
def test_unaligned_shifts_the_queries_by_half_a_batch(stores, monkeypatch, batch, chunk_bytes):
    monkeypatch.setattr("utils.retrieval.extraction.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("utils.retrieval.extraction.ENCODED_TOGETHER", 1)
    model, of = stores
    published, shifted = (search_of(stores, context, batch=batch) for context in ("file_order", "unaligned"))
    np.testing.assert_array_equal(shifted.rows("database"), published.rows("database"))
    batches = [range(2), *(range(start, min(start + batch, 14)) for start in range(2, 14, batch))]
    np.testing.assert_allclose(shifted.rows("queries"), by_hand(model, of["queries"], batches), atol=1e-6)
    assert np.abs(shifted.rows("queries") - published.rows("queries")).max() > 1e-3


def test_paired_takes_one_order_for_both_sides(stores):
    model, of = stores
    order = np.random.default_rng((7, 2, 0)).permutation(14)
    batches = [order[start : start + 4] for start in range(0, 14, 4)]
    searched = search_of(stores, "paired")
    for name in ("database", "queries"):
        np.testing.assert_allclose(searched.rows(name)[order], by_hand(model, of[name], batches), atol=1e-6)
    apart = search_of(stores, "shuffled")
    assert np.abs(apart.rows("queries") - searched.rows("queries")).max() > 1e-3


def test_a_one_to_one_tree_is_told(compared, one_to_one, capsys):
    flags = [f"--eval_datasets_folder={one_to_one}", "--eval_dataset_name=pairs"]
    results = results_of(compared(*flags, "--encoder_context", "file_order", "unaligned", "paired"))
    said = capsys.readouterr().err
    assert "WARNING: pairs test: for 18 of 18 queries" in said and "--encoder_context file_order unaligned" in said
    assert results["alignment"] == {"warned": True, "queries": 18, "paired": 18, "nearest": 18}
    orders = {context: facts["orders"] for context, facts in results["contexts"].items()}
    assert orders == {"file_order": 1, "unaligned": 1, "paired": 5}
    assert ", paired (5 orders): R@1" in said and ", unaligned: R@1" in said
    alone = results_of(compared(*flags, "--encoder_context=unaligned"))
    assert alone["recalls"] == results["contexts"]["unaligned"]["recalls"]
    assert "exactly the places" not in capsys.readouterr().err, "which nobody asked for"


def tree(queries, database, geographic=False):
    """A dataset whose photos stand at the given positions of a line."""

    def at(where):
        return np.stack([np.asarray(where, float), np.zeros(len(where))], axis=1)

    names = [[f"{side}{i}.jpg" for i in range(len(of))] for side, of in (("d", database), ("q", queries))]
    return DatabaseQueries(
        name="line",
        database_paths=names[0],
        queries_paths=names[1],
        database_positions=at(database),
        queries_positions=at(queries),
        geographic=geographic,
    )


@pytest.mark.parametrize(
    ("queries", "database", "paired", "nearest"),
    [
        (range(0, 160, 10), range(0, 160, 10), 16, 16),
        (range(1, 161, 10), range(0, 160, 10), 0, 16),  # the same route, photographed elsewhere
        ([*range(0, 80, 10), *range(150, 70, -10)], range(0, 160, 10), 8, 8),  # the second half comes the other way
        (range(0, 160, 20), range(0, 160, 10), 0, 0),  # at another pace the batches part
        (range(0, 30, 10), range(0, 30, 10), 0, 0),  # all share one batch
    ],
)
def test_which_batches_hold_the_same_places(queries, database, paired, nearest):
    dataset = tree(queries, database)
    counts = alignment(dataset, dataset.positives(25.0), 4)
    assert (counts["paired"], counts["nearest"]) == (paired, nearest)
    assert alignment(dataset, dataset.positives(25.0), 1) == counts | {"warned": False, "paired": 0, "nearest": 0}


def test_degrees_and_files_of_positives_pair_up_too():
    degrees = tree(np.arange(16) / 1000, np.arange(16) / 1000, geographic=True)
    assert alignment(degrees, degrees.positives(25.0), 4)["paired"] == 16
    listed = DatabaseQueries(
        name="listed",
        database_paths=[f"{i}.jpg" for i in range(16)],
        queries_paths=[f"{i}.jpg" for i in range(16)],
        known_positives=[np.array([i]) for i in range(16)],
    )
    assert alignment(listed, listed.positives(0), 4)["paired"] == 16
    assert pair_up(listed.known_positives, 16) and not pair_up(listed.known_positives, 17)
    assert not pair_up(listed.known_positives[::-1], 16)


def test_paired_is_refused_where_nothing_pairs_up(compared, one_to_one, tmp_path, capsys):
    shutil.copytree(one_to_one / "pairs", tmp_path / "data/odd")
    next((tmp_path / "data/odd/images/test/queries").iterdir()).unlink()
    flags = [f"--eval_datasets_folder={tmp_path}/data", "--eval_dataset_name=odd"]
    line = refusal(capsys, lambda: compared(*flags, "--encoder_context", "file_order", "paired"))
    assert line.startswith("--encoder_context paired: odd test has 17 queries and 18 database images")
    assert line.endswith("use shuffled") and not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("flag", ["--test_method=single_query", "--infer_batch_size=36", "--infer_batch_size=1"])
def test_unaligned_is_told_where_it_is_file_order(compared, one_to_one, capsys, monkeypatch, flag):
    monkeypatch.setattr(evaluation, "extract", lambda *_: 1 / 0)
    flags = [f"--eval_datasets_folder={one_to_one}", *"--eval_dataset_name=pairs --encoder_context unaligned".split()]
    with pytest.raises(ZeroDivisionError):
        compared(*flags, flag)
    assert "WARNING: pairs test: queries share no batch, or all share one, so unaligned" in capsys.readouterr().err


@pytest.fixture(scope="module")
def several(tmp_path_factory, city):
    """The toy city as SVOX comes: a gallery, and two folders of queries."""
    folder = tmp_path_factory.mktemp("several")
    test = folder / "svox/images/test"
    shutil.copytree(city / "toy_city/images/test", test)
    (test / "database").rename(test / "gallery")
    (test / "queries").rename(test / "queries_night")
    (test / "queries_rain").mkdir()
    for path in sorted((test / "queries_night").iterdir())[:5]:
        path.rename(test / "queries_rain" / path.name)
    shutil.copytree(city / "toy_city", folder / "toy_city")
    return folder


SETS = ["queries_night", "queries_rain"]


@pytest.mark.parametrize("index", [None, "IVF2,Flat"])
def test_one_database_and_several_sets_of_queries(compared, several, capsys, passed, index):
    """Each finds what it finds alone, to the last bit; an index is compared for every set and context."""
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", "--recall_values", 1, 3]
    flags += "--encoder_context file_order shuffled --save_descriptors".split()
    flags += [f"--index={index}"] * bool(index)
    together = compared(*flags, "--queries_names", *SETS)
    assert len(passed) == 15 + 10 + 5, "each photo once"
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith(f"index {index}")]
    for number, (name, count) in enumerate(zip(SETS, (10, 5), strict=True)):
        for context in ("", ", shuffled (5 orders)"):
            assert f"Recalls on svox test {name} (15 database, {count} queries){context}: R@1" in said
        alone = compared(*flags, "--queries_names", name)
        assert f"svox test {name}" in results_of(together)["recalls"]
        for file in ("predictions.csv", f"descriptors/{name}.npy", "descriptors/database.npy"):
            assert (together / name / file).read_bytes() == (alone / file).read_bytes()
        left, right = (results_of(folder) for folder in (together / name, alone))
        assert left["contexts"] == right["contexts"] and left["dataset"] == right["dataset"]
        if index:
            agreements = [each for context in left["contexts"].values() for each in context["index_agreements"]]
            assert left["index_agreement"] == agreements[0] and len(agreements) == 6
            for line, agreement in zip(lines[number :: len(SETS)], agreements, strict=True):
                assert f"of {agreement['nearest']:.1f}% and the first 3 to {agreement['first_k']:.1f}%" in line


def test_kept_descriptors_of_a_database_serve_every_set(compared, several, tmp_path, passed, monkeypatch):
    """And the one map of it."""
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", "--encoder_context=independent"]
    flags.append(f"--descriptors_folder={tmp_path}/kept")
    first = compared(*flags, "--queries_names", "queries_night")
    passed.clear()
    maps = []
    monkeypatch.setattr(eval_script, "write_map", lambda path, *_, **__: maps.append(path))
    both = compared(*flags, "--queries_names", *SETS[::-1], f"--save_map={tmp_path}/svox.npz")
    assert len(passed) == 5 and maps == [tmp_path / "svox.npz"]
    assert (first / "predictions.csv").read_bytes() == (both / "queries_night/predictions.csv").read_bytes()


def test_sets_of_one_dataset_among_several(compared, several, capsys):
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name", "svox", "toy_city"]
    folder = compared(*flags, "--queries_names", "svox:queries_night", "svox:queries_rain/")
    names = ["svox test queries_night", "svox test queries_rain", "toy_city test"]
    assert list(results_of(folder)["recalls"]) == names
    table = capsys.readouterr().err.split("R@20")[-1].splitlines()[1:]
    assert all(line.startswith(f"{name} ") for line, name in zip(table, names, strict=False))
    assert all(rows_of(folder / part) for part in ("svox/queries_night", "svox/queries_rain", "toy_city"))


@pytest.fixture
def odd(city, tmp_path):
    """A tree with the toy city's database, and sets of some of its queries by name."""

    def make(**sets):
        test = tmp_path / "trees/odd/images/test"
        shutil.copytree(city / "toy_city/images/test/database", test / "database")
        photos = sorted((city / "toy_city/images/test/queries").iterdir())
        for name, some in sets.items():
            (test / name.replace("__", "/")).mkdir(parents=True)
            for path in photos[some]:
                shutil.copy(path, test / name.replace("__", "/"))
        return [f"--eval_datasets_folder={tmp_path}/trees", "--eval_dataset_name=odd"]

    return make


def test_sets_whose_names_look_alike_are_kept_apart(compared, odd, tmp_path):
    flags = odd(night=slice(3), queries_night=slice(2, 6), a__night=slice(4, 6), a_night=slice(7, 12))
    names = ["night", "queries_night", "a/night", "a_night"]
    together = compared(*flags, f"--descriptors_folder={tmp_path}/kept", "--queries_names", *names)
    for name in names:
        photos = {str(path) for path in (tmp_path / "trees/odd/images/test" / name).iterdir()}
        assert {row["query"] for row in rows_of(together / name)} == photos
    assert len(list((tmp_path / "kept/odd_test").glob("*.npy"))) == 5


def test_results_of_two_datasets_do_not_share_a_folder(compared, odd, tmp_path, capsys):
    """The sets of one lie where another dataset's own results would."""
    flags = odd(b=slice(2), c=slice(2, 4))
    test, other = (tmp_path / "trees" / name / "images/test" for name in ("odd", "odd/b"))
    shutil.copytree(test / "database", other / "database")
    shutil.copytree(test / "b", other / "queries")
    names = ["--eval_dataset_name", "odd", "odd/b", "--queries_names", "odd:b", "odd:c"]
    line = refusal(capsys, lambda: compared(*flags, *names))
    assert "odd/b" in line and "one at a time" in line and not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("flags", [[], ["--queries_names", "queries_fog"]])
def test_a_missing_set_is_refused_with_those_there(compared, several, capsys, flags):
    line = refusal(capsys, lambda: compared(f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", *flags))
    assert f"svox/images/test/{flags[-1] if flags else 'queries'}" in line and "queries_night, queries_rain" in line


def test_protocols_name_their_sources(city, caplog):
    assert all(protocol.source for protocol in PROTOCOLS.values())
    assert protocol_of("pitts30k").database == 10_000 and protocol_of("svox_night") == PROTOCOLS["svox"]
    assert protocol_of("my_town") == Protocol() and Protocol().positive_distance == 25.0
    dataset = tree(range(3), range(3))
    warn_of_counts(dataset, Protocol(database=3, queries=(2, 3)))
    warn_of_counts(dataset, protocol_of("sf_xl"), "queries_mine")
    assert not caplog.text
    warn_of_counts(dataset, Protocol(database=16, queries=(2, 3)))
    assert "line has 3 database images, but published figures are for 16" in caplog.text
    warn_of_counts(dataset, protocol_of("sf_xl"), "queries_v2")
    assert "line has 3 queries, but published figures are for 598" in caplog.text


@pytest.mark.parametrize(
    ("name", "frames", "spacing"),
    [
        ("nordland", 10, 25 / 10.5),
        ("nordland_subset", 1, 25 / 1.5),
        ("nordland_swapped", 1, 25 / 10.5),
        ("nordland_3450", 2, 25 / 10.5),
    ],
)
def test_each_form_of_nordland_counts_its_frames(city, tmp_path, name, frames, spacing):
    shutil.copytree(city / "toy_city", tmp_path / name)
    distances = []
    for metres in (None, 7.0):
        data = EvalData(eval_datasets_folder=tmp_path, eval_dataset_name=(name,), val_positive_dist_threshold=metres)
        (((query_set,),)) = select(data, test_method=None, infer_batch_size=16)
        distances.append(query_set.positive_distance)
    assert frames * spacing <= distances[0] < (frames + 1) * spacing and distances[1] == 7
