"""What holds for all tests: the order they run in, and that none fails because of where they run."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

FIRST = ("test_quality.py", "test_wheel.py", "test_readme.py", "test_deploy_real.py", "test_notebooks.py")
"""Two processes share the tests, and what takes longest must not begin last."""

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
