"""A web server on the loopback that gives the files of a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NGINX = next((found for name in ("nginx", "/usr/sbin/nginx") if (found := shutil.which(name))), None)
START_S = 10.0
CONFIGURATION = """
daemon off;
{user}
pid {work}/nginx.pid;
error_log {work}/error.log;
worker_processes 1;
events {{}}
http {{
    log_format sent '$status $body_bytes_sent $request_uri';
    access_log {work}/access.log sent;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        root {folder};
        {directives}
    }}
}}
"""


@dataclass
class FileServer:
    """A server of `folder` on the loopback: nginx where it is installed, else Python's.

    work: for its own files. directives: of nginx's `server` block.
    """

    folder: Path
    work: Path
    directives: str = ""
    port: int = 0
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        """What it is, for figures."""
        return "nginx" if NGINX else "python -m http.server"

    def start(self) -> None:
        """Start it, on the port that it had before, and wait until it answers."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        self.process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_answer(self.process, self.port, self.name, START_S)

    def stop(self) -> None:
        """End it at once; connections break."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def sent(self) -> list[tuple[int, int, str]]:
        """What nginx answered so far: (status, bytes, path) of each request."""
        lines = (self.work / "access.log").read_text().splitlines()
        return [(int(status), int(size), path) for status, size, path in (line.split(" ", 2) for line in lines)]

    def _command(self) -> list[str]:
        if NGINX is None:
            return [sys.executable, "-m", "http.server", str(self.port), "-b", "127.0.0.1", "-d", str(self.folder)]
        file = self.work / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""  # else its worker may not read the folder
        words = {"user": user, "work": self.work, "port": self.port, "folder": self.folder}
        file.write_text(CONFIGURATION.format(**words, directives=self.directives))
        return [NGINX, "-c", str(file), "-p", str(self.work)]


@contextmanager
def serve(folder: Path, work: Path, directives: str = "") -> Iterator[FileServer]:
    """A FileServer that runs within the block."""
    server = FileServer(folder.absolute(), work.absolute(), directives)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def wait_for_answer(process: subprocess.Popen[bytes], port: int, name: str, timeout_s: float) -> None:
    """Until a server on the loopback takes connections; RuntimeError with its `name` when it does not, or ends."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{name} did not start on port {port}")


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
