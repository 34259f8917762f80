"""A folder of images that several tests of stages read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Forty images in two classes, PNG and JPEG, of several sizes; the classes can be told apart."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 8)):
        for label, level in (("dark", 60), ("light", 190)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                shape = (int(generator.integers(9, 13)), int(generator.integers(9, 13)), 3)
                pixels = np.clip(generator.normal(level, 40, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder
