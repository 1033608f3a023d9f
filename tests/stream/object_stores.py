"""Object stores on the loopback that other packages bring: moto's S3, and an emulator of Google Cloud Storage."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fastlt.benchmarks.file_server import free_port, wait_for_answer

START_S = 30.0


@dataclass
class ObjectStore:
    """A server of a protocol of fsspec, in a process of its own.

    options: with which fsspec opens it here. environment: with which other processes find it.
    """

    protocol: str
    port: int
    command: list[str]
    options: dict[str, Any]
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    buckets: int = field(default=0)

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env={**os.environ, **self.environment}, **quiet)
        wait_for_answer(self.process, self.port, str(self.command), START_S)

    def stop(self) -> None:
        """End it, with all that it holds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def files(self) -> Any:
        """Its file system."""
        import fsspec

        return fsspec.filesystem(self.protocol, skip_instance_cache=True, use_listings_cache=False, **self.options)

    def upload(self, folder: Path) -> str:
        """Put a folder into a new bucket; its URL."""
        self.buckets += 1
        bucket, files = f"bucket-{self.buckets}", self.files()
        files.mkdir(bucket)
        files.put(f"{folder}/", f"{bucket}/data/shards/", recursive=True)
        return f"{self.protocol}://{bucket}/data/shards"


def _s3(port: int) -> ObjectStore:
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    keys = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    return ObjectStore("s3", port, command, {"endpoint_url": url, "key": "me", "secret": "secret"}, keys)


def _gs(port: int) -> ObjectStore:
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    # The emulator has no gRPC, by which gcsfs would look for buckets of another kind.
    keys = {"STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return ObjectStore("gs", port, [*command, "--in-memory"], {"token": "anon", "project": "test"}, keys)


STORES: dict[str, tuple[Callable[[int], ObjectStore], tuple[str, ...]]] = {
    "s3": (_s3, ("s3fs", "moto", "flask")),
    "gs": (_gs, ("gcsfs", "gcp_storage_emulator")),
}


@contextmanager
def running(protocol: str) -> Iterator[ObjectStore]:
    """An ObjectStore that fsspec finds within the block, here and in other processes; skips where packages lack."""
    make, packages = STORES[protocol]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'fastlt[stores]'")
    store = make(free_port())
    with pytest.MonkeyPatch.context() as patched:
        for name, value in store.environment.items():
            patched.setenv(name, value)
        from fsspec.config import conf

        if "token" in store.options:  # fsspec reads the environment when it is imported
            patched.setitem(conf, protocol, {"token": store.options["token"]})
        store.start()
        try:
            yield store
        finally:
            store.stop()
