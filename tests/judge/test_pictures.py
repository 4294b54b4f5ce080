"""Pictures of images: where each image stands, and that its colours are its own."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from judge.pictures import GAP, TILE, Film, grid


def few_colours(count, channels, high, wide, seed):
    """Images (count, channels, high, wide) in [0, 1] of 8-bit values, of at most 64 colours."""
    levels = torch.tensor([0, 90, 180, 255]) / 255
    return levels[torch.randint(4, (count, channels, high, wide), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("count", "channels", "high", "wide"), [(1, 3, 8, 8), (3, 1, 8, 8), (9, 3, 6, 8), (2, 3, 9, 97)]
)
def test_every_image_stands_in_its_place_enlarged_by_a_whole_factor(count, channels, high, wide):
    images = few_colours(count, channels, high, wide, seed=0)
    sheet = np.asarray(grid(images))
    factor, gap = -(-TILE // wide), GAP if count > 1 else 0
    for i, image in enumerate(images):
        top, left = (gap + at * (factor * side + gap) for at, side in ((i // 8, high), (i % 8, wide)))
        own = sheet[top : top + factor * high, left : left + factor * wide]
        expected = (image * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
        assert np.array_equal(own, expected.repeat(factor, 0).repeat(factor, 1))
        sheet = sheet.copy()
        sheet[top : top + factor * high, left : left + factor * wide] = 255
    assert (sheet == 255).all()


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (3, 1), (9, 3)])
def test_a_film_shows_the_grids_of_its_frames(tmp_path, count, channels):
    frames, film = [few_colours(count, channels, 8, 8, seed) for seed in range(3)], Film()
    for step, images in enumerate(frames[:2]):
        film.shoot(step, images)
    film.save(tmp_path / "film.gif", frames[2])
    shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "film.gif"))]
    assert len(shown) == 3
    for frame, images in zip(shown, frames, strict=True):
        assert np.array_equal(frame, np.asarray(grid(images)))


@pytest.mark.parametrize(("steps", "frames"), [(300, 50), (25_000, 100)])
def test_a_film_of_more_steps_has_hardly_more_frames(steps, frames):
    film, image = Film(), torch.zeros(1, 1, 1, 1)
    for taken in range(steps + 1):
        film.shoot(taken, image)
    assert len(film.frames) == pytest.approx(frames, abs=6)


def test_a_frame_of_more_colours_than_a_gif_has_is_near_the_true_one(tmp_path):
    images, film = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), Film()
    film.save(tmp_path / "film.gif", images)
    with Image.open(tmp_path / "film.gif") as shown:
        off = np.asarray(shown.convert("RGB")).astype(float) - np.asarray(grid(images))
    assert np.sqrt((off**2).mean()) < 25  # of 255: colours drawn at random are the hardest
