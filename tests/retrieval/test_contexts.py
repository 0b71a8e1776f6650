"""Contexts of the cross-image encoder that tell whether the batches give the answer away, and sets of queries."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from datasets.evaluation.alignment import aligned_queries, pair_up
from datasets.evaluation.database_queries import DatabaseQueries
from datasets.evaluation.protocols import PROTOCOLS, protocol_of, warn_of_counts
from datasets.evaluation.tasks import Selection, positive_distance
from model import build_model
from parser import EvalOptions, parse
from utils.retrieval.contexts import Search
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import EncoderContext, descriptors

SMALL = (
    "--backbone=dino_tiny --crossimage_encoder --device=cpu --num_workers=0 --resize 56 56 --infer_batch_size=4".split()
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint with the encoder."""
    file = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny", crossimage_encoder=True).state_dict(), file)
    return file


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
def evaluated(weights, tmp_path):
    """Runs eval.py and returns the run's folder."""

    def run(*flags):
        save_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        eval_script.main([*SMALL, f"--resume={weights}", f"--save_dir={save_dir}", *map(str, flags)])
        (folder,) = save_dir.iterdir()
        return folder

    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A model with made cluster vectors of 14 database images, and of 14 and 5 queries."""
    torch.manual_seed(1)
    model = build_model(backbone="dino_tiny", clusters=2, crossimage_encoder=True).eval()
    rng = np.random.default_rng(0)
    found = {}
    for name, count in (("database", 14), ("queries", 14), ("queries_night", 5)):
        store = found[name] = DescriptorStore(tmp_path_factory.mktemp("stores"), name, (count, 1, *model.vectors_shape))
        store.write(np.arange(count), rng.standard_normal(store.shape).astype("f"))
    return model, found


@torch.inference_mode()
def by_hand(model, store, batches):
    """The descriptors where the images of each batch share one: N x K*D, in the order of the batches."""
    vectors = torch.from_numpy(store.read(np.arange(len(store)))[:, 0])
    return np.concatenate([model.describe(vectors[batch], len(batch)).numpy() for batch in map(list, batches)])


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
@pytest.mark.parametrize("shift", [1, 3])
def test_a_shift_makes_the_first_batch_short(stores, monkeypatch, chunk_bytes, shift):
    monkeypatch.setattr("utils.retrieval.extraction.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("utils.retrieval.extraction.ENCODED_TOGETHER", 1)
    model, of = stores
    batches = [range(shift), *(range(start, min(start + 4, 14)) for start in range(shift, 14, 4))]
    chunks = descriptors(model, of["queries"], EncoderContext(4, shift=shift), device=torch.device("cpu"))
    found = np.concatenate([rows for _, rows in chunks])
    np.testing.assert_allclose(found, by_hand(model, of["queries"], batches), atol=1e-6)


def search_of(stores, context, shift=0, names=("database", "queries"), batch=4):
    model, of = stores
    return Search(
        model,
        {name: of[name] for name in names},
        context=context,
        infer_batch_size=batch,
        shift=shift,
        seed=(7, 2),
        device=torch.device("cpu"),
    )


def test_unaligned_shifts_the_queries_only(stores):
    published, shifted = search_of(stores, "file_order"), search_of(stores, "unaligned", 2)
    np.testing.assert_array_equal(shifted.rows("database"), published.rows("database"))
    assert np.abs(shifted.rows("queries") - published.rows("queries")).max() > 1e-3
    whole = search_of(stores, "unaligned", 8)
    np.testing.assert_array_equal(whole.rows("queries"), published.rows("queries"))
    six = search_of(stores, "unaligned", 6)  # a batch and a half begins as half a batch does
    np.testing.assert_array_equal(six.rows("queries"), shifted.rows("queries"))


def test_paired_takes_one_order_for_both_sides(stores):
    model, of = stores
    order = np.random.default_rng((7, 2, 0)).permutation(14)
    batches = [order[start : start + 4] for start in range(0, 14, 4)]
    searched = search_of(stores, "paired")
    for name in ("database", "queries"):
        np.testing.assert_allclose(searched.rows(name)[order], by_hand(model, of[name], batches), atol=1e-6)
    apart = search_of(stores, "shuffled")
    assert np.abs(apart.rows("queries") - searched.rows("queries")).max() > 1e-3


@pytest.mark.parametrize("context", ["unaligned", "shuffled", "paired", "independent"])
def test_batches_of_one_are_the_same_in_every_context(stores, context):
    alone = search_of(stores, "file_order", batch=1)
    for name in ("database", "queries"):
        np.testing.assert_array_equal(search_of(stores, context, batch=1).rows(name), alone.rows(name))


@pytest.mark.parametrize("context", ["file_order", "unaligned", "shuffled", "independent"])
def test_sets_of_queries_find_what_each_finds_alone(stores, context):
    both = search_of(stores, context, 2, names=("database", "queries", "queries_night")).run(6)
    for name, found in zip(("queries", "queries_night"), both, strict=True):
        (alone,) = search_of(stores, context, 2, names=("database", name)).run(6)
        np.testing.assert_array_equal(found[0], alone[0])
        np.testing.assert_array_equal(found[1], alone[1])


def test_a_one_to_one_tree_is_told(evaluated, one_to_one, capsys):
    flags = [f"--eval_datasets_folder={one_to_one}", "--eval_dataset_name=pairs"]
    contexts = "--encoder_context file_order unaligned paired --context_seeds=2".split()
    folder = evaluated(*flags, *contexts)
    said = capsys.readouterr().err
    assert "WARNING: pairs test: for 18 of 18 queries, the batch in file order holds exactly the places of the" in said
    assert "--encoder_context file_order unaligned tests it" in said
    results = results_of(folder)
    assert results["alignment"] == {"warned": True, "queries": 18, "paired": 18, "nearest": 18}
    assert set(results["contexts"]) == {"file_order", "unaligned", "paired"}
    assert ", paired (2 orders): R@1" in said and ", unaligned: R@1" in said
    alone = evaluated(*flags, "--encoder_context", "unaligned", "--context_shift=2")
    assert results_of(alone)["recalls"] == results["contexts"]["unaligned"]["recalls"]
    assert "exactly the places" not in capsys.readouterr().err, "which nobody asked for"
    evaluated(*flags, "--encoder_context", "unaligned", "--context_shift=4")
    assert (
        "--context_shift 4 is a multiple of the batch size 4: unaligned is the same as file_order"
        in capsys.readouterr().err
    )


def test_the_toy_city_is_not_a_set_of_pairs(evaluated, city, capsys):
    folder = evaluated(f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city")
    assert not results_of(folder)["alignment"]["warned"] and results_of(folder)["alignment"]["paired"] == 0
    assert "exactly the places" not in capsys.readouterr().err


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
        (range(0, 160, 40), range(0, 160, 10), 0, 0),  # fewer queries than a batch and one
        (range(0, 160, 20), range(0, 160, 10), 0, 0),  # at another pace the batches part
        (range(0, 30, 10), range(0, 30, 10), 0, 0),  # all share one batch
    ],
)
def test_which_batches_hold_the_same_places(queries, database, paired, nearest):
    dataset = tree(queries, database)
    masks = aligned_queries(dataset, dataset.positives(25.0), 4)
    assert tuple(int(mask.sum()) for mask in masks) == (paired, nearest)
    assert not any(mask.any() for mask in aligned_queries(dataset, dataset.positives(25.0), 1))


def test_degrees_and_files_of_positives_pair_up_too():
    degrees = tree(np.arange(16) / 1000, np.arange(16) / 1000, geographic=True)
    assert aligned_queries(degrees, degrees.positives(25.0), 4)[0].all()
    listed = DatabaseQueries(
        name="listed",
        database_paths=[f"{i}.jpg" for i in range(16)],
        queries_paths=[f"{i}.jpg" for i in range(16)],
        known_positives=[np.array([i]) for i in range(16)],
    )
    assert aligned_queries(listed, listed.positives(0), 4)[0].all()
    turned = listed.known_positives[::-1]
    assert not aligned_queries(listed, turned, 4)[0].any()
    assert pair_up(listed.known_positives, 16) and not pair_up(turned, 16) and not pair_up(listed.known_positives, 17)


def test_paired_is_refused_where_nothing_pairs_up(evaluated, city, one_to_one, tmp_path, capsys):
    shutil.copytree(one_to_one / "pairs", tmp_path / "data/odd")
    next((tmp_path / "data/odd/images/test/queries").iterdir()).unlink()
    flags = [f"--eval_datasets_folder={tmp_path}/data", "--eval_dataset_name=odd"]
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags, "--encoder_context", "file_order", "paired")
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "--encoder_context paired: odd test has 17 queries and 18 database images" in said
    assert not list(tmp_path.glob("run0/*/results.json"))


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


def test_one_database_and_several_sets_of_queries(evaluated, several, capsys, monkeypatch):
    seen, real = [], eval_script.SuperVLADNet.cluster_vectors
    monkeypatch.setattr(
        eval_script.SuperVLADNet, "cluster_vectors", lambda self, images: seen.append(len(images)) or real(self, images)
    )
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox"]
    flags += "--encoder_context file_order shuffled --context_seeds=2 --save_predictions=2 --save_descriptors".split()
    together = evaluated(*flags, "--queries_names", "queries_night", "queries_rain")
    assert sum(seen) == 15 + 10 + 5, "each photo once"
    said = capsys.readouterr().err
    for name, count in (("queries_night", 10), ("queries_rain", 5)):
        assert f"Recalls on svox test {name} (15 database, {count} queries): R@1" in said
        assert f"Recalls on svox test {name} (15 database, {count} queries), shuffled (2 orders): R@1" in said
        alone = evaluated(*flags, "--queries_names", name)
        assert f"svox test {name}" in results_of(together)["recalls"]
        for file in ("predictions.csv", f"descriptors/{name}.npy", "descriptors/database.npy"):
            assert (together / name / file).read_bytes() == (alone / file).read_bytes()
        left, right = (results_of(folder) for folder in (together / name, alone))
        assert left["contexts"] == right["contexts"] and left["dataset"] == right["dataset"]
    assert not list(together.rglob("extracted"))


def test_kept_descriptors_of_a_database_serve_every_set(evaluated, several, tmp_path, monkeypatch):
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", f"--descriptors_folder={tmp_path}/kept"]
    first = evaluated(*flags, "--queries_names", "queries_night")
    seen, real = [], eval_script.SuperVLADNet.cluster_vectors
    monkeypatch.setattr(
        eval_script.SuperVLADNet, "cluster_vectors", lambda self, images: seen.append(len(images)) or real(self, images)
    )
    both = evaluated(*flags, "--queries_names", "queries_rain", "queries_night")
    assert sum(seen) == 5
    rows = [(folder / "predictions.csv").read_bytes() for folder in (first, both / "queries_night")]
    assert rows[0] == rows[1]


def test_sets_of_one_dataset_among_several(evaluated, several, capsys):
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name", "svox", "toy_city"]
    folder = evaluated(*flags, "--queries_names", "svox:queries_night", "svox:queries_rain/")
    names = ["svox test queries_night", "svox test queries_rain", "toy_city test"]
    assert list(results_of(folder)["recalls"]) == names
    table = capsys.readouterr().err
    assert all(f"{name} " in table.split("R@20")[-1] for name in names)
    for part in ("svox/queries_night", "svox/queries_rain", "toy_city"):
        with open(folder / part / "predictions.csv", newline="") as file:
            assert len(list(csv.DictReader(file)))


def test_one_val_split_gives_the_distance_for_every_set(evaluated, several, city, monkeypatch):
    shutil.copytree(city / "toy_city/images/val", several / "svox/images/val", dirs_exist_ok=True)
    val = sum(path.suffix == ".jpg" for path in (several / "svox/images/val").rglob("*"))
    seen, real = [], eval_script.SuperVLADNet.cluster_vectors
    monkeypatch.setattr(
        eval_script.SuperVLADNet, "cluster_vectors", lambda self, images: seen.append(len(images)) or real(self, images)
    )
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", "--accept=auto@5"]
    folder = evaluated(*flags, "--queries_names", "queries_night", "queries_rain")
    assert sum(seen) == val + 30
    found = [results_of(folder / name)["accepted"]["distance"] for name in ("queries_night", "queries_rain")]
    assert found[0] == found[1] > 0 and not (folder / "val").exists()


def test_an_index_of_one_database_for_several_sets(evaluated, several):
    flags = [f"--eval_datasets_folder={several}", "--eval_dataset_name=svox", "--index=IVF2,Flat"]
    both = evaluated(*flags, "--queries_names", "queries_night", "queries_rain")
    for name in ("queries_night", "queries_rain"):
        alone = evaluated(*flags, "--queries_names", name)
        assert (both / name / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
        assert results_of(both / name)["index_agreement"] == results_of(alone)["index_agreement"]


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


def test_sets_whose_names_look_alike_are_kept_apart(evaluated, odd, tmp_path):
    flags = odd(night=slice(3), queries_night=slice(2, 6), a__night=slice(4, 6), a_night=slice(7, 12))
    names = ["night", "queries_night", "a/night", "a_night"]
    kept = f"--descriptors_folder={tmp_path}/kept"
    together = evaluated(*flags, kept, "--queries_names", *names)
    for name in ("night", "a/night"):  # those that the two others would have replaced
        alone = evaluated(*flags, kept, "--queries_names", name)
        assert (together / name / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
    assert len(list((tmp_path / "kept/odd_test").glob("*.npy"))) == 5


def test_a_set_without_any_position_is_refused(evaluated, odd, tmp_path, capsys):
    flags = odd(queries=slice(3), queries_b=slice(3, 5))
    for number, path in enumerate((tmp_path / "trees/odd/images/test/queries_b").iterdir()):
        path.rename(path.with_name(f"{number}.jpg"))
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags, "--labels_where_known", "--queries_names", "queries", "queries_b")
    told = "--labels_where_known: none of the 2 queries in queries_b has a position; leave that set out of --queries_na"
    assert exit_.value.code == 2 and told in capsys.readouterr().err


def test_results_of_two_datasets_do_not_share_a_folder(evaluated, odd, tmp_path, capsys):
    """The sets of one lie where another dataset's own results would."""
    flags = odd(b=slice(2), c=slice(2, 4))
    shutil.copytree(tmp_path / "trees/odd/images/test/database", tmp_path / "trees/odd/b/images/test/database")
    shutil.copytree(tmp_path / "trees/odd/images/test/b", tmp_path / "trees/odd/b/images/test/queries")
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags, "--eval_dataset_name", "odd", "odd/b", "--queries_names", "odd:b", "odd:c")
    told = "the results of odd test b and odd/b test would go to the same folder, odd/b; evaluate one after the other"
    assert exit_.value.code == 2 and told in capsys.readouterr().err


def test_queries_in_their_own_shape_have_no_company(evaluated, one_to_one, capsys):
    folder = evaluated(
        f"--eval_datasets_folder={one_to_one}", "--eval_dataset_name=pairs", "--test_method=single_query"
    )
    assert results_of(folder)["alignment"]["paired"] == 0
    assert "holds exactly the places" not in capsys.readouterr().err


def test_unaligned_is_told_where_it_is_file_order(evaluated, one_to_one, capsys, monkeypatch):
    monkeypatch.setattr("test.extract", lambda *_: 1 / 0)
    flags = [f"--eval_datasets_folder={one_to_one}", *"--eval_dataset_name=pairs --encoder_context unaligned".split()]
    for flag, why in (
        ("--test_method=single_query", "with --test_method single_query, each query has a batch of its own"),
        ("--context_shift=8", "--context_shift 8 is a multiple of the batch size 4"),
        ("--infer_batch_size=36", "pairs test has at most 18 queries (--context_shift), which share one batch"),
    ):
        with pytest.raises(ZeroDivisionError):
            evaluated(*flags, flag)
        assert f"{why}: unaligned is the same as file_order" in capsys.readouterr().err


def test_an_index_is_compared_in_every_context(evaluated, odd, capsys):
    flags = odd(queries=slice(6))
    flags += "--index=binary --rerank=4 --recall_values 1 3 --encoder_context file_order shuffled".split()
    results = results_of(evaluated(*flags, "--context_seeds=2"))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("index binary")]
    of = results["contexts"]
    found = [*of["file_order"]["index_agreements"], *of["shuffled"]["index_agreements"]]
    assert results["index_agreement"] == found[0] and len(found) == 3
    for line, agreement in zip(told, found, strict=True):
        assert f"of {agreement['nearest']:.1f}% and the first 3 to {agreement['first_k']:.1f}%" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--eval_dataset_name=svox",
            "the query sets there are queries_night, queries_rain: name them with eval.py's",
        ),
        (
            "--eval_dataset_name=svox --queries_names queries_fog",
            "svox/images/test/queries_fog; the query sets there are",
        ),
        ("--eval_dataset_name=svox --queries_names a a", "--queries_names a a names a set of svox twice"),
        ("--eval_dataset_name=svox --queries_names a ./a/", "names a set of svox twice"),
        ("--eval_dataset_name=svox --queries_names ../a", "--queries_names '../a' is not the name of a folder below"),
        ("--eval_dataset_name=svox --queries_names :a", "the dataset of --queries_names ':a', '' is not the name of a"),
        ("--eval_dataset_name=svox --queries_names b:a", "b is not among --eval_dataset_name svox"),
        (
            "--eval_dataset_name=svox --queries_names a b --positives_file=x.npy",
            "--positives_file and --query_keys apply to one set of queries, but --queries_names names 2 of svox",
        ),
        (
            "--database_folder=a --queries_folder=b --queries_names c",
            "--queries_names works only with datasets (plain",
        ),
        ("--eval_dataset_name=svox --context_shift=3", "--context_shift works only with --encoder_context unaligned"),
        (
            "--eval_dataset_name=svox --encoder_context unaligned --context_shift=0",
            "--context_shift 0 is not above 0; give a positive number",
        ),
        ("--eval_dataset_name=svox --encoder_context paired --no_labels", "paired needs labels, to know whether quer"),
    ],
)
def test_refusals(evaluated, several, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        evaluated(f"--eval_datasets_folder={several}", *flags.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_the_shift_is_half_a_batch_unless_given():
    flags = "--eval_datasets_folder=d --resume=r --encoder_context unaligned --infer_batch_size=9".split()
    assert parse(EvalOptions, flags).shift == 4
    assert parse(EvalOptions, [*flags, "--context_shift=11"]).shift == 11


def test_protocols_name_their_sources(caplog):
    assert all(protocol.source for protocol in PROTOCOLS.values())
    sets = protocol_of("svox").query_sets | protocol_of("sf_xl").query_sets
    assert sets["queries_rain"] == 937 and sets["queries_occlusion"] == 76
    dataset = tree(range(3), range(3))
    warn_of_counts(dataset, protocol_of("sf_xl"), "queries_v2")
    assert "line has 3 queries, but published figures are for 598" in caplog.text
    caplog.clear()
    warn_of_counts(dataset, protocol_of("sf_xl"), "queries_mine")
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "flags", "frames", "spacing"),
    [
        ("nordland", [], 10, 25 / 10.5),
        ("nordland_subset", [], 1, 25 / 1.5),
        ("nordland_swapped", [], 1, 25 / 10.5),
        ("nordland_3450", [], 2, 25 / 10.5),
        ("nordland_3450", ["--positive_frames=5"], 5, 25 / 10.5),
    ],
)
def test_each_form_of_nordland_counts_its_frames(name, flags, frames, spacing):
    options = parse(EvalOptions, ["--eval_datasets_folder=d", "--resume=r", f"--eval_dataset_name={name}", *flags])
    distance = positive_distance(options.part(Selection), name)
    assert frames * spacing <= distance < (frames + 1) * spacing
    metres = parse(EvalOptions, [*"--eval_datasets_folder=d --resume=r --val_positive_dist_threshold=7".split()])
    assert positive_distance(metres.part(Selection), name) == 7
