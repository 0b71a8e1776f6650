"""Scripts of this folder in processes that have the imports behind them.

Importing PyTorch, torchvision, FAISS and the rest takes 4 s of processor time. A server does it once for a session of
tests; each process is forked from it, leads a process group of its own, and ends as any other: by itself, or by the
signal that is sent to it. What a start from cold is like, some tests ask with a command instead.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# The last ones the scripts import as they come to need them.
PRELOADED = ["train", "eval", "sklearn.metrics", "sklearn.neighbors", "matplotlib.backends.backend_agg"]


def run(script, *arguments, timeout=120):
    """As `subprocess.run([sys.executable, script, *arguments])`: exit status, what was written, the process's id."""
    return _run(script, arguments, [{}], timeout)


def torchrun(script, *arguments, processes=2, timeout=120):
    """As `torchrun --standalone`, to the processes: their store lies elsewhere, and their environment says so."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    shared |= {"MASTER_ADDR": store.host, "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    shared |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return _run(script, arguments, ranks, timeout)


def start(script, *arguments, stderr, environment=()):
    """A process that runs a script and writes what it says into a file; None closes its standard error."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    with chdir(ROOT):  # where it finds them
        forkserver.ensure_running()
    path = str(Path(__file__).parent / script)
    process = CONTEXT.Process(target=_become, args=(path, [*map(str, arguments)], dict(environment), stderr))
    process.start()
    return process


def _run(script, arguments, environments, timeout):
    with tempfile.NamedTemporaryFile("r", errors="backslashreplace") as output:
        processes = [start(script, *arguments, stderr=output.name, environment=each) for each in environments]
        try:
            for process in processes:
                process.join(timeout)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [code for code in codes if code != 0]  # None: it has not ended
        return SimpleNamespace(returncode=failed[0] if failed else 0, stderr=output.read(), pid=processes[0].pid)


def _become(path, arguments, environment, stderr):
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # that of its own children is again the one that users have
    os.environ.update({name: str(value) for name, value in environment.items()})
    if stderr is None:
        os.close(2)
    else:
        file = os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        for standard in (1, 2):
            os.dup2(file, standard)
        os.close(file)
    sys.argv = [path, *arguments]
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code
    sys.exit(status)  # not before the error has let go of all: what reads photos would be waited for
