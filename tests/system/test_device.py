"""The way to the device and back, and what needs a CUDA GPU."""

import csv
import shutil

import pytest
import torch
from PIL import Image

import eval as eval_script
import train as train_script
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform
from model import build_model
from parser import EvalOptions, parse
from utils.system import device as device_module
from utils.system.device import reading_workers, to_cpu, to_device

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
TOY = "--eval_dataset_name=toy_city --backbone=dino_tiny --num_workers=0 --resize 56 56".split()


def test_batches_arrive_in_order():
    batches = [[torch.full((3, 2), n), torch.tensor(n)] for n in range(4)]
    moved = list(to_device(batches, CPU))
    assert [[t.tolist() for t in batch] for batch in moved] == [[t.tolist() for t in batch] for batch in batches]
    assert [tensor.item() for tensor in to_cpu(torch.tensor(n) for n in range(4))] == [0, 1, 2, 3]


def test_reading_workers_leave_the_cores_to_a_model_on_the_cpu(monkeypatch):
    for cores, on_cpu, beside_gpu in ((2, 0, 2), (16, 4, 16), (64, 16, 16)):
        monkeypatch.setattr(device_module, "usable_cores", lambda cores=cores: cores)
        assert reading_workers(CPU) == on_cpu and reading_workers(torch.device("cuda")) == beside_gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_cast_once_give_what_autocast_gives(precision):
    torch.manual_seed(0)
    model = build_model(backbone="dino_tiny").eval()
    images, found = torch.randn(3, 3, 56, 56), []
    for cast in (False, True):
        if cast:
            device_module.cast_products(model.backbone, precision)
        with torch.inference_mode(), device_module.autocast(CPU, precision):
            found.append(model.cluster_vectors(images))
    assert torch.equal(*found)
    assert model.backbone.blocks[0].mlp.fc1.weight.dtype == device_module.AUTOCAST.get(precision, torch.float32)
    assert model.backbone.norm.weight.dtype == model.aggregation.conv.weight.dtype == torch.float32


def test_a_containers_quota_of_cores_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda _: set(range(64)))
    found = []
    for text in (None, "max 100000", "150000 100000", "50000 100000", "9900000 100000", "?"):
        if text is not None:
            (tmp_path / "cpu.max").write_text(text)
        found.append(device_module.usable_cores())
    assert found == [64, 64, 2, 1, 64, 64]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_module.usable_cores() == 16


def test_a_gpu_that_cannot_be_used_is_told(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = device_module.Path.exists
    monkeypatch.setattr(device_module.Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or real(path))
    assert device_module.pick_device("cpu") == CPU and not caplog.text
    assert device_module.pick_device("auto") == CPU and "has an NVIDIA GPU, but PyTorch" in caplog.text


def test_peak_memory_on_a_mac_is_in_bytes(monkeypatch):
    on_linux = device_module.peak_memory(CPU)
    monkeypatch.setattr(device_module.sys, "platform", "darwin")
    assert on_linux == pytest.approx(1024 * device_module.peak_memory(CPU), rel=0.1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "settings", [{"backbone": "dino_tiny"}, {"backbone": "dinov3_tiny", "backbone_blocks": 2}], ids=["2", "3"]
)
def test_compiled_blocks_compute_the_same(settings):
    torch.manual_seed(0)
    model = build_model(**settings).eval()
    names = list(model.state_dict())
    batches = [torch.randn(count, 3, 112, 112) for count in (3, 2)]
    with torch.inference_mode():
        plain = [model(images) for images in batches]
        model.backbone.compile_blocks()
        for images, expected in zip(batches, plain, strict=True):
            torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == names, "checkpoints do not change"


@on_gpu
def test_nothing_is_overtaken_on_a_gpu():
    """Each batch is used after its copy, which is late, and handed back after its computation, which is long."""
    cuda = torch.device("cuda")
    heavy = torch.randn(2048, 2048, device=cuda)

    def batches():
        for n in range(60):
            with torch.cuda.stream(device_module._copy_stream(cuda)):
                torch.cuda._sleep(5_000_000)  # clock cycles, some milliseconds
            yield [torch.full((64, 3, 128, 128), n, dtype=torch.uint8).pin_memory()]

    def results():
        for (images,) in to_device(batches(), cuda):
            means = images.flatten(1).float().mean(dim=1)
            for _ in range(4):
                means = means + 0 * (heavy @ heavy).sum()
            yield means

    for number, result in enumerate(to_cpu(results())):
        assert result.tolist() == [number] * 64


@on_gpu
def test_grey_photos_reach_a_gpu(tmp_path):
    Image.new("L", (64, 48), 90).save(tmp_path / "grey.jpg")
    settings = {"batch_size": 1, "num_workers": 0, "device": torch.device("cuda"), "progress": ""}
    (images,) = image_batches([str(tmp_path / "grey.jpg")], transform=evaluation_transform((56, 56)), **settings)
    assert images.shape == (1, 3, 56, 56)


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_on_a_gpu_finds_what_the_cpu_finds(city, tmp_path, precision):
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "weights.pth")
    flags = [*TOY, f"--eval_datasets_folder={city}", f"--resume={tmp_path}/weights.pth", f"--save_dir={tmp_path}/run"]
    found = []
    for device in (["--device=cpu"], ["--device=cuda", f"--precision={precision}"]):
        found += eval_script.run(parse(EvalOptions, [*flags, *device])).values()
    one_query = 100 / 15 + 0.1
    for n, recall in found[0]["file_order"].items():
        assert found[1]["file_order"][n] == pytest.approx(recall, abs=one_query)


@on_gpu
@pytest.mark.parametrize("flags", ["", "--precision=tf32", "--precision=bf16", "--precision=fp16", "--compile"])
def test_training_on_a_gpu_ends_near_the_cpu(city, tmp_path, flags):
    losses = {}
    for device, extra in (("cpu", []), ("cuda", flags.split())):
        folder = tmp_path / device
        train_script.main(
            [*TOY, f"--eval_datasets_folder={city}", "--train_resize", "56", "56", "--epochs_num=2", "--lr=0.0005"]
            + ["--train_batch_size=4", f"--device={device}", f"--save_dir={folder}", "--randaugment_ops=0", *extra]
        )
        (run,) = folder.iterdir()
        with open(run / "metrics.csv", newline="") as file:
            losses[device] = float(list(csv.DictReader(file))[-1]["loss"])
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
