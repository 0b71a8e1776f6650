"""What a process takes for its own: its share of the images, its random numbers."""

import random

import numpy as np
import pytest
import torch

from utils.system import distributed
from utils.system.seed import generator_states, restore_generators, seed_everything


def test_shares_are_neighbours_and_keep_units_whole(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert distributed.shares(7) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert distributed.shares(2) == [slice(0, 1), slice(1, 2), slice(2, 2)]
    assert distributed.shares(0) == 3 * [slice(0, 0)]
    assert distributed.shares(70, unit=16) == [slice(0, 32), slice(32, 64), slice(64, 70)]
    assert distributed.shares(10, unit=16) == [slice(0, 10), slice(10, 10), slice(10, 10)]


@pytest.mark.parametrize(("rank", "unit", "rows"), [(0, 1, [*range(7)]), (1, 1, [4, 5, 6]), (0, 7, [*range(7)])])
def test_the_main_process_gets_the_rows_of_all_shares(monkeypatch, rank, unit, rows):
    def gather_object(own, parts, dst):
        if parts:
            parts[:] = [np.arange(7)[share] for share in distributed.shares(7, unit)]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed.dist, "gather_object", gather_object)
    assert distributed.gather_shares(7, lambda share: np.arange(7)[share], unit).tolist() == rows


def test_seeds_and_states_are_of_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    first, states, second = draw(), generator_states(), draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert draw() != first
    restore_generators(states)
    assert draw() == second


def test_a_gpu_keeps_the_state_of_its_own_generator(monkeypatch):
    """Of the process's own GPU, whatever the number of GPUs of the machine; one that is not there is told."""
    assert generator_states()["cuda"] is None and restore_generators(generator_states())
    state, put_back = torch.arange(16, dtype=torch.uint8), []
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_rng_state", lambda: state)
        gpu.setattr(torch.cuda, "set_rng_state", put_back.append)
        gpu.setattr(distributed, "local_rank", lambda: 1)
        states = generator_states()
        assert restore_generators(states) and torch.equal(put_back[0], state)
        assert restore_generators({**states, "cuda": [state[:8], state[8:]]}) and torch.equal(put_back[1], state[8:])
        assert not restore_generators({**states, "cuda": [state]}), "an earlier version's file, of one GPU"
        assert not restore_generators({**states, "cuda": None}) and len(put_back) == 2
    assert not restore_generators(states)
