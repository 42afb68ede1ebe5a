from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest


class RedisServer:
    """A redis-server on a socket of its own, which keeps what it was told through `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import redis

        options = {"port": "0", "unixsocket": self.socket, "dir": self.folder, "save": "", "appendonly": "yes"}
        options["appendfsync"] = "always"
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                if self.client().ping():
                    return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline and self.process.poll() is None, "redis-server does not start"
                time.sleep(0.02)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self):
        import redis

        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory):
    pytest.importorskip("redis", reason='needs pip install "fastmem[redis]"')
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server (Debian: redis-server)")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(shared_redis):
    """A running, empty server."""
    if shared_redis.process.poll() is not None:
        shared_redis.start()
    shared_redis.client().flushall()
    return shared_redis
