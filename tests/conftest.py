"""What holds for all tests: the order they run in, what they share, and that none fails because of where they run."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from fedsim import LocalSGD
    from fedsim.pool.ray import RayPool

FIRST = ("test_quality.py", "test_wheel.py", "test_readme.py", "test_deploy_real.py", "test_notebooks.py")
"""Two processes share the tests, and what takes longest must not begin last."""

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported by now stays, and need not be looked through again and again


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def choices_are_composed_once() -> Iterator[None]:
    """Hydra takes a quarter of a second to put choices together, which is longer than many a run."""
    from shared_choices import sharing

    from fedsim import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_composed", sharing(config._composed))
        yield


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and without that nobody can tell; ``test_synced`` sees that it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


# ---- Ray, which takes a second to import -------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests of a file; pools find it running and leave it running."""
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture
def all_that_is_submitted_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks as short as those of tests would soon be trained by the driver itself: see test_pool_trips.py."""
    monkeypatch.setattr("fedsim.pool.ray.Trips.are_worth_it", lambda *_: True)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as on another machine, who reach nothing of the driver's."""
    monkeypatch.setattr("fedsim.pool.crew.new_region", lambda: None)


@pytest.fixture
def opened() -> Iterator[Callable[..., RayPool]]:
    """Makes pools that train a small quadratic problem with the job ``main``, and closes them."""
    from support import quadratic

    from fedsim import LocalSGD
    from fedsim.pool.ray import RayPool
    from fedsim.rng import Randomness

    pools: list[RayPool] = []

    def make(rule: LocalSGD | None = None, **settings: Any) -> RayPool:
        pool = RayPool(**settings)
        pool.open(quadratic(), {"main": rule or LocalSGD(steps=1)}, Randomness(0))
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()
