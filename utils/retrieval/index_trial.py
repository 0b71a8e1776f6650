"""Tests whether FAISS can build, train and search an index, before hours of extraction.

The index is tried on random descriptors in a separate process, since some descriptions make FAISS abort the program.
"""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from . import faiss_index

logger = logging.getLogger(__name__)

FEW, MANY = 1000, 8192  # descriptors tried first, and at most if an index needs more
LISTS = 256  # lists tried for an index with too many to try
SECONDS = 120  # time limit of a trial


def require_index(factory: str, parameters: str, *, dim: int, count: int, chunks: int, k: int) -> None:
    """Tries an index as `search.nearest_by_index` will use it.

    Args:
        factory: FAISS's description of it, e.g. "IVF4096,PQ64".
        parameters: search parameters, e.g. "nprobe=32".
        dim: dimension of a descriptor.
        count: size of the database.
        chunks: number of chunks of the database.
        k: neighbours per query.

    Raises:
        ValueError: FAISS refuses it or crashes.
    """
    trained_on = count // faiss_index.training_step(count, dim)
    smaller = re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), LISTS)}", factory)
    rows, tried = min(trained_on, FEW), factory
    while error := _error_of(tried, parameters, dim, rows, min(chunks, 2), k):
        wanted = re.search(r"number of clusters \((\d+)\)|cannot output (\d+) dimensions", error)
        needed = int(wanted[1] or wanted[2]) if wanted else dim  # OPQ crashes with fewer descriptors than dimensions
        if not rows < needed <= trained_on:
            # Report the database's number, which is too small as well, instead of the trial's.
            raise ValueError(re.sub(rf"\b{rows}\b", str(trained_on), error) if needed > trained_on else error)
        # The database has enough, unlike the trial.
        if needed <= MANY:
            rows = needed
        elif tried != smaller:
            tried = smaller
        else:
            return


def _error_of(factory: str, parameters: str, dim: int, rows: int, chunks: int, k: int) -> str:
    """What is wrong with the index; empty if it works, or takes too long to try."""
    task = json.dumps([factory, parameters, dim, rows, chunks, k])
    command = [sys.executable, "-m", __name__, task]
    try:
        child = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # many small tasks, in which threads mostly wait
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        logger.warning("--index %s could not be tried in %d s: it may still fail after extraction", factory, SECONDS)
        return ""
    if child.returncode == 0:
        return str(json.loads(child.stdout.splitlines()[-1]))
    said = [line for line in child.stderr.strip().splitlines() if not line.startswith("WARNING")]
    last = (said or [f"exit status {child.returncode}"])[-1]
    return (
        f"FAISS crashes with --index {factory!r} {parameters!r}: {last}; use another, or leave out --index for exact "
        "search"
    )


def _try(factory: str, parameters: str, dim: int, rows: int, chunks: int, k: int) -> str:
    made = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    try:
        index = faiss_index.new_index(dim, factory, parameters)
        _hurry(index)
        faiss_index.train_index(index, made, factory)
        for part in np.array_split(made, chunks):
            faiss_index.add_to_index(index, part, factory)
        faiss_index.search_index(index, made[:10], min(k, rows), factory, parameters)
    except ValueError as error:
        return str(error)
    return ""


def _hurry(index: Any) -> None:
    """Makes an index, and those within it, train in one iteration: requirements do not depend on the number."""
    index = faiss.downcast_index(index)
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
    for owner in (index, *(getattr(index, name) for name in ("pq", "rq", "lsq") if hasattr(index, name))):
        if hasattr(owner, "cp"):
            owner.cp.niter = 1
        if hasattr(owner, "train_iters"):
            owner.train_iters = 1
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            transform: Any = faiss.downcast_VectorTransform(chain.at(number))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = transform.niter_pq = transform.niter_pq_0 = 1
    for name in ("index", "base_index", "quantizer", "storage"):
        within = getattr(index, name, None)
        if isinstance(within, faiss.Index):
            _hurry(within)


if __name__ == "__main__":
    print(json.dumps(_try(*json.loads(sys.argv[1]))))
