"""The way to the device and back, and what needs a CUDA GPU."""

import shutil

import pytest
import torch
from helpers import SMALL, only_run, results_of, rows_of
from torch._inductor import config as inductor

import train as train_script
from model import build_model
from utils.system import device as device_module
from utils.system.device import reading_workers, to_cpu, to_device

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")


def test_reading_workers_leave_the_cores_to_a_model_on_the_cpu(monkeypatch):
    for cores, on_cpu, beside_gpu in ((2, 0, 2), (16, 4, 16), (64, 16, 16)):
        monkeypatch.setattr(device_module, "usable_cores", lambda cores=cores: cores)
        assert reading_workers(CPU) == on_cpu and reading_workers(torch.device("cuda")) == beside_gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_cast_once_give_what_autocast_gives(precision):
    model = build_model(backbone="dino_tiny").eval()
    images = torch.randn(3, 3, 56, 56)
    with torch.inference_mode(), device_module.autocast(CPU, precision):
        expected = model.cluster_vectors(images)
        device_module.cast_weights(model.backbone, precision)
        assert torch.equal(model.cluster_vectors(images), expected)
    assert model.backbone.blocks[0].mlp.fc1.weight.dtype == device_module.AUTOCAST.get(precision, torch.float32)
    assert model.backbone.norm.weight.dtype == model.aggregation.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(None, 64), ("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64), ("?", 64)],
)
def test_a_containers_quota_of_cores_counts(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(device_module, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda _: set(range(64)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert device_module.usable_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_module.usable_cores() == max(1, cores // 4) and device_module.usable_cores(alone=True) == cores


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, 4),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "1"}, 0),
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "2", "TORCHELASTIC_RUN_ID": "x"}, 0),
    ],
)
def test_processes_that_are_no_run_together_are_told(monkeypatch, caplog, variables, count):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device_module.pick_device("cpu") == CPU
    assert [f"--nproc_per_node={count}" in message for message in caplog.messages] == [True] * bool(count)


def test_a_gpu_that_cannot_be_used_is_told(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = device_module.Path.exists
    monkeypatch.setattr(device_module.Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or real(path))
    assert device_module.pick_device("cpu") == CPU and not caplog.text
    assert device_module.pick_device("auto") == CPU and "--gpus all" in caplog.text
    with pytest.raises(ValueError, match="--device cuda: .* --device cpu"):
        device_module.pick_device("cuda")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("backbone", ["dino_tiny", "dinov3_tiny"])
def test_compiled_blocks_compute_the_same(backbone):
    model = build_model(backbone=backbone, backbone_blocks=1).eval()
    names = list(model.state_dict())
    batches = [torch.randn(count, 3, 112, 112) for count in (3, 2)]
    # More threads are processes, which import PyTorch first.
    with torch.inference_mode(), inductor.patch(compile_threads=1):
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
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_on_a_gpu_finds_what_the_cpu_finds(evaluated, precision):
    expected = results_of(evaluated())["recalls"]
    recalls = results_of(evaluated("--device=cuda", f"--precision={precision}"))["recalls"]
    one_query = 100 / 15 + 0.1
    assert recalls == pytest.approx(expected, abs=one_query)


@on_gpu
@pytest.mark.parametrize("flags", ["", "--precision=tf32", "--precision=bf16", "--precision=fp16", "--compile"])
def test_training_on_a_gpu_ends_near_the_cpu(city, tmp_path, flags):
    losses = {}
    for device, extra in (("cpu", []), ("cuda", flags.split())):
        folder = tmp_path / device
        train_script.main(
            [*SMALL, "--eval_dataset_name=toy_city", f"--eval_datasets_folder={city}", "--train_resize", "56", "56"]
            + ["--epochs_num=2", "--lr=0.0005", "--train_batch_size=4", "--randaugment_ops=0"]
            + [f"--device={device}", f"--save_dir={folder}", *extra]
        )
        losses[device] = float(rows_of(only_run(folder), "metrics.csv")[-1]["loss"])
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
