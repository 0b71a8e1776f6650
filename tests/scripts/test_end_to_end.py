"""train.py and eval.py as a user runs them, on the toy city."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch

import eval as eval_script
import train as train_script
from model import build_model
from parser import TrainOptions, parse

SMALL = "--eval_dataset_name=toy_city --backbone=dino_tiny --device cpu --num_workers 0 --resize 56 56".split()
README_TRAIN = (
    "--foundation_model_path={folder}/dinov2_vitb14_pretrain.pth --supervlad_clusters=4 --crossimage_encoder "
    "--patience=3 --lr=0.00005 --epochs_num=20 --train_batch_size=120 --freeze_te 8"
)
RECALLS = re.compile(r"Recalls on toy_city test \(15 database, 15 queries\): R@1: \d+\.\d, R@5: \d+\.\d, R@10: .*")


def train(city, save_dir, *flags):
    flags = [*SMALL, f"--eval_datasets_folder={city}", f"--save_dir={save_dir}", "--train_resize", "56", "56", *flags]
    return train_script.main(flags)


def evaluate(city, save_dir, *flags):
    return eval_script.main([*SMALL, f"--eval_datasets_folder={city}", f"--save_dir={save_dir}", *flags])


def run_folder(save_dir):
    (folder,) = save_dir.iterdir()
    return folder


def read(folder):
    return torch.load(folder / "last_model.pth", weights_only=True)


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory):
    """The run folder of the released README's training command, with a small backbone, batch and number of epochs."""
    save_dir = tmp_path_factory.mktemp("trained")
    foundation = build_model(backbone="dino_tiny").backbone
    torch.save(foundation.state_dict(), save_dir / "dinov2_vitb14_pretrain.pth")
    flags = README_TRAIN.format(folder=save_dir).split()
    train(city, save_dir / "run", *flags, "--train_batch_size=6", "--epochs_num=2")
    return run_folder(save_dir / "run"), foundation


def test_training_leaves_what_it_promises(trained):
    folder, _ = trained
    assert {p.name for p in folder.iterdir()} == {
        "info.log", "debug.log", "metrics.csv", "results.json", "training.png",
        "best_model.pth", "last_model.pth", "previous_model.pth",
    }  # fmt: skip
    log = (folder / "info.log").read_text()
    assert RECALLS.search(log.splitlines()[-1])
    assert len(re.findall(r"epoch=\d\d loss=\d\.\d+ lr=5e-05 R@1=[\d.]+ R@5=", log)) == 2
    assert re.search(r"parameters: \d+ trainable of \d+", log)
    assert "frozen after its one step (--encoder_training released)" in log
    results = json.loads((folder / "results.json").read_text())
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


def test_our_files_tell_what_they_are_of(city, trained, tmp_path, caplog):
    """Clusters and encoder are the file's where the command line says nothing of them."""
    folder, _ = trained
    with caplog.at_level(logging.INFO):
        evaluate(city, tmp_path / "run", f"--resume={folder}/best_model.pth")
    assert "from the checkpoint: --supervlad_clusters 4, --ghost_clusters 1, --crossimage_encoder" in caplog.text
    found = RECALLS.search((run_folder(tmp_path / "run") / "info.log").read_text().splitlines()[-1])
    assert found and found.group() in (folder / "info.log").read_text()


@pytest.mark.parametrize("released", [True, False])
def test_evaluation_repeats_what_training_found(city, trained, tmp_path, released):
    """Our file, and the same weights in the released format."""
    folder, _ = trained
    path = folder / "best_model.pth"
    if released:
        state = torch.load(path, weights_only=True)["model_state_dict"]
        path = tmp_path / "SuperVLAD.pth"
        torch.save({"model_state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    evaluate(city, tmp_path / "run", f"--resume={path}", "--supervlad_clusters=4", "--crossimage_encoder")
    log = (run_folder(tmp_path / "run") / "info.log").read_text()
    found = RECALLS.search(log.splitlines()[-1])
    assert found and found.group() in (folder / "info.log").read_text()
    assert re.search(r"largest difference between the two encoder layers: [123]\.\de-04", log)


@pytest.mark.parametrize("flags", ["--supervlad_clusters=4", "--supervlad_clusters=1 --ghost_clusters=2"])
def test_evaluation_without_the_encoder(city, tmp_path, flags):
    options = {"clusters": 4} if "4" in flags else {"clusters": 1, "ghost_clusters": 2}
    torch.save(build_model(backbone="dino_tiny", **options).state_dict(), tmp_path / "model.pth")
    evaluate(city, tmp_path / "run", f"--resume={tmp_path}/model.pth", *flags.split())
    assert RECALLS.search((run_folder(tmp_path / "run") / "info.log").read_text().splitlines()[-1])


def test_the_same_seed_trains_the_same_model(city, tmp_path):
    """Whatever the number of workers."""
    weights = []
    for name, flags in (("a", ["--num_workers=0"]), ("b", ["--num_workers=2"]), ("c", ["--seed=1"])):
        train(city, tmp_path / name, "--epochs_num=2", "--train_batch_size=8", "--crossimage_encoder", *flags)
        weights.append(read(run_folder(tmp_path / name))["model_state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_no_epochs_evaluates_the_initialised_model(city, tmp_path):
    train(city, tmp_path, "--epochs_num=0")
    folder = run_folder(tmp_path)
    state = read(folder)["model_state_dict"]
    assert state["aggregation.conv.weight"].norm(dim=1).std() < 1e-4, "centroids of one norm: k-means set the layer"
    assert RECALLS.search((folder / "info.log").read_text().splitlines()[-1])


def test_training_stops_early_and_keeps_the_best(city, tmp_path, monkeypatch):
    recalls = iter([{1: 10.0, 5: 50.0}, {1: 30.0, 5: 35.0}, {1: 40.0, 5: 20.0}, {1: 5.0, 5: 5.0}, {1: 1.0, 5: 2.0}])
    monkeypatch.setattr(train_script, "evaluate", lambda *_, **__: next(recalls))
    train(city, tmp_path, "--epochs_num=9", "--patience=2", "--train_batch_size=8", "--encoder_training=every_step")
    folder = run_folder(tmp_path)
    best = torch.load(folder / "best_model.pth", weights_only=True)
    assert (best["epoch_num"], best["best_score"]) == (2, 65.0)
    assert (read(folder)["epoch_num"], read(folder)["not_improved_num"]) == (4, 2)


def losses(save_dir):
    return [float(line.split(",")[2]) for line in (run_folder(save_dir) / "metrics.csv").read_text().split()[1:]]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_other_optimisers_train_the_encoder_at_every_step(city, tmp_path, optim):
    flags = ["--crossimage_encoder", "--encoder_training=every_step", "--train_batch_size=4", "--lr_encoder=0.01"]
    train(city, tmp_path, f"--optim={optim}", "--epochs_num=2", "--place_order=reshuffled", *flags)
    last = read(run_folder(tmp_path))
    first, second = (
        torch.cat(
            [v.flatten() for k, v in last["model_state_dict"].items() if k.startswith(f"encoder.layers.{layer}.")]
        )
        for layer in (0, 1)
    )
    assert last["encoder_retired"] is False
    assert (first - second).abs().max() > 1e-5, "the layers start equal"


@pytest.fixture(scope="module")
def trained_in(city, tmp_path_factory):
    """Trains in a precision, where no flags that mean the same have done so, and returns the --save_dir."""
    flags = ["--epochs_num=4", "--train_batch_size=4", "--freeze_te=none", "--lr=0.0003", "--crossimage_encoder"]
    done = {}

    def save_dir(*precision):
        options = parse(TrainOptions, [*SMALL, f"--eval_datasets_folder={city}", *flags, *precision])
        meant = replace(options, given=(), mixed_precision=False)
        if meant not in done:
            done[meant] = tmp_path_factory.mktemp("precision")
            train(city, done[meant], *flags, *precision)
        return done[meant]

    return save_dir


@pytest.mark.parametrize("precision", ["--precision=bf16", "--precision=fp16", "--mixed_precision", "--precision=tf32"])
def test_every_precision_ends_near_the_loss_of_fp32(trained_in, precision):
    plain, other = losses(trained_in()), losses(trained_in(precision))
    assert len(plain) == 4 and plain[-1] < plain[0]
    assert other[-1] == pytest.approx(plain[-1], rel=0.05)
    assert read(run_folder(trained_in(precision)))["encoder_retired"] is True


def test_a_new_run_from_our_weights_does_not_step_the_encoder_again(city, tmp_path, trained):
    folder, _ = trained
    flags = ["--crossimage_encoder", "--epochs_num=1", "--train_batch_size=8", f"--resume={folder}/best_model.pth"]
    train(city, tmp_path, *flags)
    now = read(run_folder(tmp_path))["model_state_dict"]
    then = torch.load(folder / "best_model.pth", weights_only=True)["model_state_dict"]
    moved = {key.split(".")[0] for key in then if not torch.equal(now[key], then[key])}
    assert moved == {"backbone", "aggregation"}


def test_resume_starts_from_the_weights(city, tmp_path, trained):
    folder, _ = trained
    train(city, tmp_path, "--epochs_num=0", "--crossimage_encoder", f"--resume={folder}/best_model.pth")
    now, then = (
        torch.load(f, weights_only=True)["model_state_dict"]
        for f in (run_folder(tmp_path) / "last_model.pth", folder / "best_model.pth")
    )
    assert all(torch.equal(now[key], then[key]) for key in then)


def test_initialisation_falls_back_on_gsv_cities(city, tmp_path, caplog):
    (tmp_path / "toy_city" / "images").mkdir(parents=True)
    for split in ("val", "test"):
        (tmp_path / "toy_city" / "images" / split).symlink_to(city / "toy_city" / "images" / split)
    (tmp_path / "gsv_cities").symlink_to(city / "gsv_cities")
    with caplog.at_level(logging.INFO):
        train(tmp_path, tmp_path / "run", "--epochs_num=0")
    assert f"no train split in {tmp_path}/toy_city/images: the layer is initialised from GSV-Cities" in caplog.text
    assert "initialised from 1280 local features" in caplog.text  # 80 photos of 16 patches


def test_a_published_backbone_on_a_cpu_is_warned_of(city, tmp_path, caplog, monkeypatch):
    small = build_model(backbone="dino_tiny")
    monkeypatch.setattr(train_script, "FOUNDATION_FILES", {"dino_tiny": "x"})
    monkeypatch.setattr(train_script, "estimated_hours", lambda *_, **__: 1234.0)
    torch.save(small.backbone.state_dict(), tmp_path / "x.pth")
    train(
        city, tmp_path / "run", "--epochs_num=1", "--train_batch_size=16", f"--foundation_model_path={tmp_path}/x.pth"
    )
    assert "training dino_tiny on a CPU takes about 1234 hours" in caplog.text


def test_options_of_training_without_a_part_are_said(city, tmp_path, capsys):
    """A warm-up as long as the run, and an order that begins after it."""
    plain = ["--epochs_num=1", "--train_batch_size=6", "--randaugment_ops=0"]
    train(city, tmp_path / "plain", *plain)
    steps = int((run_folder(tmp_path / "plain") / "metrics.csv").read_text().splitlines()[1].split(",")[1])
    assert "WARNING: --" not in capsys.readouterr().err
    for flags, told in (
        (["--place_order=similar"], "--place_order similar has no effect: it starts with the second epoch"),
        (["--place_order=reshuffled"], "--place_order reshuffled has no effect: it starts with the second epoch"),
        ([f"--warmup_steps={steps}"], f"--warmup_steps {steps} covers the whole run of {steps} steps"),
        ([f"--warmup_steps={steps - 1}"], ""),
    ):
        train(city, tmp_path / "other", *plain, *flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if "WARNING: --" in line]
        assert len(lines) == bool(told) and all(told in line for line in lines)


def test_where_all_places_share_a_batch_none_is_described(city, tmp_path, capsys):
    flags = ["--epochs_num=2", "--train_batch_size=500", "--randaugment_ops=0"]
    for order in ("similar", "reshuffled"):
        train(city, tmp_path / order, *flags, f"--place_order={order}")
    told = capsys.readouterr().err
    assert "--place_order similar has no effect: all" in told and ": described" not in told
    tables = [(run_folder(tmp_path / order) / "metrics.csv").read_text() for order in ("similar", "reshuffled")]
    assert tables[0] == tables[1]


def test_a_folder_above_the_places_is_answered_with_theirs(city, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(city, tmp_path, f"--train_dataset_folder={city}")
    assert exit_.value.code == 2
    assert f"Dataframes/<City>.csv is missing; give {city}/gsv_cities with --train_dataset_folder" in (
        capsys.readouterr().err
    )
