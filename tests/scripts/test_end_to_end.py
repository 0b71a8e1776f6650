"""train.py and eval.py as a user runs them, on the toy city."""

import re

import pytest
import torch
from helpers import SMALL, only_run, results_of, rows_of

import eval as eval_script
import train as train_script
from model import build_model

pytestmark = pytest.mark.slow

SMALL = [*SMALL, "--eval_dataset_name=toy_city"]
SHALLOW = ["--backbone_blocks=1", "--freeze_te=0"]  # where depth plays no part
README_TRAIN = (
    "--foundation_model_path={folder}/dinov2_vitb14_pretrain.pth --supervlad_clusters=4 --crossimage_encoder "
    "--patience=3 --lr=0.00005 --epochs_num=20 --train_batch_size=120 --freeze_te 8"
)
RECALLS = re.compile(r"Recalls on toy_city test \(15 database, 15 queries\): R@1: \d+\.\d, R@5: \d+\.\d, R@10: .*")


def train(city, save_dir, *flags):
    flags = [*SMALL, f"--eval_datasets_folder={city}", f"--save_dir={save_dir}", "--train_resize", "56", "56", *flags]
    return train_script.main(flags)


def read(folder, name="last_model.pth"):
    return torch.load(folder / name, weights_only=True)


def last_line(folder):
    return (folder / "info.log").read_text().splitlines()[-1]


@pytest.fixture
def evaluate(city, tmp_path):
    """Runs eval.py, and returns its last line, which has recalls, and all of its log."""

    def run(*flags):
        eval_script.main([*SMALL, f"--eval_datasets_folder={city}", f"--save_dir={tmp_path}/run", *flags])
        folder = only_run(tmp_path / "run")
        return RECALLS.search(last_line(folder)).group(), (folder / "info.log").read_text()

    return run


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory):
    """The run folder of the released README's training command, with a small backbone, batch and number of epochs."""
    save_dir = tmp_path_factory.mktemp("trained")
    foundation = build_model(backbone="dino_tiny").backbone
    torch.save(foundation.state_dict(), save_dir / "dinov2_vitb14_pretrain.pth")
    flags = README_TRAIN.format(folder=save_dir).split()
    train(city, save_dir / "run", *flags, "--train_batch_size=6", "--epochs_num=2")
    return only_run(save_dir / "run"), foundation


def test_training_leaves_what_it_promises(trained):
    folder, _ = trained
    assert {p.name for p in folder.iterdir()} == {
        "info.log", "debug.log", "metrics.csv", "results.json", "options.txt", "training.png",
        "best_model.pth", "last_model.pth", "previous_model.pth",
    }  # fmt: skip
    log = (folder / "info.log").read_text()
    assert RECALLS.search(last_line(folder))
    assert len(re.findall(r"epoch=\d\d loss=\d\.\d+ lr=5e-05 R@1=[\d.]+ R@5=", log)) == 2
    assert re.search(r"parameters: \d+ trainable of \d+", log)
    assert "frozen after its one step (--encoder_training released)" in log
    results = results_of(folder)
    assert set(results["recalls"]) == {"1", "5", "10", "20"}
    assert results["dataset"] == {"name": "toy_city test", "database": 15, "queries": 15}
    assert results["options"]["freeze_te"] == 8 and results["environment"]["device"] == "cpu"


def test_training_moves_what_it_should(trained):
    folder, foundation = trained
    last = read(folder)
    state = last["model_state_dict"]
    for name, value in foundation.state_dict().items():
        moved = not torch.equal(state[f"backbone.{name}"], value)
        assert moved == (name.startswith("blocks.") and int(name.split(".")[1]) >= 8), name
    assert last["epoch_num"] == 2 and last["encoder_training"] == "released"
    assert last["encoder_retired"] is True


def test_our_files_tell_what_they_are_of(trained, evaluate):
    """Clusters and encoder are the file's where the command line says nothing of them."""
    folder, _ = trained
    recalls, log = evaluate(f"--resume={folder}/best_model.pth")
    (line,) = [line for line in log.splitlines() if "from the checkpoint: " in line]
    assert all(fact in line for fact in ("clusters 4", "ghost_clusters 1", "crossimage_encoder True"))
    assert recalls in last_line(folder) and "encoder_training: released" in log


def test_evaluation_repeats_what_training_found_from_the_released_format(trained, tmp_path, evaluate):
    folder, _ = trained
    state = read(folder, "best_model.pth")["model_state_dict"]
    path = tmp_path / "SuperVLAD.pth"
    torch.save({"model_state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    recalls, log = evaluate(f"--resume={path}", "--supervlad_clusters=4", "--crossimage_encoder")
    assert recalls in last_line(folder)
    assert re.search(r"largest difference between the two encoder layers: [123]\.\de-04", log)


def test_the_same_seed_trains_the_same_model(city, tmp_path):
    """Whatever the number of workers."""
    weights = []
    for name, flags in (("a", ["--num_workers=0"]), ("b", ["--num_workers=2"]), ("c", ["--seed=1"])):
        train(city, tmp_path / name, "--epochs_num=1", "--train_batch_size=4", "--crossimage_encoder", *flags)
        weights.append(read(only_run(tmp_path / name))["model_state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_no_epochs_evaluates_the_initialised_model(city, tmp_path):
    train(city, tmp_path, "--epochs_num=0", "--freeze_te=12")
    folder = only_run(tmp_path)
    state = read(folder)["model_state_dict"]
    assert state["aggregation.conv.weight"].norm(dim=1).std() < 1e-4, "centroids of one norm: k-means set the layer"
    assert RECALLS.search(last_line(folder))


def test_training_stops_early_and_keeps_the_best(city, tmp_path, monkeypatch):
    recalls = iter([{1: 10.0, 5: 50.0}, {1: 30.0, 5: 35.0}, {1: 40.0, 5: 20.0}, {1: 5.0, 5: 5.0}, {1: 1.0, 5: 2.0}])
    monkeypatch.setattr(train_script, "evaluate_split", lambda *_, **__: next(recalls))
    train(city, tmp_path, *SHALLOW, "--epochs_num=9", "--patience=2", "--train_batch_size=8")
    folder = only_run(tmp_path)
    best = read(folder, "best_model.pth")
    assert (best["epoch_num"], best["best_score"]) == (2, 65.0)
    assert (read(folder)["epoch_num"], read(folder)["not_improved_num"]) == (4, 2)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_other_optimisers_train_the_encoder_at_every_step(city, tmp_path, optim):
    flags = ["--crossimage_encoder", "--encoder_training=every_step", "--train_batch_size=4", "--lr_encoder=0.01"]
    train(city, tmp_path, *SHALLOW, f"--optim={optim}", "--epochs_num=2", "--place_order=reshuffled", *flags)
    last = read(only_run(tmp_path))
    state = last["model_state_dict"]
    names = [name for name in state if name.startswith("encoder.layers.0.")]
    moved = max((state[name] - state[name.replace("layers.0", "layers.1")]).abs().max() for name in names)
    assert moved > 1e-5 and last["encoder_retired"] is False, "the layers start equal"


def test_every_precision_ends_near_the_loss_of_fp32(city, tmp_path):
    losses = []
    for precision in ("--precision=fp32", "--precision=bf16", "--mixed_precision"):
        flags = [*SHALLOW, "--epochs_num=2", "--train_batch_size=4", "--lr=0.0003", "--crossimage_encoder", precision]
        train(city, tmp_path / precision, *flags)
        folder = only_run(tmp_path / precision)
        losses.append([float(row["loss"]) for row in rows_of(folder, "metrics.csv")])
        assert len(losses[-1]) == 2 and read(folder)["encoder_retired"] is True
    assert losses[0][1] < losses[0][0]
    assert [last for _, last in losses] == pytest.approx([losses[0][1]] * 3, rel=0.05)


def test_a_new_run_from_our_weights(city, tmp_path, trained):
    """It starts from them, and does not step the encoder again."""
    folder, _ = trained
    then = read(folder, "best_model.pth")["model_state_dict"]
    for epochs, moves in ((0, set()), (1, {"backbone", "aggregation"})):
        flags = [f"--epochs_num={epochs}", "--train_batch_size=8", f"--resume={folder}/best_model.pth"]
        train(city, tmp_path / str(epochs), "--crossimage_encoder", *flags)
        now = read(only_run(tmp_path / str(epochs)))["model_state_dict"]
        assert {key.split(".")[0] for key in then if not torch.equal(now[key], then[key])} == moves


def test_initialisation_falls_back_on_gsv_cities(city, tmp_path, caplog):
    (tmp_path / "toy_city" / "images").mkdir(parents=True)
    for split in ("val", "test"):
        (tmp_path / "toy_city" / "images" / split).symlink_to(city / "toy_city" / "images" / split)
    (tmp_path / "gsv_cities").symlink_to(city / "gsv_cities")
    caplog.set_level("INFO")
    train(tmp_path, tmp_path / "run", "--epochs_num=0")
    assert f"no train split in {tmp_path}/toy_city/images" in caplog.text
    assert "initialised from 1280 local features" in caplog.text  # 80 photos of 16 patches
