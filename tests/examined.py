"""Data and models whose per-client metrics the tests compute by hand."""

from __future__ import annotations

import numpy as np
import torch

import fedsim
from fedsim.data import Dataset, Dirichlet
from fedsim.problems.models import Logistic
from fedsim.rng import Randomness


def points(n=300, classes=5, seed=0):
    """Examples around one centre per class, the first 60 of them for the test."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(classes, size=n + 60))
    centres = torch.from_numpy(rng.normal(size=(classes, 6)))
    x = (centres[labels] + torch.from_numpy(rng.normal(size=(n + 60, 6)))).float()
    return Dataset(x[60:], labels[60:], x[:60], labels[:60], classes)


PARTS = ("training", "test", "validation")
POINTS = points()


def problem(partition=None, data=POINTS, **settings):
    return fedsim.Classification(data, Logistic(), partition or Dirichlet(alpha=0.3), **settings)


def prepared(clients=20, seed=0, **settings):
    made = problem(**settings)
    made.prepare(clients, Randomness(seed))
    return made


def parts_of(made, client):
    return {part: made.part_rows(np.array([client]), part).tolist() for part in PARTS}


def logits(x, images):
    """Logistic regression by hand, the weights ``[5, 6]`` first."""
    return images @ x[:30].reshape(5, 6).T + x[30:]


def by_hand(made, x, client, part):
    """Mean cross-entropy and share of right answers in float64; NaN of none."""
    rows = parts_of(made, client)[part]
    scores = logits(x.double(), made.train_x[rows].double()).numpy()
    labels = made.train_y[rows].numpy()
    if not rows:
        return np.nan, np.nan
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(rows)), labels]
    return losses.mean(), (scores.argmax(axis=1) == labels).mean()
