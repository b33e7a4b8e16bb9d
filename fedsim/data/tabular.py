"""Tables with two classes, read from files that other packages bring along; none of their code is run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.checks import ConfigError
from fedsim.data.packages import package_path
from fedsim.data.sources import Dataset, fixed_split

Features = NDArray[np.float64]

CENSUS = {
    "age": "number",
    "workclass": "name",
    "education": "name",
    "education-num": "number",
    "marital-status": "name",
    "occupation": "name",
    "relationship": "name",
    "ethnicity": "name",
    "gender": "name",
    "capital-gain": "number",
    "capital-loss": "number",
    "hours-per-week": "number",
}
"""The census file's features: numbers, or names that become one 0/1 feature each."""


class BreastCancer:
    """Wisconsin diagnostic breast cancer: 569 tumours, 30 measurements, malignant (0) or benign (1).

    456 training and 113 test examples ``[n, 30]``, a fixed split with equal shares of the classes; every feature in
    units of its standard deviation about its mean, both of the training examples. No natural clients. Source: Street,
    Wolberg and Mangasarian 1993, as the package scikit-learn carries it.
    """

    package = "scikit-learn"
    """The distribution they come from."""

    def load(self) -> Dataset:
        """The examples.

        Raises:
            ConfigError: if there is no scikit-learn, or its file is another one.
        """
        file = package_path("breast_cancer", "sklearn", "datasets/data/breast_cancer.csv", "scikit-learn==1.9.1")
        first, *rows = _rows(file)
        if first != ["569", "30", "malignant", "benign"] or {len(row) for row in rows} != {31} or len(rows) != 569:
            raise ConfigError(f"data=breast_cancer: {file} is not the table of scikit-learn 1.9.1")
        table = np.array(rows, dtype=np.float64)
        return _split("breast_cancer", table[:, :30], table[:, 30].astype(np.int64), numbers=30)


class Adult:
    """Census of 1994: does a person earn more than 50,000 dollars a year (1, 24 % of all) or not (0)?

    26,049 training and 6,512 test examples ``[n, 65]``, a fixed split with equal shares of the classes. They are the
    32,561 training rows of the UCI set "Adult" without its columns ``fnlwgt`` and ``native-country``. First come the
    5 numbers, in units of their standard deviation about their mean, both of the training examples; then one 0/1
    feature for every value of the 7 other columns, as in LIBSVM's ``a9a`` (which cuts the numbers into quantiles
    instead). An unknown value, ``?``, is a value like others. The natural client of an example is the occupation, 0 to
    14 in alphabetical order; it is among the features too. Source: Kohavi 1996, as the package xai 0.3.0 carries it.
    """

    package = "xai"
    """The distribution they come from."""

    def load(self) -> Dataset:
        """The examples.

        Raises:
            ConfigError: if there is no xai, or its file is another one.
        """
        file = package_path("adult", "xai", "data/census.csv", "xai==0.3.0")
        header, *rows = _rows(file)
        if header != ["", *CENSUS, "loan"] or {len(row) for row in rows} != {14} or len(rows) != 32561:
            raise ConfigError(f"data=adult: {file} is not the table of xai 0.3.0")
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        numbers = [np.array(columns[name], dtype=np.float64) for name, kind in CENSUS.items() if kind == "number"]
        names = [_one_hot(columns[name]) for name, kind in CENSUS.items() if kind == "name"]
        x = np.column_stack([*numbers, *names])
        y = _codes(columns["loan"])  # "<=50K" comes before ">50K"
        ids = _codes(columns["occupation"])
        return _split("adult", x, y, len(numbers), ids)


def _rows(file: Path) -> list[list[str]]:
    """The cells of a csv file, without the blanks around them."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [[cell.strip() for cell in row] for row in csv.reader(lines)]


def _codes(column: Sequence[str]) -> NDArray[np.int64]:
    """``[n]``: the place of each value among all that occur, in alphabetical order."""
    place = {value: code for code, value in enumerate(sorted(set(column)))}
    return np.array([place[value] for value in column], dtype=np.int64)


def _one_hot(column: Sequence[str]) -> Features:
    """``[n, values]``: 1 where an example has the value, values in alphabetical order."""
    codes = _codes(column)
    return np.eye(codes.max() + 1)[codes]


def _split(name: str, x: Features, y: NDArray[np.int64], numbers: int, ids: NDArray[np.int64] | None = None) -> Dataset:
    """Standardised features, split by :func:`fixed_split`.

    Args:
        name: what error lines call these data.
        x: ``[n, features]``.
        y: ``[n]`` classes.
        numbers: how many features, the first ones, are to be standardised.
        ids: ``[n]`` natural clients, if there are such.
    """
    train, test = fixed_split(y)
    mean, deviation = x[train, :numbers].mean(axis=0), x[train, :numbers].std(axis=0)
    x = np.column_stack([(x[:, :numbers] - mean) / deviation, x[:, numbers:]])
    examples = torch.from_numpy(x.astype(np.float32))
    labels = torch.from_numpy(y)
    train_ids = None if ids is None else torch.from_numpy(ids[train])
    return Dataset(examples[train], labels[train], examples[test], labels[test], 2, name, train_ids)
