"""Runs eval.py, where every process searches its share of any database, which comes in chunks of a batch.

Under torchrun: python searched_by_all.py FLAG [FLAG ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval as eval_script
from utils.retrieval import contexts as retrieval
from utils.retrieval import extraction

retrieval.SEARCHED_BY_ALL = 1
extraction.CHUNK_BYTES = extraction.ENCODED_TOGETHER = 1
eval_script.main(sys.argv[1:])
