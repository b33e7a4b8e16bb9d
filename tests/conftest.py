"""The order of the tests: two processes share them, and what takes longest must not begin last."""

from __future__ import annotations

import pytest

FIRST = ("test_quality.py", "test_wheel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
