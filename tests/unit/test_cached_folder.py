"""The cache of a remote data set: whole and checked files, a bounded size, several processes, and servers that fail."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec.config
import pytest

from fastlt import file_lock
from loaders.stored import cached_folder, remote_folder
from loaders.stored.cached_folder import CachedFolder
from loaders.stored.damage import DamageError, NoRoomError, RemoteError
from loaders.stored.remote_folder import FileEntry, RemoteFolder, check_url

SIZE = 1000
NAMES = [f"dali/train-{number:05d}.tar" for number in range(6)]
DATASET = "fastlt-0123456789abcdef"


@pytest.fixture
def server(tmp_path) -> Path:
    folder = tmp_path / "server"
    (folder / "dali").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([number]) * SIZE)
    return folder


def cached(server: Path, limit: int = 10 * SIZE, dataset: str = DATASET) -> CachedFolder:
    entries = {name: FileEntry(SIZE, hashlib.sha256((server / name).read_bytes()).hexdigest()) for name in NAMES}
    return CachedFolder(server.parent / "cache" / dataset, RemoteFolder(f"file://{server}"), entries, limit)


def in_cache(cache: CachedFolder) -> list[str]:
    return sorted(str(path.relative_to(cache.root)) for path in cache.root.rglob("*") if path.is_file())


@pytest.fixture
def no_pauses(monkeypatch):
    """Pauses between two tries take no time; gives their lengths."""
    pauses, clock = [], [0.0]
    monkeypatch.setattr(remote_folder, "_told", -remote_folder.TELL_S)
    monkeypatch.setattr(remote_folder.time, "monotonic", lambda: clock[0])

    def sleep(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(remote_folder.time, "sleep", sleep)
    return pauses


class FailingServer:
    """A file system that fails so many times, and then copies files of `folder`."""

    def __init__(self, folder: Path, times: int, error: Exception) -> None:
        self.folder, self.times, self.error, self.asked = folder, times, error, 0

    def get_file(self, url: str, target: str, callback) -> None:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        Path(target).write_bytes((self.folder / "dali" / url.rpartition("/")[2]).read_bytes())


def test_a_file_is_fetched_once_and_whole(server):
    cache = cached(server)
    with cache.hold(NAMES[2]) as file:
        assert file.read() == bytes([2]) * SIZE
    (server / NAMES[2]).unlink()
    with cache.hold(NAMES[2]) as file:
        assert file.read() == bytes([2]) * SIZE
    assert (cache.figures.files, cache.figures.bytes) == (1, SIZE)
    assert in_cache(cache) == [NAMES[2]]


def test_the_least_recently_used_files_make_room(server):
    cache = cached(server, limit=3 * SIZE)
    for name in (0, 1, 2, 0, 3):
        cache.hold(NAMES[name]).close()
    assert in_cache(cache) == [NAMES[0], NAMES[2], NAMES[3]]


def test_a_file_in_use_stays(server, monkeypatch):
    monkeypatch.setattr(cached_folder, "PATIENCE_S", 0.0)
    monkeypatch.setattr(cached_folder, "POLL_S", 0.01)
    cache = cached(server, limit=2 * SIZE)
    with cache.hold(NAMES[0]):
        for name in (1, 2, 3):
            cache.hold(NAMES[name]).close()
        assert in_cache(cache) == [NAMES[0], NAMES[3]]
        with (
            cache.hold(NAMES[3]),
            pytest.raises(NoRoomError, match=r"0.0 MB are full of files in use, and train-00004"),
        ):
            cache.hold(NAMES[4])
    assert in_cache(cache) == [NAMES[0], NAMES[3]]


def test_files_in_use_are_waited_for(server, monkeypatch, capsys):
    """Those of another run, say."""
    monkeypatch.setattr(cached_folder, "POLL_S", 0.05)
    monkeypatch.setattr(remote_folder, "_told", -remote_folder.TELL_S)
    cache = cached(server, limit=2 * SIZE)
    held = [cache.hold(name) for name in NAMES[:2]]
    with pytest.raises(NoRoomError):
        cache.hold(NAMES[2], wait=False)
    assert capsys.readouterr().err == ""
    timer = threading.Timer(0.3, held[1].close)
    timer.start()
    cache.hold(NAMES[2]).close()
    timer.join()
    assert in_cache(cache) == [NAMES[0], NAMES[2]]
    (line,) = capsys.readouterr().err.splitlines()
    assert "cache: 0.0 MB are full of files in use; waiting until there is room for train-00002.tar" in line


def test_room_is_made_among_the_files_of_all_data_sets_and_nothing_else(server):
    one, other = cached(server), cached(server, 3 * SIZE, "fastlt-fedcba9876543210")
    strange = one.root.parent / "fastlt-holiday" / "dali" / "photo.tar"
    strange.parent.mkdir(parents=True)
    strange.write_bytes(bytes(9 * SIZE))
    for name in NAMES[:3]:
        one.hold(name).close()
    with one.hold(NAMES[2]):
        for name in NAMES[3:5]:
            other.hold(name).close()
    assert in_cache(one) == [NAMES[2]]
    assert in_cache(other) == NAMES[3:5]
    assert strange.stat().st_size == 9 * SIZE


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(server, caplog):
    cache = cached(server)
    cache.hold(NAMES[0]).close()
    (cache.root / NAMES[0]).write_bytes(b"x" * SIZE)
    with cache.hold(NAMES[0]) as file:
        assert file.read() == bytes(SIZE)
    assert "was changed in the cache: it is fetched again" in caplog.text
    os.utime(cache.root / NAMES[0])
    cache.hold(NAMES[0]).close()
    assert cache.figures.files == 2, "only its time was changed"


def test_what_a_killed_process_left_half_is_fetched_anew_and_takes_no_room(server):
    cache = cached(server, limit=2 * SIZE)
    for number in (0, 1):
        lock = cache.root / f"{NAMES[number]}.{SIZE}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        (cache.root / f"{NAMES[number]}.part").write_bytes(b"half")
    with cache.hold(NAMES[1]) as file:
        assert file.read() == bytes([1]) * SIZE
    assert in_cache(cache) == [NAMES[1]]


def test_other_bytes_than_the_manifest_says_are_refused_after_three_tries(server, no_pauses):
    cache = cached(server)
    for wrong, says in (
        (b"y" * SIZE, "its sha256 is not what"),
        (b"y" * 10, r"it has 10 bytes, its manifest says 1,000"),
    ):
        (server / NAMES[0]).write_bytes(wrong)
        with pytest.raises(DamageError, match=f"train-00000.tar: {says}.*3 times; it was changed on the server"):
            cache.hold(NAMES[0])
    assert in_cache(cache) == []
    assert no_pauses == [1, 2] * 2


def test_a_file_that_is_not_there_is_not_asked_for_again(server, no_pauses):
    cache = cached(server)
    (server / NAMES[0]).unlink()
    with pytest.raises(
        RemoteError, match=r"train-00000.tar: there is no such file; data.converted is the URL of a folder"
    ):
        cache.hold(NAMES[0])
    assert no_pauses == []
    assert in_cache(cache) == [f"{NAMES[0]}.failed"]


def test_a_server_that_comes_back_is_waited_for(server, no_pauses, monkeypatch, capsys):
    failing = FailingServer(server, 4, ConnectionRefusedError("Connect call failed"))
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    cached(server).hold(NAMES[0]).close()
    assert no_pauses == [1, 2, 4, 8]
    assert "train-00000.tar: Connect call failed; trying again in 1 s" in capsys.readouterr().err


def test_a_server_that_stays_away_is_one_sentence(server, no_pauses, monkeypatch):
    failing = FailingServer(server, 1000, TimeoutError())
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    cache = cached(server)
    with pytest.raises(RemoteError, match=r"no answer for 30 s \(8 tries in 91 s\); is the server up") as raised:
        cache.hold(NAMES[0])
    assert "\n" not in str(raised.value)
    assert no_pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_long_download_that_breaks_off_is_asked_for_again(server, no_pauses, monkeypatch):
    """Patience begins with the first failure, however long the first download took."""
    failing = FailingServer(server, 1, ConnectionResetError("broken off"))

    def get_file(url, target, callback):
        remote_folder.time.sleep(10 * remote_folder.PATIENCE_S)
        failing.get_file(url, target, callback)

    monkeypatch.setattr(remote_folder, "_file_system", lambda url: SimpleNamespace(get_file=get_file))
    cached(server).hold(NAMES[0]).close()
    assert failing.asked == 2


def test_an_answer_that_would_stay_the_same_ends_at_once(server, no_pauses, monkeypatch):
    class RefusedError(Exception):
        status, message = 401, "Unauthorized"

    failing = FailingServer(server, 1000, RefusedError())
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    with pytest.raises(RemoteError, match=r"the server answers 401 Unauthorized; data.converted is the URL"):
        cached(server).hold(NAMES[0])
    assert failing.asked == 1


def test_a_library_may_remove_what_has_come_and_others_still_wait(server, no_pauses, monkeypatch):
    """As gcsfs does when it fails: a lock on that file would be gone with it."""
    cache, other = cached(server), cached(server, dataset="fastlt-fedcba9876543210")
    lock, asked = cache.root / f"{NAMES[0]}.{SIZE}.lock", []

    def get_file(url, target, callback):
        asked.append(url)
        if url.endswith(NAMES[0]) and len(asked) == 1:
            Path(target).write_bytes(b"half")
            Path(target).unlink()
            raise ConnectionResetError("broken off")
        if len(asked) == 2:
            assert file_lock.open_locked(lock, 0.0) is None
            Path(target).write_bytes(b"half")
            other.hold(NAMES[1]).close()  # makes room, and leaves alone what is being fetched
            assert Path(target).exists()
        Path(target).write_bytes((server / "dali" / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setattr(remote_folder, "_file_system", lambda url: SimpleNamespace(get_file=get_file))
    with cache.hold(NAMES[0]) as file:
        assert file.read() == bytes(SIZE)
    assert [url.rpartition("/")[2] for url in asked] == [f"train-0000{k}.tar" for k in (0, 0, 1)]
    assert in_cache(cache) == [NAMES[0]]


def test_who_waited_for_the_tries_of_another_takes_their_outcome(server, monkeypatch):
    """A second round of tries would let it wait twice as long."""
    cache = cached(server)
    path = cache.root / f"{NAMES[0]}.{SIZE}.lock"
    lock = file_lock.open_locked(path)
    assert lock is not None
    failing = FailingServer(server, 1000, OSError("asked again"))
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    real = file_lock.open_locked

    def fail_meanwhile(path, patience_s=0.0):
        found = real(path, 0.01)
        if found is None:
            (cache.root / f"{NAMES[0]}.failed").write_text("the server is gone")
            path.unlink()
            os.close(lock)
        return found

    monkeypatch.setattr(file_lock, "open_locked", fail_meanwhile)
    with pytest.raises(RemoteError, match="the server is gone"):
        cache.hold(NAMES[0])
    assert failing.asked == 0


def test_another_process_that_is_stopped_is_not_waited_for_without_end(server, monkeypatch):
    cache = cached(server)
    lock = file_lock.open_locked(cache.root / f"{NAMES[0]}.{SIZE}.lock")
    assert lock is not None
    monkeypatch.setattr(cached_folder, "STUCK_S", 0.3)
    monkeypatch.setattr(cached_folder, "POLL_S", 0.1)
    with pytest.raises(RemoteError, match=r"train-00000.tar: another process of this machine fetches it, and no byte"):
        cache.hold(NAMES[0])
    os.close(lock)
    cache.hold(NAMES[0]).close()


def _hold_each(cache: CachedFolder, seed: int) -> int:
    """Reads all files some times; the bytes that this process fetched."""
    for round_ in range(12):
        for k in range(len(NAMES)):
            name = NAMES[(k * (seed + 1) + round_) % len(NAMES)]
            with cache.hold(name) as file:
                assert file.read() == (Path(cache.remote.url.removeprefix("file://")) / name).read_bytes()
    return cache.figures.bytes


def test_processes_share_the_cache(server):
    """With room for all, each file comes once; with little room, nobody reads a wrong byte and the bound holds."""
    with multiprocessing.get_context("fork").Pool(3) as pool:
        for limit, most in ((6 * SIZE, 6 * SIZE), (3 * SIZE, None)):
            cache = cached(server, limit, f"fastlt-{limit:016x}")
            fetched = sum(pool.starmap(_hold_each, [(cache, seed) for seed in range(3)]))
            held = sum(path.stat().st_size for path in cache.root.rglob("*.tar"))
            assert held <= limit
            assert fetched >= 6 * SIZE
            assert most is None or fetched == most


def test_a_full_disk_is_one_sentence_and_leaves_nothing(server, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: FailingServer(server, 1000, full))
    cache = cached(server)
    with pytest.raises(NoRoomError, match=r"cache: its disk has .* free, and train-00000.tar has no room") as raised:
        cache.hold(NAMES[0])
    assert "data.stream.cache=DIR" in str(raised.value)
    assert in_cache(cache) == []


def test_files_make_room_on_a_small_disk_before_the_cache_is_full(server, monkeypatch):
    cache = cached(server)
    for name in NAMES[:3]:
        cache.hold(name).close()
        time.sleep(0.01)
    free = [SIZE // 2]
    monkeypatch.setattr(cached_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    cache.hold(NAMES[3]).close()
    assert in_cache(cache) == NAMES[1:4]


def test_a_folder_that_may_not_be_written_to(server):
    (server.parent / "cache").write_text("a file")
    with pytest.raises(NoRoomError, match=r"cache cannot be written to .* data.stream.cache=DIR"):
        cached(server).hold(NAMES[0])


def test_a_package_that_is_missing_is_named_at_once(no_pauses, monkeypatch):
    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for url, extra in (("s3://b/x", "s3"), ("gs://b/x", "gcs"), ("https://host/x", "stream")):
        with pytest.raises(ValueError, match=rf"a package that reads {url[:2]}.* pip install 'fastlt\[{extra}\]'$"):
            RemoteFolder(url).read("manifest.json")
    assert no_pauses == []


def of_store(made: Exception, status: int) -> Exception:
    """As s3fs makes a Python error of an answer of S3."""
    made.__cause__ = AnswerError(response={"ResponseMetadata": {"HTTPStatusCode": status}})
    return made


class AnswerError(Exception):
    def __init__(self, **attributes) -> None:
        self.__dict__.update(attributes)


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            of_store(FileNotFoundError("The specified bucket does not exist."), 404),
            r"no such file \(The specified bucket",
        ),
        (of_store(PermissionError("Access Denied"), 403), r"may not be read \(Access Denied\); data.converted"),
        (of_store(OSError(5, "QuotaExceeded"), 409), "QuotaExceeded; data.converted"),
        (of_store(OSError(22, "the region 'x' is wrong"), 400), "the region 'x' is wrong; data.converted"),
        (NoCredentialsError("Unable to locate credentials"), "Unable to locate credentials; data.converted"),
        (OSError("Forbidden: http://host/o/x?token=secret and more"), "Forbidden: http://host/o/x and more; data.con"),
        (AnswerError(code=401, message="Anonymous"), "AnswerError; data.converted"),
        (ValueError("Bucket is requester pays"), "Bucket is requester pays; data.converted"),
    ],
    ids=str,
)
def test_answers_of_object_stores_that_would_stay_the_same(server, no_pauses, monkeypatch, error, says):
    failing = FailingServer(server, 1000, error)
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    with pytest.raises(RemoteError, match=says):
        cached(server).hold(NAMES[0])
    assert failing.asked == 1


@pytest.mark.parametrize(
    "error",
    [
        of_store(OSError(5, "an unknown answer"), 500),
        of_store(OSError(16, "Please reduce your request rate"), 503),
        of_store(TimeoutError("Your socket connection was not read"), 400),
        AnswerError(code=503),
    ],
    ids=str,
)
def test_answers_of_object_stores_that_may_change(server, no_pauses, monkeypatch, error):
    """None is taken for one of the local disk, whatever its number."""
    failing = FailingServer(server, 2, error)
    monkeypatch.setattr(remote_folder, "_file_system", lambda url: failing)
    cached(server).hold(NAMES[0]).close()
    assert no_pauses == [1, 2]


def test_what_fsspec_is_configured_with_goes_before_our_limits(monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {"gcs": {"session_kwargs": {"trust_env": False}}, "s3": {}})
    assert remote_folder._settings("gs")["session_kwargs"]["trust_env"] is False
    assert remote_folder._settings("gs")["session_kwargs"]["timeout"].total is None
    assert remote_folder._settings("s3")["max_concurrency"] == 1
    fsspec.config.conf["s3"] = {"max_concurrency": 3, "config_kwargs": {"retries": {"mode": "adaptive"}}}
    assert remote_folder._settings("s3") == {"config_kwargs": {"retries": {"mode": "adaptive"}}}


def test_urls():
    check_url("https://host/data")
    with pytest.raises(ValueError, match="begins with htps://; allowed are https://, s3://, gs://"):
        check_url("htps://host/data")
    with pytest.raises(ValueError, match="the URL of host holds a password") as raised:
        check_url("https://me:secret@host/data")
    assert "secret" not in str(raised.value)
