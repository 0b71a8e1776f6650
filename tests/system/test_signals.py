"""A job that is told to stop keeps its promises: with reading processes, as users run it and as schedulers stop it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import warm
from helpers import SMALL, only_run, refusal
from test_resume import assert_same, outcome

import train as train_script
from datasets import check
from utils.run.preemption import Preemption
from utils.system.signals import SIGNALS

pytestmark = pytest.mark.slow

TOY = [*SMALL, "--eval_dataset_name=toy_city"]
TRAINING = [*TOY, *"--backbone_blocks=2 --freeze_te=1 --crossimage_encoder --train_resize 56 56".split()]
TRAINING += "--train_batch_size=4 --lr=0.001 --epochs_num=3".split()
ROOT = Path(train_script.__file__).parent


def running(belongs):
    """Command lines of the processes whose folder in /proc satisfies a condition."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if belongs(folder):
                commands.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return commands


def marked(mark):
    return running(lambda folder: mark.encode() in (folder / "environ").read_bytes())


def run_stopped(*arguments):
    """The finished job, and the processes that it left behind."""
    job = warm.run("stopped.py", *arguments)
    return job, running(lambda folder: os.getsid(int(folder.name)) == job.pid)


def steps_in(save_dir):
    """Epochs and steps of the epoch under way in the checkpoint that a job left."""
    content = torch.load(only_run(save_dir) / "last_model.pth", weights_only=True)
    return content["epoch_num"], len(content["losses"])


def read_until(word, pipe):
    """What a job wrote until a word came."""
    shown = b""
    while word not in shown and (more := os.read(pipe, 10_000)):
        shown += more
    return shown


@pytest.mark.parametrize(
    ("whom", "name", "point", "count", "workers", "done"),
    [
        ("group", "SIGTERM", "step", 2, 2, (0, 2)),
        ("group", "SIGINT", "step", 5, 1, (1, 1)),
        ("group", "SIGHUP", "batch", 2, 2, (0, 4)),  # in the first validation
        ("self", "SIGUSR1", "step", 3, 0, (0, 3)),
    ],
)
def test_a_training_job_finishes_its_step(city, tmp_path, whom, name, point, count, workers, done):
    flags = [*TRAINING, f"--eval_datasets_folder={city}", f"--num_workers={workers}", f"--save_dir={tmp_path}"]
    job, left = run_stopped(f"{whom} {name} {point} {count}", "train", *flags, "--resume=auto")
    assert job.returncode == 128 + signal.Signals[name], job.stderr
    assert steps_in(tmp_path) == done and not left
    assert "Traceback" not in job.stderr and "killed by signal" not in job.stderr
    assert f"\n{name}: finishing the current step" in job.stderr
    folder = only_run(tmp_path)
    last = f"stopped by {name}: training is saved in {folder}/last_model.pth; run the same command to resume it"
    assert last in job.stderr and last in (folder / "info.log").read_text()


def test_a_preempted_a_killed_and_a_restarted_run_end_with_the_same_bits(city, tmp_path):
    """Of two processes the second alone is told to stop, and later killed; torchrun starts both again, and is then told
    to stop itself."""
    flags = [*TRAINING, f"--eval_datasets_folder={city}", "--checkpoint_every=2", "--epochs_num=2", "--resume=auto"]
    flags += ["--encoder_training=every_step"]  # whose dropout differs between the processes
    never, whole = "self SIGKILL step 1000", tmp_path / "whole"
    run = warm.torchrun("stopped.py", never, "train", *flags, f"--save_dir={whole}")
    assert run.returncode == 0, run.stderr
    save_dir = tmp_path / "stopped"
    flags += [f"--save_dir={save_dir}", "--num_workers=1"]
    run = warm.torchrun("stopped.py", "other SIGTERM step 3", "train", *flags)
    assert run.returncode == 143 and steps_in(save_dir) == (0, 3), run.stderr
    mark, plans = uuid.uuid4().hex, "other SIGKILL stepped 4,parent SIGTERM step 1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    run = subprocess.run(
        [*command, str(Path(__file__).parents[1] / "stopped.py"), plans, "train", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        env={**os.environ, "MARK": mark},
    )
    assert run.returncode != 0 and "exitcode: -9" in run.stderr and not marked(mark), run.stderr
    assert "killed by signal" not in run.stderr and run.stderr.count("stopped by SIGTERM: training is saved") == 1
    assert steps_in(save_dir) == (1, 3), "killed in the step after the checkpoint of the second, which is taken again"
    run = warm.torchrun("stopped.py", never, "train", *flags)
    assert run.returncode == 0, run.stderr
    assert_same(outcome(save_dir), outcome(whole))


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 2), ("SIGINT", 1)])
def test_an_extraction_stops_in_one_line(city, weights, tmp_path, name, workers):
    flags = [*TOY, f"--eval_datasets_folder={city}", f"--resume={weights}/plain.pth", f"--save_dir={tmp_path}"]
    job, left = run_stopped(f"group {name} batch 3", "eval", *flags, f"--num_workers={workers}")
    assert job.returncode == 128 + signal.Signals[name] and not left, job.stderr
    assert "Traceback" not in job.stderr and "killed by signal" not in job.stderr
    folder = only_run(tmp_path)
    assert f"stopped by {name}: the same command with --descriptors_folder={folder}/extracted" in job.stderr
    left_there = {path.name for path in folder.iterdir() if path.name[0] != "."}
    assert left_there == {"info.log", "debug.log", "options.txt", "extracted"}


@pytest.mark.parametrize("signum", SIGNALS)
def test_each_signal_is_noted_and_its_handler_put_back(signum, capfd):
    before = signal.signal(signum, signal.default_int_handler)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signum)
            assert preemption.signum == signum and preemption.agreed()
            os.kill(os.getpid(), signum)  # the copy that torchrun passes on
            with pytest.raises(SystemExit) as exit_:
                preemption.stop()
        assert exit_.value.code == 128 + signum and signal.getsignal(signum) == signal.default_int_handler
        assert capfd.readouterr().err.startswith(f"\n{signum.name}: finishing the current step")
        signal.signal(signum, signal.SIG_IGN)  # as nohup sets it
        with Preemption() as preemption:
            os.kill(os.getpid(), signum)
            assert (preemption.signum is None) == (signum == signal.SIGHUP)
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(
    "words",
    ["train.py --eval_datasets_folder={0}", "-m datasets.to_gsv_cities {0} --output={0}.out", "-m datasets.check {0}"],
    ids=lambda words: words.split(" -")[0],
)
def test_ctrl_c_while_the_script_starts_shows_no_traceback(tmp_path, words):
    command = [sys.executable, "-v", *words.format(tmp_path).split()]
    job = subprocess.Popen(command, cwd=Path(train_script.__file__).parent, stderr=subprocess.PIPE)
    shown = b""
    while b"import 'torch'" not in shown and b"torch/__init__" not in shown:
        shown += os.read(job.stderr.fileno(), 100_000)
    job.send_signal(signal.SIGINT)
    assert b"Traceback" not in job.stderr.read() and job.wait() == -signal.SIGINT


def test_a_second_ctrl_c_ends_at_once(capfd):
    if (child := os.fork()) == 0:
        try:
            with Preemption():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                os.write(1, b"still here")
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGINT)
                os.write(1, b"not here")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    shown = capfd.readouterr()
    assert os.WTERMSIG(status) == signal.SIGINT and shown.out == "still here"
    assert "Ctrl-C again ends at once" in shown.err


def test_one_process_that_stops_in_validation_ends_the_others_without_a_traceback(city, tmp_path):
    flags = [*TRAINING, f"--eval_datasets_folder={city}", "--num_workers=0", f"--save_dir={tmp_path}"]
    job = warm.torchrun("stopped.py", "self SIGTERM batch 2", "train", *flags, "--extraction_batch_size=1")
    assert job.returncode != 0 and steps_in(tmp_path) == (0, 4)
    assert "stopped by SIGTERM: training is saved" in job.stderr and "Traceback" not in job.stderr


@pytest.mark.parametrize(
    ("signum", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGKILL, False)]
)
def test_a_pool_of_processes_ends_with_the_program(tmp_path, signum, whole_group):
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "datasets.toy_city", f"--output={tmp_path}", "--workers=2", "--size", "64", "48"]
    job = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "MARK": mark}, stderr=subprocess.PIPE, start_new_session=True
    )
    shown = read_until(b"street/s", job.stderr.fileno())
    os.killpg(job.pid, signum) if whole_group else job.send_signal(signum)
    _, rest = job.communicate(timeout=30)  # which ends when no process has the pipe any more
    assert job.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert b"Traceback" not in shown + rest
    for _ in range(100):
        if not marked(mark):
            break
        time.sleep(0.1)
    assert not marked(mark)
    assert not list(tmp_path.iterdir()) or signum == signal.SIGKILL


def test_processes_of_a_pool_without_a_task_end_with_the_program():
    mark = uuid.uuid4().hex
    code = """
import time
from utils.system.signals import mapped, process_pool
if __name__ == "__main__":
    with mapped(process_pool(3), time.sleep, [60]) as results:
        print("started", flush=True)
        next(results)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "MARK": mark}, **pipes)
    assert job.stdout.readline() == b"started\n" and len(marked(mark)) == 4
    job.kill()
    job.communicate(timeout=30)
    assert not marked(mark)


@pytest.mark.parametrize("lost", ["terminal", "pipe", "closed"])
def test_a_lost_terminal_costs_nothing(city, tmp_path, lost):
    """As ssh hangs up: SIGHUP comes, and the terminal takes nothing more; as `| tee` ends by Ctrl-C."""
    flags = [*TRAINING, f"--eval_datasets_folder={city}", "--num_workers=1", f"--save_dir={tmp_path}", "--resume=auto"]
    command = ["stopped.py", "self SIGHUP step 6", "train", *flags]
    reading, writing = os.openpty() if lost == "terminal" else os.pipe()
    job = warm.start(*command, stderr=None if lost == "closed" else f"/proc/{os.getpid()}/fd/{writing}")
    if lost != "closed":
        read_until(b"epoch=01", reading)
    os.close(writing)
    os.close(reading)
    job.join(120)
    assert job.exitcode == 128 + signal.SIGHUP
    assert steps_in(tmp_path) == (1, 2)
    assert "stopped by SIGHUP: training is saved in" in (only_run(tmp_path) / "info.log").read_text()


def test_a_reading_process_that_is_killed_is_one_line(city, tmp_path, monkeypatch, capsys):
    """PyTorch tells of it wherever the main process is."""
    real = train_script.Optimization.step

    def step(self):
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        return real(self)

    monkeypatch.setattr(train_script.Optimization, "step", step)
    flags = [*TRAINING, f"--eval_datasets_folder={city}", "--num_workers=1", f"--save_dir={tmp_path}"]
    line = refusal(capsys, lambda: train_script.main(flags), status=1)
    assert "killed" in line and "--num_workers" in line


def test_other_threads_leave_signals_to_the_program(city, evaluated, tmp_path):
    """As notebooks and servers call the programs."""
    training = [*TRAINING, "--epochs_num=1", "--num_workers=1", f"--eval_datasets_folder={city}"]
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(train_script.main, [*training, f"--save_dir={tmp_path}/train"]).result() == 0
        assert (thread.submit(evaluated, "--num_workers=1").result() / "results.json").exists()
        assert thread.submit(check.main, [f"{city}/toy_city", "--workers=1"]).result() == 0
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
