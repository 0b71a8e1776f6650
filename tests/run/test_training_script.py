"""The whole training script gives what the released one gave, epoch for epoch (tests/golden/training_script.json)."""

import hashlib
import json
from functools import partial

import pytest
import torch
from formula import GOLDEN, formula_model
from helpers import only_run, rows_of

import model as model_package
import train as train_script
from datasets import toy_city
from model.cross_image import CrossImageEncoder
from model.dinov2 import DINOv2

pytestmark = pytest.mark.slow

RECORD = json.loads((GOLDEN / "training_script.json").read_text())


@pytest.fixture
def frozen_once(monkeypatch):
    """Frozen blocks compute each image once, as nothing changes it: half of the time. The rest is as always."""
    real_freeze = DINOv2.freeze

    def freeze(self, first_trained):
        real_freeze(self, first_trained)
        frozen = self.blocks[:first_trained]
        forwards, seen = [block.forward for block in frozen], {}

        def forward(tokens, *rest):
            images = [hashlib.sha256(image.numpy()).digest() for image in tokens]
            if not seen.keys() >= set(images):
                for block_forward in forwards:
                    tokens = block_forward(tokens, *rest)
                seen.update(zip(images, tokens.clone(), strict=True))
            return torch.stack([seen[image] for image in images])

        frozen[0].forward = forward
        for block in frozen[1:]:
            block.forward = lambda tokens, *rest: tokens

    monkeypatch.setattr(DINOv2, "freeze", freeze)


def test_seven_epochs_are_the_released_scripts(tmp_path, monkeypatch, frozen_once):
    toy_city.main([*RECORD["data"].split()[3:], f"--output={tmp_path}"])
    state = formula_model(backbone="dino", crossimage_encoder=True).state_dict()
    weights = tmp_path / "released.pth"
    torch.save({"model_state_dict": {f"module.{name}": value for name, value in state.items()}}, weights)
    monkeypatch.setattr(model_package.network, "CrossImageEncoder", partial(CrossImageEncoder, dropout=0.0))
    options = RECORD["options"].split(", one step an epoch")[0].replace("<weights>", str(weights)).split()
    options += [f"--eval_datasets_folder={tmp_path}", "--eval_dataset_name=toy_city", "--device=cpu", "--num_workers=0"]
    monkeypatch.setattr(train_script.Progress, "save_last", lambda self: None)  # a third of the time; nothing resumes
    train_script.main([*options, f"--save_dir={tmp_path}/run"])

    epochs = rows_of(only_run(tmp_path / "run"), "metrics.csv")
    for file in tmp_path.rglob("*.pth"):
        file.unlink()  # 1.5 GB, which pytest would keep
    assert [float(epoch["loss"]) for epoch in epochs] == pytest.approx(RECORD["losses"], rel=0, abs=2e-6)
    for name in ("R@1", "R@5"):
        assert [round(float(epoch[name]), 1) for epoch in epochs] == RECORD[f"validation_{name}"]
    assert {epoch["steps"] for epoch in epochs} == {"1"}
