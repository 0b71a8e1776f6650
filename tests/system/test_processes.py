"""What a process takes for its own: its share of the images, its random numbers."""

import random

import numpy as np
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
    """One that is not there is told."""
    assert generator_states()["cuda"] is None and restore_generators(generator_states())
    state, put_back = torch.arange(16, dtype=torch.uint8), []
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_rng_state", lambda: state)
        gpu.setattr(torch.cuda, "set_rng_state", put_back.append)
        states = generator_states()
        assert restore_generators(states) and torch.equal(put_back[0], state)
        assert not restore_generators({**states, "cuda": None}) and len(put_back) == 1
    assert not restore_generators(states)
