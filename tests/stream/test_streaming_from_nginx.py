"""Shards from a real web server, nginx on the loopback: one that dies, is slow, breaks off, or gives other bytes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from machines import Machines
from PIL import Image
from test_streamed import ORDER, RECIPE, STAGE, assert_same, batches, convert_digits, loader, weights, words

from fastlt import cli
from fastlt.benchmarks.file_server import NGINX, FileServer, serve
from fastlt.train import main
from loaders.readers import prefetched_loader
from loaders.stored import remote_folder
from loaders.stored.damage import DamageError, RemoteError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.streamed import StreamedDataset

pytestmark = [pytest.mark.stream, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]
READERS = ["torch", "dali"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return convert_digits(tmp_path_factory.mktemp("server") / "digits")


@pytest.fixture
def server(shards, tmp_path):
    """Serves a copy that a test may damage."""
    with serve(Path(shutil.copytree(shards, tmp_path / "digits")), tmp_path / "nginx") as started:
        yield started


@pytest.fixture(autouse=True)
def new_connections(monkeypatch):
    """Each test begins without the connections of the one before, and says at once what it has to say."""
    remote_folder._file_system.cache_clear()
    monkeypatch.setattr(remote_folder, "_told", -remote_folder.TELL_S)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.1)
    monkeypatch.setattr(remote_folder, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(remote_folder, "PATIENCE_S", 1.0)
    monkeypatch.setattr(remote_folder, "STALL_S", 1.0)


def opened(server: FileServer, cache: Path, limit: int = 10**9) -> StreamedDataset:
    return StreamedDataset.open_url(server.url, cache, limit)


def fetched(server: FileServer) -> Counter:
    """How often each training shard was given whole."""
    sizes = {f"/dali/{path.name}": path.stat().st_size for path in server.folder.glob("dali/train-*.tar")}
    return Counter(path for status, size, path in server.sent() if status == 200 and sizes.get(path) == size)


def errors(capsys) -> list[str]:
    return [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ") and "trying" not in line
    ]


@pytest.mark.parametrize("backend", READERS)
def test_an_epoch_is_that_of_the_local_shards_and_its_bytes_are_read_once(server, tmp_path, backend):
    """With a cache that holds a little more than half of the shards."""
    everything = sum(path.stat().st_size for path in server.folder.rglob("*") if path.is_file())
    trains = sum(path.stat().st_size for path in server.folder.glob("dali/train-*.tar"))
    local = loader(ConvertedDataset.open(server.folder), backend)
    remote = loader(opened(server, tmp_path / "cache", everything - trains * 2 // 5), backend)
    assert_same(batches(remote, 0), batches(local, 0))
    remote.close()
    local.close()
    assert fetched(server) == {f"/dali/train-{number:05d}.tar": 1 for number in range(22)}


def test_a_run_from_the_server_is_that_on_the_local_shards(server, tmp_path):
    local = words(server.folder, tmp_path, "data.order=shards", "name=local")
    assert main([str(RECIPE), *local]) == 0
    assert main([str(RECIPE), *words(server.url, tmp_path, "name=remote")]) == 0
    one, other = (weights(tmp_path / "runs" / name) for name in ("local", "remote"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("backend", READERS)
def test_a_server_that_dies_and_comes_back_is_waited_for(server, tmp_path, backend, capfd):
    local, remote = (
        loader(ConvertedDataset.open(server.folder), backend),
        loader(opened(server, tmp_path / "c"), backend),
    )
    expected, seen = batches(local, 0), []
    server.stop()
    threading.Timer(2.5, server.start).start()
    for batch in remote.epoch(0):
        seen.append(batch)
        if len(seen) == 10:
            server.stop()
            server.start()
    assert_same(seen, expected)
    remote.close()
    local.close()
    assert "Connect call failed" in capfd.readouterr().err


def test_a_server_that_stays_away_stops_the_run_which_goes_on_later(server, tmp_path, capsys, impatient, monkeypatch):
    whole = words(server.url, tmp_path, "name=whole")
    assert main([str(RECIPE), *whole]) == 0
    shutil.rmtree(tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    cut = words(server.url, tmp_path, "name=cut", f"{STAGE}.evaluate_every=2", "data.stream.cache_gb=1")
    take = prefetched_loader._Fetching.one_more_read

    def gone(fetching):
        take(fetching)
        if fetching._read == 3:
            server.stop()
            for shard in (tmp_path / "cache").glob("*/dali/train-*.tar"):
                shard.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(prefetched_loader._Fetching, "one_more_read", gone)
        assert main([str(RECIPE), *cut]) == 1
    (line,) = errors(capsys)
    assert f"{server.url}/dali/train-" in line
    assert "Connect call failed" in line
    assert "is the server up, and can it be reached from here? The same command goes on where it was stopped" in line
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(RECIPE), *cut]) == 2
    assert f"{server.url}/manifest.json: " in errors(capsys)[0]
    server.start()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(RECIPE), *cut]) == 0
    assert "runs/cut at iteration 2 of stage" in capsys.readouterr().out, "the last validation before it"
    one, other = (weights(tmp_path / "runs" / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("backend", READERS)
def test_a_slow_server_is_waited_for_and_the_user_is_told(shards, tmp_path, backend, monkeypatch, capfd):
    monkeypatch.setattr(prefetched_loader, "SLOW_S", 0.1)
    size = max(path.stat().st_size for path in shards.glob("dali/train-*.tar"))
    with serve(shards, tmp_path / "nginx", f"location ~ train-.*tar {{ limit_rate {size}; }}") as server:
        remote, local = loader(opened(server, tmp_path / "c"), backend), loader(ConvertedDataset.open(shards), backend)
        assert_same(batches(remote, 0), batches(local, 0))
        remote.close()
        local.close()
        assert f"fastlt: still waiting for shards of {server.url}" in capfd.readouterr().err


def test_a_connection_that_breaks_off_in_the_middle_of_a_file(shards, tmp_path, capfd, monkeypatch):
    """Half a file comes, and the server is gone; it is asked again, and the half is never read."""
    monkeypatch.setattr(remote_folder, "TELL_S", 0.0)
    size = max(path.stat().st_size for path in shards.glob("dali/train-*.tar"))
    with serve(shards, tmp_path / "nginx", f"location ~ train-.*tar {{ limit_rate {size // 2}; }}") as server:
        remote = loader(opened(server, tmp_path / "c"), "torch", num_workers=0)
        running = remote.epoch(0)
        time.sleep(0.7)
        server.stop()
        server.directives = ""
        server.start()
        assert_same(list(running), batches(loader(ConvertedDataset.open(shards), "torch", num_workers=0), 0))
        remote.close()
    assert "payload is not completed" in capfd.readouterr().err


def test_a_silent_server_is_taken_for_dead(shards, tmp_path, impatient):
    """It takes the connection and says nothing."""
    with serve(shards, tmp_path / "nginx") as server:
        remote = loader(opened(server, tmp_path / "c"), "torch", num_workers=0)
        server.stop()
        remote_folder._file_system.cache_clear()
        silent = socket.create_server(("127.0.0.1", server.port))
        with silent, pytest.raises(RemoteError, match=r"train-000..\.tar: no answer for 1 s"):
            batches(remote, 0)
        remote.close()


@pytest.mark.parametrize(
    ("directives", "says", "tries"),
    [
        ("return 503;", "the server answers 503 Service Temporarily Unavailable", 2),
        ("return 404;", "there is no such file; data.converted is the URL of a folder", 1),
        ("return 403;", "the server answers 403 Forbidden; data.converted is the URL of a folder", 1),
        ("return 200 'half a shard';", "bytes, its manifest says", 3),
    ],
)
def test_what_the_server_answers_is_told(shards, tmp_path, impatient, directives, says, tries):
    with serve(shards, tmp_path / "nginx", f"location ~ train-00003 {{ {directives} }}") as server:
        remote = loader(opened(server, tmp_path / "c"), "torch", num_workers=0)
        with pytest.raises((RemoteError, DamageError), match=r"train-00003.tar: ") as raised:
            batches(remote, 0)
        remote.close()
        assert says in str(raised.value)
        asked = [path for _, _, path in server.sent() if "train-00003" in path]
        assert len(asked) >= tries


def test_a_changed_shard_stops_the_run_and_is_never_trained_on(server, tmp_path, capsys, impatient):
    shard = server.folder / "dali" / "train-00009.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3000] + bytes(3000))
    run = words(server.url, tmp_path, f"{STAGE}.evaluate_every=1")
    assert main([str(RECIPE), *run]) == 2
    (line,) = errors(capsys)
    assert "train-00009.tar: its sha256 is not what its manifest says, 3 times; it was changed on the server" in line
    shard.write_bytes(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(RECIPE), *run]) == 0


def test_a_password_comes_from_netrc(shards, tmp_path, monkeypatch):
    users = tmp_path / "users"
    users.write_text("me:{PLAIN}secret\n")
    with serve(shards, tmp_path / "nginx", f"auth_basic shards; auth_basic_user_file {users};") as server:
        with pytest.raises(RemoteError, match=r"manifest.json: the server answers 401 Unauthorized"):
            opened(server, tmp_path / "c")
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(netrc))
        remote_folder._file_system.cache_clear()
        assert opened(server, tmp_path / "c").formats == ("dali",)


def test_a_full_cache_disk_is_one_sentence(server, tmp_path, capsys, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in server.folder.rglob("*.tar"))
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 2}", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mount.stderr.strip()}")
    try:
        run = words(server.url, tmp_path, f"data.stream={{parts: 2, block: 2, cache: {disk / 'cache'}}}")
        take = prefetched_loader._Fetching.one_more_read

        def fill(fetching):
            take(fetching)
            if fetching._read == 1:
                for shard in disk.glob("cache/*/dali/train-*.tar"):
                    shard.unlink()
                (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))

        with monkeypatch.context() as patched:
            patched.setattr(prefetched_loader._Fetching, "one_more_read", fill)
            assert main([str(RECIPE), *run]) == 2
        (line,) = errors(capsys)
        assert f"{disk / 'cache'}: its disk has" in line
        assert "make room, give a folder on another disk (data.stream.cache=DIR)" in line
        assert not list(disk.rglob("*.part"))
        (disk / "filler").unlink()
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(RECIPE), *run]) == 0
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_processes_fetch_their_own_shards(shards, tmp_path):
    """Two of one node share a cache: every shard comes once. Two nodes: each fetches its own, and both one of them."""
    own = "data.stream={parts: 2, block: 2, cache: cache}", "runs=runs"
    base = words("URL", tmp_path, f"{STAGE}.iterations=6", f"{STAGE}.evaluate_every=3", *own)  # one epoch
    for nodes in (1, 2):
        folders = [tmp_path / f"{nodes}-{node}" for node in range(nodes)]
        for folder in folders:
            folder.mkdir()
        with serve(shards, tmp_path / f"nginx{nodes}") as server, Machines(folders, per_node=2 // nodes) as machines:
            run = [word.replace("URL", server.url) for word in base]
            machines.start(str(RECIPE), *run)
            ends = machines.ends(240)
            assert [code for code, _, _ in ends] == [0, 0], ends
            counts = fetched(server)
        assert 20 <= len(counts) <= 22, "what does not fill a batch is left out"
        assert sum(counts.values()) <= len(counts) + nodes - 1


def test_a_server_that_dies_ends_both_processes_with_its_sentence(shards, tmp_path):
    run = words("URL", tmp_path, "data.stream={parts: 2, block: 2, cache: cache}", "runs=runs")
    missing = "location ~ train-00005 { return 404; }"
    with serve(shards, tmp_path / "nginx", missing) as server, Machines([tmp_path], per_node=2) as machines:
        machines.start(str(RECIPE), *(word.replace("URL", server.url) for word in run))
        ends = machines.ends(240)
    assert [code for code, _, _ in ends] == [1, 1], ends
    told = "\n".join(told for _, _, told in ends)
    assert "train-00005.tar: there is no such file" in told
    assert "Traceback" not in told


def test_the_benchmark_counts_bytes_and_hits(shards, tmp_path, capsys):
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.jpg"
        )
    words = ["--count", "64", "--shard-images", "2", "--parts", "2", "--block", "1", "--loader", "dali", "--size", "32"]
    assert (
        cli.main(["benchmark", "stream", "--images", str(tmp_path), *words, "--batch", "8", "--rounds", "2", "--json"])
        == 0
    )
    rows = {row["name"].partition(": ")[2]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    counted = {name: (row["read"], row["hits"]) for name, row in rows.items()}
    assert counted["local, all shuffled"] == counted["streamed, full cache"] == (0.0, 1.0)
    assert counted["streamed, empty cache"] == (1.0, 0.0)
    assert 0.2 < counted["streamed, small cache"][0] < 1


def test_the_order_is_small_enough_for_these_tests():
    assert ORDER.parts * ORDER.block < 22 / 2


def test_verify_reads_all_files_where_they_lie(server, capsys):
    assert cli.main(["verify", server.url, "--quiet"]) == 0
    shard = server.folder / "dali" / "train-00009.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    assert cli.main(["verify", server.url, "--quiet"]) == 1
    assert f"{server.url}/dali/train-00009.tar: it has {shard.stat().st_size:,} bytes" in capsys.readouterr().err
