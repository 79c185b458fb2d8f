"""``broadsheet serve`` as a person starts it: it says where to look, refuses a taken port, logs, and ends when told to."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
BROADSHEET = [sys.executable, "-c", "from broadsheet.cli import app; app()"]


@contextmanager
def started(home, *options, **environment):
    """A server of its own process: (its address, a function that ends it and gives what it wrote on the terminal)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*BROADSHEET, "serve", "--port", str(port), *options],
        env=os.environ | {"BROADSHEET_HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def ended():
        process.send_signal(signal.SIGTERM)
        written, _ = process.communicate(timeout=60)
        return written

    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "it does not open"
            try:
                httpx.get(f"{base}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield base, ended
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def home(stocked, tmp_path):
    shutil.copytree(stocked, tmp_path / "home")
    return tmp_path / "home"


def test_a_taken_port_is_refused_in_one_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = subprocess.run(
            [*BROADSHEET, "serve", "--port", str(port)],
            env=os.environ | {"BROADSHEET_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert refused.returncode == 2
    assert re.fullmatch(rf"broadsheet: .*port {port} .*choose another --port\n", refused.stderr)
    assert not (tmp_path / "home").exists()  # nothing was made for a server that cannot start


@pytest.mark.slow
def test_it_says_where_to_look_and_ends_when_told_to(home):
    with started(home) as (base, ended):
        assert "Broadsheet" in httpx.get(base).text
        written = ended()
    assert f"open at {base}" in written
    assert re.search(r"broadsheet\.access: GET / 200 [\d.]+ ms", written)


@pytest.mark.slow
def test_json_logs_are_an_object_on_each_line(home):
    with started(home, "--log", "json") as (base, ended):
        httpx.get(f"{base}/nothing%0d%0aforged")
        lines = [json.loads(line) for line in ended().splitlines()]
    asked = next(line for line in lines if line.get("status") == 404)
    assert (asked["method"], asked["path"], asked["level"]) == ("GET", "/nothing\r\nforged", "INFO")
    assert {"at", "level", "logger"} <= set.intersection(*(set(line) for line in lines))


@pytest.mark.slow
def test_several_workers_serve_one_feed_and_count_together(home):
    with started(home, "--workers", "2", "--quiet") as (base, ended):
        for _ in range(30):  # each over a connection of its own, so that both workers have some
            assert httpx.get(f"{base}/about").status_code == 200
        counted = httpx.get(f"{base}/metrics").text
        written = ended()
    assert re.search(r'broadsheet_requests_total\{.*route="/about".*\} 30\.0', counted)
    assert "GET /about" not in written


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_run_opens_the_feed():
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "run"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.stdout.splitlines()[-1].endswith("/broadsheet serve")
