"""A PCA as the last part of an exported model."""

import numpy as np
import pytest
import torch
from helpers import SMALL, only_run, refusal, results_of, tiny

import hubconf
import train as train_script
from model import export
from model.weights import read_file

PCA = ["--pca_dim=6", "--pca_dataset_folder=toy_city/images/train"]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "whiten"), [("encoder", True), ("one_cluster", False)], indirect=["saved"])
def test_a_pca_becomes_part_of_the_file(saved, evaluated, tmp_path, capsys, whiten):
    """With and without the encoder: what eval.py computes with the options, the file gives by itself."""
    model, _, path = saved
    fitted = evaluated(f"--resume={path}", "--save_descriptors", *PCA, *["--pca_whiten"] * whiten)
    expected = np.load(fitted / "descriptors" / "queries.npy")
    assert (abs(np.linalg.norm(expected, axis=1) - 1) < 1e-5).all() == whiten, "published figures: not again"
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    file = tmp_path / "small.safetensors"
    export.main(f"--resume {path} --pca {fitted}/pca.pth --resize 56 56 --output {file}".split())
    shown = capsys.readouterr().out
    context = "; fitted in --encoder_context file_order" * (model.encoder is not None)
    told = f"6 of {model.descriptor_dim} dimensions{', whitened' * whiten}, of unit norm{context}\n"
    assert told in shown
    folder = evaluated(f"--resume={file}", "--save_descriptors")
    np.testing.assert_allclose(np.load(folder / "descriptors" / "queries.npy"), expected, atol=2e-5)
    assert results_of(folder)["descriptor_dim"] == 6
    assert not whiten or results_of(folder)["recalls"] == results_of(fitted)["recalls"]
    # Others read it too: torch.hub, and who exports it again.
    assert hubconf.checkpoint(file)(torch.randn(3, 3, 56, 56)).shape == (3, 6)
    export.main(f"--resume {file} --output {tmp_path}/again.safetensors".split())
    first, again = (read_file(path) for path in (file, tmp_path / "again.safetensors"))
    assert again["pca"]["dim"] == 6 and again["pca"]["whiten"] is whiten
    assert torch.equal(*(content["model_state_dict"]["projection.mean"] for content in (first, again)))


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["one_cluster"], indirect=True)
def test_a_pca_that_does_not_fit(saved, evaluated, refused, tmp_path, capsys, city):
    model, settings, path = saved
    fitted = evaluated(f"--resume={path}", *PCA) / "pca.pth"
    content = read_file(fitted)
    file = tmp_path / "small.safetensors"
    export.main(f"--resume {path} --pca {fitted} --output {file}".split())
    torch.save({**content, "components": content["components"][:, 1:]}, tmp_path / "other.pth")
    torch.save({"model_state_dict": tiny(**settings).state_dict(), "model": settings}, tmp_path / "weights.pth")
    for source, pca, told in (
        (path, path, "best_model.pth holds no PCA"),
        (path, tmp_path / "other.pth", f"a PCA of {model.descriptor_dim - 1} dimensions"),
        (path, tmp_path / "none.pth", "no weight file at"),
        (file, fitted, "--pca: the checkpoint already ends with one"),
        (tmp_path / "weights.pth", fitted, "pca.pth was fitted on another checkpoint's descriptors"),
    ):
        assert told in refused("--resume", source, "--pca", pca, f"--output={tmp_path}/b.safetensors")
    # What is not an error is said: another size, and a file of an older version, which tells no weights.
    del content["pca"]["weights"]
    torch.save(content, tmp_path / "older.pth")
    for pca, size, told in (
        (fitted, "56 56", ""),
        (fitted, "70 56", "pca.pth was fitted on images of 56 56, but the export is for 70 56"),
        (tmp_path / "older.pth", "56 56", "older.pth does not say which weights it was fitted on"),
    ):
        capsys.readouterr()
        export.main(f"--resume {path} --pca {pca} --resize {size} --output {tmp_path}/b.safetensors".split())
        lines = [line for line in capsys.readouterr().err.splitlines() if "fitted on" in line]
        assert len(lines) == bool(told) and all(told in line for line in lines)
    assert "pca_dim 6" in refusal(capsys, lambda: evaluated(f"--resume={file}", *PCA))
    # Training starts from the weights without it.
    train_script.main(
        [*SMALL, f"--eval_datasets_folder={city}", f"--resume={file}", f"--save_dir={tmp_path}/trained"]
        + "--eval_dataset_name=toy_city --supervlad_clusters=1 --ghost_clusters=2 --epochs_num=0".split()
        + "--backbone_blocks=1 --freeze_te=0 --train_resize 56 56 --train_batch_size=4".split()
    )
    assert "small.safetensors ends with a PCA, which training leaves out" in capsys.readouterr().err
    best = read_file(only_run(tmp_path / "trained") / "best_model.pth")
    assert best["model_state_dict"].keys() == model.state_dict().keys()
