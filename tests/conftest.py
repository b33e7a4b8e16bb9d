"""What holds for all tests: the order they run in, and that a busy machine fails none."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

FIRST = ("test_quality.py", "test_wheel.py")
"""Two processes share the tests, and what takes longest must not begin last."""

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
