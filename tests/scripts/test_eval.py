"""eval.py as a user runs it: contexts, protocols, outputs, killed and continued, on several processes."""

import os
import re
import shlex
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from helpers import MODEL, SMALL, only_run, refusal, results_of, rows_of

import eval as eval_script
import test as evaluation
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.positions import image_key
from model import export
from model.weights import size_of
from parser import EvalOptions, parse


def test_the_size_is_the_checkpoints_unless_given(city, weights, tmp_path, capsys):
    """As backbone, clusters and encoder are; and so in a file of safetensors. `run` returns what results.json says."""
    state = torch.load(weights / "plain.pth", weights_only=True)
    training = {"seed": 3, "lr": 1e-4}
    content = {"model_state_dict": state, "model": MODEL, "resize": [56, 70], "training": training}
    torch.save(content, tmp_path / "a.pth")
    export.main(f"--resume {tmp_path}/a.pth --output {tmp_path}/a.safetensors".split())
    flags = f"--device=cpu --num_workers=0 --eval_datasets_folder={city} --eval_dataset_name=toy_city".split()

    def run(save_dir, file, *given):
        capsys.readouterr()
        paths = [f"--resume={tmp_path}/{file}", f"--save_dir={tmp_path}/{save_dir}"]
        table = eval_script.run(parse(EvalOptions, [*flags, *paths, *given]))
        results = results_of(only_run(tmp_path / save_dir))
        assert {int(n): r for n, r in results["recalls"].items()} == table["toy_city test"]["file_order"]
        assert results["resize"] == results["options"]["resize"] and results["model"] == MODEL
        return results["resize"], results["recalls"], results["checkpoint"], capsys.readouterr().err

    size, recalls, facts, log = run("own", "a.pth")
    assert size == [56, 70] and "backbone dino_tiny" in log and facts == {"training": training}
    assert run("safetensors", "a.safetensors")[:2] == (size, recalls)
    assert run("same", "a.pth", "--resize", "56", "70")[:2] == (size, recalls) and "validated at" not in log
    size, _, _, log = run("other", "a.safetensors", "--resize", "56", "56")
    assert size == [56, 56] and "WARNING: the model was validated at 56 70, but --resize is 56 56" in log


@pytest.mark.parametrize("entry", [None, 322, "322 322", [322], [56, 57], [0, 56], [56.0, 56.0], [True, True]])
def test_what_is_no_size_in_a_checkpoint_is_none(entry):
    assert size_of({"resize": entry}) is None and size_of({}) is None


def test_what_a_run_leaves(evaluated, capsys):
    folder = evaluated("--no_labels", "--no-antialias")
    shown = capsys.readouterr().err
    (given,) = [line for line in shown.splitlines() if line.startswith("options given: ")]
    assert "--backbone=dino_tiny" in given and " --no_labels --no-antialias" in given and "{" not in given
    assert '"rerank": 100' not in shown + (folder / "info.log").read_text()
    assert '"rerank": 100' in (folder / "debug.log").read_text()
    left = {"info.log", "debug.log", "options.txt", "results.json", "predictions.csv"}
    assert {path.name for path in folder.iterdir() if path.name != "extracted"} == left
    assert not list(folder.rglob("*.npy"))


def test_results_say_what_they_depend_on(evaluated, city):
    plain, again, other = (results_of(evaluated(model=model)) for model in ("plain", "plain", "other"))
    near = results_of(evaluated("--val_positive_dist_threshold=3"))
    facts = {"resize": [56, 56], "antialias": False, "upright": False, "split": "test", "test_method": "hard_resize"}
    facts |= {"model": MODEL, "checkpoint": {}, "descriptor_dim": 384, "positive_distance": 25.0}
    assert {name: plain[name] for name in facts} == facts and plain["weights"] == again["weights"] != other["weights"]
    digests = plain["dataset"].pop("digests")
    assert again["dataset"].pop("digests") == other["dataset"].pop("digests") == digests
    assert plain["dataset"] == {"name": "toy_city test", "database": 15, "queries": 15}
    of_near = near["dataset"]["digests"]
    assert [of_near[side] == digests[side] for side in ("database", "queries", "labels")] == [True, True, False]
    assert near["positive_distance"] == 3 and plain["environment"]["processes"] == "1"
    assert results_of(evaluated("--eval_split=val"))["split"] == "val"
    sides = [f"--{side}_folder={city}/toy_city/images/test/{side}" for side in ("database", "queries")]
    of_folders = results_of(evaluated(*sides))
    assert [of_folders[name] for name in ("split", "antialias", "upright")] == [None, True, True]
    assert of_folders["dataset"]["digests"] == digests, "whatever the folders are called"


def test_company_does_not_change_what_a_photo_of_ones_own_finds(city, evaluated, tmp_path, capsys):
    """With the encoder: plain folders are searched photo by photo, and the log says what else is not as published."""
    test = city / "toy_city/images/test"
    (tmp_path / "alone").mkdir()
    name = Path(shutil.copy(sorted((test / "queries").iterdir())[7], tmp_path / "alone")).name

    def distances(queries, *flags, model="encoder"):
        folders = [f"--database_folder={test}/database", f"--queries_folder={queries}", "--no_labels"]
        rows = [row for row in rows_of(evaluated(*folders, *flags, model=model)) if Path(row["query"]).name == name]
        return {row["database"]: float(row["squared_descriptor_distance"]) for row in rows}, capsys.readouterr().err

    def departures(said):
        line = next(line for line in said.splitlines() if line.startswith("plain folders, unlike published benchmarks"))
        return [word in line for word in ("turned as EXIF says", "--no-antialias", "--encoder_context file_order")]

    (many, _), (one, said) = (distances(queries) for queries in (test / "queries", tmp_path / "alone"))
    assert list(many) == list(one) and departures(said) == [True, True, True]
    np.testing.assert_allclose([*many.values()], [*one.values()], atol=1e-5)
    # What is switched off is not said, nor what the model has not got; a benchmark says nothing of the kind.
    _, said = distances(test / "queries", "--encoder_context=file_order", "--no-antialias")
    assert departures(said) == [True, False, False]
    assert departures(distances(tmp_path / "alone", model="plain")[1]) == [True, True, False]
    assert list(results_of(evaluated(model="encoder"))["contexts"]) == ["file_order"]
    assert "plain folders" not in capsys.readouterr().err


@pytest.mark.drawn
def test_three_contexts_from_one_pass(evaluated, capsys, monkeypatch):
    passed, real = [], evaluation.extract
    monkeypatch.setattr(evaluation, "extract", lambda *args: passed.append(args[1]) or real(*args))
    contexts = "--encoder_context file_order shuffled independent --infer_batch_size=4".split()
    results = results_of(evaluated(*contexts, model="encoder"))
    assert len(passed) == 2, "database and queries, once"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Recalls on")]
    name = re.escape("Recalls on toy_city test (15 database, 15 queries)")
    assert len(lines) == 3 and re.match(name + r": R@1: [\d.]+, R@5", lines[0])
    assert re.match(name + r", shuffled \(5 orders\): R@1: .*; deviations R@1: [\d.]+", lines[1])
    assert re.match(name + r", independent: R@1: ", lines[2])
    assert {context: facts["orders"] for context, facts in results["contexts"].items()} == {
        "file_order": 1, "shuffled": 5, "independent": 1
    }  # fmt: skip
    assert results["recalls"] == results["contexts"]["file_order"]["recalls"]
    # Each is what a run of its own gives; batches of one are the independent context.
    for flags, context in (("--infer_batch_size=1", "independent"), ("--infer_batch_size=4", "file_order")):
        alone = results_of(evaluated(flags, model="encoder"))["recalls"]
        assert alone == results["contexts"][context]["recalls"]


def test_without_the_encoder_every_context_is_the_same(evaluated, capsys):
    results = results_of(evaluated("--encoder_context", "file_order", "shuffled", "independent"))
    assert list(results["contexts"]) == ["file_order"] and "alignment" not in results
    assert "WARNING: --encoder_context: no effect" in capsys.readouterr().err


@pytest.mark.drawn
def test_predictions_curve_and_descriptors(city, evaluated):
    folder = evaluated("--save_descriptors", "--recall_values", 1, 5)
    rows = rows_of(folder)
    assert len(rows) == 15 * 5
    database, queries = (np.load(folder / "descriptors" / f"{name}.npy") for name in ("database", "queries"))
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    assert (folder / "descriptors" / "queries.txt").read_text().split("\n")[:-1] == dataset.queries_paths
    squared = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    for index, row in enumerate(rows):
        query, rank = dataset.queries_paths.index(row["query"]), int(row["rank"])
        image = dataset.database_paths.index(row["database"])
        assert rank == index % 5 + 1 and query == index // 5
        assert float(row["squared_descriptor_distance"]) == pytest.approx(np.sort(squared[query])[rank - 1], abs=1e-5)
        near = np.linalg.norm(dataset.queries_positions[query] - dataset.database_positions[image]) <= 25
        assert row["correct"] == str(int(near))
    for n in (1, 5):
        hits = sum(any(r["correct"] == "1" for r in rows[q * 5 : q * 5 + n]) for q in range(15))
        assert results_of(folder)["recalls"][str(n)] == pytest.approx(100 * hits / 15)
    assert (folder / "recalls.png").exists()


def test_lower_precision_is_near(evaluated):
    precisions = ("fp32", "tf32", "bf16", "fp16")  # tf32 is fp32 on a CPU
    folders = [evaluated("--save_descriptors", f"--precision={precision}") for precision in precisions]
    for name in ("database", "queries"):
        exact, *near = (np.load(folder / "descriptors" / f"{name}.npy") for folder in folders)
        assert min((exact * rows).sum(axis=1).min() for rows in near) > 0.999
        assert [np.array_equal(exact, rows) for rows in near] == [True, False, False]


PCA = "--pca_dataset_folder=toy_city/images/train"


def test_pca(evaluated, tmp_path, capsys):
    folder = evaluated("--pca_dim=6", PCA, "--save_descriptors")
    assert np.load(folder / "descriptors" / "database.npy").shape == (15, 6)
    assert results_of(folder)["descriptor_dim"] == 6 and (folder / "pca.pth").exists()
    # 20 images vary in 19 directions; neither leaves a folder.
    for dim, most, flags in ((20, 19, ["--pca_whiten"]), (99, 20, [])):
        line = refusal(capsys, lambda dim=dim, flags=flags: evaluated(f"--pca_dim={dim}", PCA, *flags))
        assert line.startswith(f"--pca_dim {dim}: ") and line.endswith(f"at most {most}")
    assert len(list(tmp_path.glob("run*"))) == 1


def test_an_approximate_index(evaluated, capsys, monkeypatch, tmp_path):
    folder = evaluated("--index=IVF2,Flat", "--index_parameters=nprobe=2")
    assert results_of(folder)["index_agreement"]["nearest"] == 100
    assert "index IVF2,Flat finds the nearest image of 100.0%" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "extract", None)  # refused before it
    for flags in (["--index=IVX"], ["--index=IVF2,Flat", "--index_parameters=probes=2"], ["--index=IVF16,Flat"]):
        line = refusal(capsys, lambda flags=flags: evaluated(*flags))
        assert flags[-1].split("=", 1)[1].split("=")[0] in line and "leave out index" in line
    assert len(list(tmp_path.glob("run*"))) == 1


def fails(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["signal", "output"])
def test_what_was_extracted_outlives_a_failure(evaluated, tmp_path, monkeypatch, capsys, how):
    """The log names the option with which the same command goes on, and no image is read again."""
    status = 128 + signal.SIGTERM if how == "signal" else 1
    flags = ["--save_pairs=2", "--extraction_batch_size=4"]
    with monkeypatch.context() as failing:
        if how == "signal":
            failing.setattr(evaluation, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            failing.setattr(eval_script, "evaluate", evaluation.evaluate)
        else:
            failing.setattr("utils.outputs.pairs.write_pairs", fails)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            evaluated(*flags)
        assert ended.value.code == status and signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    left = only_run(tmp_path / "run0")
    (option,) = shlex.split(re.search("the same command with (.*) resumes", said)[1])
    assert option == f"--descriptors_folder={left}/extracted" and "Traceback" not in said
    assert {path.name for path in (left / "extracted/toy_city_test").glob("*.npy")} == {"database.npy", "queries.npy"}
    assert (left / "results.json").exists() == (how == "output")
    monkeypatch.setattr(evaluation, "image_batches", lambda paths, **_: iter(()) if not paths else 1 / 0)
    resumed = evaluated(*flags, option)
    monkeypatch.undo()
    assert "rm -r" not in capsys.readouterr().err
    assert (resumed / "predictions.csv").read_text() == (evaluated(*flags) / "predictions.csv").read_text()


def test_kept_descriptors_fit_or_are_refused(evaluated, tmp_path, monkeypatch, capsys):
    """A progress bar with nothing to do is hidden."""
    kept = f"--descriptors_folder={tmp_path}/kept"
    first = evaluated(kept)
    assert "toy_city test database: 100%" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "image_batches", lambda paths, **_: iter(()) if not paths else 1 / 0)
    again = evaluated(kept, "--encoder_context", "file_order", "independent", "--recall_values", 1, 5, 10, 20)
    assert (first / "predictions.csv").read_text() == (again / "predictions.csv").read_text()
    assert "toy_city test database:" not in capsys.readouterr().err
    for flag, was, now in (("--antialias", "False", "True"), ("--descriptor_dtype=float16", "float32", "float16")):
        line = refusal(capsys, lambda flag=flag: evaluated(kept, flag))
        assert f"{flag.split('=')[0]} was {was} and is now {now}" in line and "another --descriptors_folder" in line
    assert "weights" in refusal(capsys, lambda: evaluated(kept, model="other"))
    evaluated(kept, model="encoder")  # which comes after what is kept


def test_two_plain_folders_with_and_without_labels(city, evaluated, tmp_path, capsys):
    for side in ("database", "queries"):
        (tmp_path / side / "deep").mkdir(parents=True)
        for number, path in enumerate(sorted((city / "toy_city/images/test" / side).iterdir())[:6]):
            shutil.copy(path, tmp_path / side / "deep" / f"IMG_{number}.jpg")
    folders = [f"--database_folder={tmp_path}/database", f"--queries_folder={tmp_path}/queries"]
    folder = evaluated(*folders, "--no_labels", "--save_predictions=2")
    assert {row["correct"] for row in rows_of(folder)} == {""} and "recalls" not in results_of(folder)
    assert f"without labels: predictions.csv in {folder}" in capsys.readouterr().err
    (tmp_path / "right.csv").write_text("query,database\n" + "".join(f"IMG_{n}.jpg,{n}\n" for n in range(6)))
    rows = rows_of(evaluated(*folders, f"--positives_file={tmp_path}/right.csv"))
    assert all((row["correct"] == "1") == (row["query"][-5] == row["database"][-5]) for row in rows)
    assert "none of the 6 database images has a position" in refusal(capsys, lambda: evaluated(*folders))


def test_keys_select_queries_and_make_a_submission(city, evaluated, tmp_path, capsys, caplog):
    folder = tmp_path / "data/msls/images/test"
    for side in ("database", "queries"):
        (folder / side).mkdir(parents=True)
        for number, path in enumerate(sorted((city / "toy_city/images/test" / side).iterdir())):
            fields = path.name.split("@")
            fields[7] = f"{side[0]}{number:02d}"
            shutil.copy(path, folder / side / "@".join(fields))
    keys = tmp_path / "keys.txt"
    keys.write_text("\ufeffq03\nq05,q11\nq99\n")
    flags = [f"--query_keys={keys}", "--save_submission", "--eval_dataset_name=msls", "--recall_values", 1, 5]
    run = evaluated(*flags, data=tmp_path / "data")
    assert results_of(run)["dataset"]["queries"] == 3
    assert "1 of the 4 keys" in caplog.text and "published figures are for 11,084 or 740" in caplog.text
    with zipfile.ZipFile(run / "submission.zip") as archive:
        lines = archive.read("submission.csv").decode().splitlines()
    predicted = {}
    for row in rows_of(run):
        predicted.setdefault(image_key(row["query"]), []).append(image_key(row["database"]))
    assert lines == [" ".join([key, *keys]) for key, keys in predicted.items()] and len(lines) == 3
    for content, problem in ((b"nobody", "none of the 1 keys"), ("q03".encode("utf-16"), "keys.txt, line 1")):
        keys.write_bytes(content)
        assert problem in refusal(capsys, lambda: evaluated(*flags, data=tmp_path / "data"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import numpy as np
from utils.retrieval.descriptor_store import DescriptorStore
real, left = DescriptorStore.write, int(sys.argv[1])

def write(self, indices, rows):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    with open({log!r}, "a") as file:
        file.writelines(f"{{self.path.stem}} {{index}}\\n" for index in indices)
    real(self, indices, rows)

DescriptorStore.write = write
import eval
eval.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_five_times_and_resumed(city, weights, tmp_path):
    """The script dies before a write, having done as many as the number says."""
    paths = {"root": str(Path(__file__).parents[2]), "log": str(tmp_path / "written.txt")}
    (tmp_path / "killed.py").write_text(KILLED.format(**paths))
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    flags += ["--extraction_batch_size=2", f"--save_dir={tmp_path}/run"]
    kept = [*flags, f"--descriptors_folder={tmp_path}/kept"]
    for writes in (0, 3, 1, 5, 4):  # of 8 batches of the database and 8 of the queries
        assert warm.run(tmp_path / "killed.py", writes, *kept).returncode == -signal.SIGKILL
    finished = warm.run(tmp_path / "killed.py", 100, *kept)
    assert finished.returncode == 0, finished.stderr
    written = (tmp_path / "written.txt").read_text().splitlines()
    assert sorted(written) == sorted(f"{side} {n}" for side in ("database", "queries") for n in range(15))
    eval_script.main([*flags, f"--descriptors_folder={tmp_path}/straight"])
    for name in ("database.npy", "queries.npy"):
        kept, straight = (next((tmp_path / f).rglob(name)).read_bytes() for f in ("kept", "straight"))
        assert kept == straight


@pytest.mark.slow
def test_two_processes_that_read_with_workers_find_what_one_finds(city, weights, evaluated, tmp_path):
    flags = "--save_descriptors --infer_batch_size=4 --extraction_batch_size=2 --query_corruptions noise:3".split()
    given = [*SMALL, f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", f"--save_dir={tmp_path}/two"]
    given += [f"--resume={weights}/encoder.pth", "--crossimage_encoder", *flags, "--num_workers=2"]
    run = warm.torchrun(eval_script.__file__, *given)
    assert run.returncode == 0, run.stderr
    runs = evaluated(*flags, model="encoder"), only_run(tmp_path / "two")
    for query_set, queries in (("clean", "queries"), ("noise_3", "queries+noise_3")):
        one, two = (folder / query_set for folder in runs)
        assert results_of(one)["recalls"] == results_of(two)["recalls"]
        for name in ("database", queries):
            a, b = (np.load(folder / "descriptors" / f"{name}.npy") for folder in (one, two))
            np.testing.assert_allclose(a, b, atol=1e-5)
        found = [[(row["query"], row["rank"], row["database"]) for row in rows_of(folder)] for folder in (one, two)]
        assert found[0] == found[1] and run.stderr.count("Recalls on") == 2
