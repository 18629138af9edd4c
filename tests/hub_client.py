"""Who uses the Hub of `hub_server`: fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

from hub_server import FakeHub

TOKEN, OTHER = "hf_mine", "hf_other"

# Nothing but loopback may be connected to, whatever the libraries have in mind.
GUARD = """
import socket
def connect(self, address, connect=socket.socket.connect):
    assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1"), f"another address: {address}"
    return connect(self, address)
socket.socket.connect = connect
"""


class Client:
    """Runs code in a fresh process, as a user with a cache and perhaps a token."""

    def __init__(self, server: FakeHub, home: Path, token: str | None = None) -> None:
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        self.env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        if token:
            self.env["HF_TOKEN"] = token

    def run(self, code: str, *arguments, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        return self.command([sys.executable, "-c", GUARD + code, *map(str, arguments)], check, **env)

    def command(self, words: list[str], check: bool = True, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(words, env=self.env | env, capture_output=True, text=True, timeout=240, check=False)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done
