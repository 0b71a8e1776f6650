"""The pictures of what the VLAD layer looks at."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import build_model
from utils.outputs.assignments import COLOURS, GHOST, coloured, draw_assignments


def assigned(rows, clusters, size=(60, 80)):
    """A white photo (height, width) whose patches belong to the clusters that the rows of numbers say."""
    assignment = np.full((clusters, len(rows), len(rows[0])), 0.1 / clusters, dtype=np.float32)
    for y, row in enumerate(rows):
        for x, cluster in enumerate(row):
            assignment[cluster, y, x] += 0.9
    return "query 3", np.full((*size, 3), 255, dtype=np.uint8), assignment


def test_patches_have_their_clusters_colour_where_they_are():
    picture = coloured(*assigned([[0, 1, 2], [2, 2, 1]], clusters=3)[1:], ghost_clusters=1)
    assert picture.shape == (60, 80, 3)
    expected = {(5, 5): COLOURS[0], (5, 40): COLOURS[1], (5, 75): GHOST, (55, 5): GHOST, (55, 75): COLOURS[1]}
    for (y, x), colour in expected.items():
        np.testing.assert_allclose(picture[y, x] * 255, colour, atol=1)


@pytest.mark.parametrize(("clusters", "ghosts"), [(3, 2), (65, 0)])
@pytest.mark.drawn
def test_a_picture_is_drawn(tmp_path, clusters, ghosts):
    photos = [assigned([[0, 1], [2, 1]], clusters)]
    if ghosts:
        photos.append(assigned([[2, 1], [0, 0]], clusters, size=(3000, 40)))
        photos.append((f"query 1: a$b$c\udcff\n{'long' * 30}.jpg", *assigned([[0]], clusters, size=(6, 9000))[1:]))
    draw_assignments(tmp_path / "picture.png", photos, ghost_clusters=ghosts)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 600 and picture.height > 200
        found = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    if clusters <= 7:
        assert (COLOURS[0] in found) and (COLOURS[1] in found) == (clusters - ghosts > 1)
    assert (GHOST in found) == bool(ghosts and clusters - ghosts <= 2)


def test_assignments_of_the_network():
    model = build_model(backbone="dino_tiny", clusters=3, ghost_clusters=2).eval()
    with torch.inference_mode():
        images = torch.randn(2, 3, 56, 70)
        assignments = model.assignments(images)
        assert assignments.shape == (2, 5, 4, 5)
        torch.testing.assert_close(assignments.sum(dim=1), torch.ones(2, 4, 5))
        # What the layer sums up is weighted by it.
        features = torch.nn.functional.normalize(model.backbone(images), dim=1)
        vectors = torch.einsum("bkhw,bdhw->bkd", assignments[:, :3], features)
        vectors = torch.nn.functional.normalize(torch.nn.functional.normalize(vectors, dim=2).flatten(1), dim=1)
        torch.testing.assert_close(model(images), vectors, rtol=0, atol=1e-6)
