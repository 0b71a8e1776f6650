"""A toy city for the tests that read photos, weights for it, and eval.py run on both."""

import signal

import pytest
import torch
from helpers import MODEL, SMALL, only_run, save_weights

import eval as eval_script
import test as evaluation
from datasets.toy_city import write_toy_city
from utils.outputs import assignments, figures


def pytest_collection_modifyitems(items):
    """Puts the slow ones first: of short tests at the end each process finds its share."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """A folder with a small `gsv_cities` and a small `toy_city`."""
    folder = tmp_path_factory.mktemp("data")
    write_toy_city(
        folder,
        train_streets=2,
        places=4,
        visits=5,
        test_streets=3,
        val_streets=2,
        cluster_streets=2,
        spots=5,
        workers=2,
    )
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with `encoder.pth` and `plain.pth`, the rest of which is equal, `other.pth`, of other weights, and
    `says.pth`, those of the encoder with what the network is."""
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder / "plain.pth")
    save_weights(folder / "other.pth", seed=2)
    state = torch.load(save_weights(folder / "encoder.pth", crossimage_encoder=True))
    torch.save({"model_state_dict": state, "model": MODEL | {"crossimage_encoder": True}}, folder / "says.pth")
    return folder


@pytest.fixture
def evaluated(city, weights, tmp_path):
    """Runs eval.py with the options of SMALL, and returns the run's folder.

    Its flags; `model`, a name of `weights`; `data`, the folder of a `toy_city`, unless photos or a map are given.
    """

    def run(*flags, model="plain", data=city):
        flags = [*map(str, flags)]
        given = " ".join(flags)
        if not any(name in given for name in ("--database_folder", "--map", "--eval_datasets_folder")):
            flags.append(f"--eval_datasets_folder={data}")
            flags += ["--eval_dataset_name=toy_city"] * ("--eval_dataset_name" not in given)
        save_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        encoder = ["--crossimage_encoder"] * (model == "encoder")
        eval_script.main([*SMALL, *encoder, f"--resume={weights}/{model}.pth", f"--save_dir={save_dir}", *flags])
        return only_run(save_dir)

    return run


@pytest.fixture
def passed(monkeypatch):
    """The photos that pass the backbone."""
    seen, real = [], evaluation.image_batches
    monkeypatch.setattr(evaluation, "image_batches", lambda paths, **given: seen.extend(paths) or real(paths, **given))
    return seen


@pytest.fixture(autouse=True)
def unseeded():
    """Gives each test the same randomness, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are made, and drawn in tests marked `drawn` alone: that takes two thirds of a small evaluation's time."""
    if not request.node.get_closest_marker("drawn"):
        for module in (figures, assignments):
            monkeypatch.setattr(module, "save_figure", lambda figure, path, dpi: path.touch())


@pytest.fixture(scope="session", autouse=True)
def listening():
    """Signals as a terminal sends them: a shell ignores SIGINT for what it starts in the background, nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Reports travel between processes as UTF-8, and some tests log names that are none."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report
