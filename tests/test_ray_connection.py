"""Whether there is a Ray to work with is told at once, and inline runs never look for one."""

from __future__ import annotations

import http.server
import re
import threading
import time

import pytest
import ray

import fedsim
from fedsim.cli import main
from fedsim.pool.connection import _refuse_silent


def test_far_more_workers_than_cores_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pool=ray", "pool.workers=4000", "out=never"]) == 2
    assert re.search(r"pool.workers=4000: must be from 1 to \d+ here, 8 for each core", capsys.readouterr().err)
    assert not ray.is_initialized()


def test_a_port_where_something_else_answers_is_refused_at_once() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(fedsim.ConfigError, match="no Ray there"):
            _refuse_silent(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert time.monotonic() - began < 10
