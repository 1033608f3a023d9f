"""Shards from object stores by their own libraries: S3 by s3fs from moto, Google's by gcsfs from an emulator."""

from __future__ import annotations

import importlib.util
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fsspec.config import conf
from machines import Machines
from object_stores import STORES, running
from short_runs import stop_after
from test_streamed import RECIPE, STAGE, assert_same, batches, convert_digits, loader, weights, words

from fastlt import cli
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.train import main
from loaders.stored import remote_folder
from loaders.stored.damage import RemoteError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.remote_folder import RemoteFolder
from loaders.stored.streamed import StreamedDataset

pytestmark = pytest.mark.stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return convert_digits(tmp_path_factory.mktemp("store") / "digits")


@pytest.fixture(scope="module", params=list(STORES))
def store(request):
    with running(request.param) as started:
        yield started


@pytest.fixture
def url(store, shards) -> str:
    """Of a bucket that a test may damage."""
    return store.upload(shards)


@pytest.fixture(autouse=True)
def new_connections(monkeypatch):
    """Each test begins without the connections of the one before, and is not patient."""
    remote_folder._file_system.cache_clear()
    monkeypatch.setattr(remote_folder, "_told", -remote_folder.TELL_S)
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.1)
    monkeypatch.setattr(remote_folder, "PATIENCE_S", 1.0)


@pytest.fixture
def quick_gcsfs(monkeypatch):
    """gcsfs waits no half minute between tries of its own: min(seconds, 32) says for how long."""
    if importlib.util.find_spec("gcsfs") is not None:
        import gcsfs.retry

        monkeypatch.setattr(gcsfs.retry, "min", lambda *seconds: 0.01, raising=False)


def refusal(capsys) -> str:
    """The one line with which a run was refused or stopped; no library has said more."""
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("fastlt: ") and "; trying again in" not in line]
    return line


def run(place: str | Path, tmp_path: Path, *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(RECIPE), *words(place, tmp_path, *more)])


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_an_epoch_is_that_of_the_local_shards(url, shards, tmp_path, backend):
    """With one worker process of torch, which fetches what it needs by itself."""
    local = loader(ConvertedDataset.open(shards), backend)
    remote = loader(StreamedDataset.open_url(url, tmp_path / "cache", 10**9), backend)
    assert_same(batches(remote, 0), batches(local, 0))
    remote.close()
    local.close()


def test_a_run_is_that_on_local_shards_and_goes_on_in_the_middle_of_an_epoch(url, shards, store, tmp_path):
    """And needs no bucket for what is in the cache, but the manifest."""
    assert run(shards, tmp_path, "name=local", "data.order=shards") == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(prepare(load_recipe(RECIPE, words(url, tmp_path, "name=remote"))))
    with pytest.raises(Interrupted):
        stop_after(trainer, 4).fit()  # of six an epoch
    assert run(url, tmp_path, "name=remote") == 0
    files = store.files()
    files.rm([name for name in files.find(url) if not name.endswith("manifest.json")])
    assert run(url, tmp_path, "name=cached") == 0
    one, *others = (weights(tmp_path / "runs" / name) for name in ("local", "remote", "cached"))
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_two_processes_share_a_cache_and_the_work(url, tmp_path):
    own = "data.stream={parts: 2, block: 2, cache: cache}", "runs=runs", f"{STAGE}.evaluate_every=6"
    with Machines([tmp_path], per_node=2) as machines:
        machines.start(str(RECIPE), *words(url, tmp_path, *own, f"{STAGE}.iterations=6"))  # one epoch
        ends = machines.ends(240)
    assert [code for code, _, _ in ends] == [0, 0], ends
    cached = [path.name for path in (tmp_path / "cache").glob("*/dali/*")]
    assert 20 <= sum(name.startswith("train-") for name in cached) <= 22, "what does not fill a batch is left out"
    assert not [name for name in cached if name.endswith((".part", ".lock"))]


def test_a_changed_shard_is_never_trained_on(url, store, tmp_path, capsys):
    files, name = store.files(), f"{url}/dali/train-00009.tar"
    whole = files.cat_file(name)
    files.pipe_file(name, whole[:-3000] + bytes(3000))
    assert run(url, tmp_path, f"{STAGE}.evaluate_every=1") == 2
    assert f"{name}: its sha256 is not what its manifest says, 3 times" in refusal(capsys)
    files.pipe_file(name, whole[:-3000])
    assert run(url, tmp_path, f"{STAGE}.evaluate_every=1") == 2
    assert f"{name}: it has {len(whole) - 3000:,} bytes, its manifest says {len(whole):,}, 3 times" in refusal(capsys)
    files.pipe_file(name, whole)
    assert run(url, tmp_path, f"{STAGE}.evaluate_every=1") == 0


def test_a_missing_object_stops_the_run_at_once(url, store, tmp_path, capsys):
    store.files().rm(f"{url}/dali/train-00005.tar")
    assert run(url, tmp_path, f"{STAGE}.evaluate_every=1") == 1
    assert f"{url}/dali/train-00005.tar: there is no such file" in refusal(capsys)


def test_a_wrong_bucket_and_a_wrong_folder_are_refused_before_work(url, store, tmp_path, capsys):
    for wrong in (f"{store.protocol}://no-bucket-1/shards", f"{url}/nothing"):
        assert run(wrong, tmp_path) == 2
        assert f"{wrong}/manifest.json: there is no such file" in refusal(capsys)


@pytest.mark.parametrize("protocol", list(STORES))
def test_a_store_that_is_gone_is_one_sentence_and_a_run_goes_on_when_it_is_back(
    shards, tmp_path, protocol, capsys, quick_gcsfs
):
    with running(protocol) as store:
        url = store.upload(shards)
        assert run(url, tmp_path, f"{STAGE}.iterations=6") == 0
        store.stop()
        assert run(url, tmp_path) == 2
        line = refusal(capsys)
        assert f"{url}/manifest.json: " in line
        assert "onnect" in line
        assert "is the server up, and can it be reached from here? The same command goes on" in line
        store.buckets = 0
        store.start()
        assert store.upload(shards) == url
        assert run(url, tmp_path) == 0


# Credentials, which the emulator of Google's store does not know


@pytest.fixture
def guarded(shards, tmp_path, monkeypatch):
    """An S3 that looks at keys."""
    with running("s3") as store:
        url = store.upload(shards)
        plain = {"Content-Type": "text/plain"}
        after = urllib.request.Request(f"http://127.0.0.1:{store.port}/moto-api/reset-auth", b"0", plain)
        urllib.request.urlopen(after, timeout=30).close()
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        yield url


def test_wrong_keys_and_none_are_refused_before_work(guarded, tmp_path, capsys, monkeypatch):
    assert run(guarded, tmp_path) == 2
    assert "manifest.json: it may not be read (The AWS Access Key Id you provided does not exist" in refusal(capsys)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote_folder._file_system.cache_clear()
    assert run(guarded, tmp_path) == 2
    assert "manifest.json: Unable to locate credentials; data.converted" in refusal(capsys)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    remote_folder._file_system.cache_clear()
    assert run(guarded, tmp_path) == 2
    assert "manifest.json: The config profile (nobody) could not be found; data.converted" in refusal(capsys)


@pytest.fixture
def answers(monkeypatch):
    """Google's store, which answers every request with this status and body; and the requests."""
    pytest.importorskip("gcsfs")
    answer, asked = [500, b""], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, format, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(conf, "gs", {"token": "anon"})
    yield answer, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": {"message": "Anonymous caller"}}', "Anonymous caller, 401; data.converted is the URL"),
        (403, b'{"error": {"message": "no access"}}', "Forbidden: http.*; data.converted is the URL"),
        (400, b'{"error": {"message": "requester pays"}}', "Bucket is requester pays. .*; data.converted is the URL"),
    ],
)
def test_what_googles_store_refuses_is_not_asked_for_again(answers, status, body, says):
    answer, asked = answers
    answer[:] = status, body
    with pytest.raises(RemoteError, match=f"gs://bucket/x/manifest.json: {says}"):
        RemoteFolder("gs://bucket/x").read("manifest.json")
    assert len(asked) == 1


def test_an_answer_of_googles_store_that_may_change_is_asked_for_again(answers, quick_gcsfs):
    answers[0][:] = 503, b""
    with pytest.raises(RemoteError, match=r"manifest.json: .*tries in .* s\); is the server up"):
        RemoteFolder("gs://bucket/x").read("manifest.json")
    assert len(answers[1]) > 6


def test_verify_reads_all_objects_where_they_lie(url, store, capsys):
    assert cli.main(["verify", url, "--quiet"]) == 0
    assert f"{url}: every checksum of " in capsys.readouterr().out
    files = store.files()
    files.pipe_file(f"{url}/dali/train-00003.tar", b"another")
    files.rm(f"{url}/dali/train-00004.tar")
    assert cli.main(["verify", url, "--quiet"]) == 1
    changed, missing = [line for line in capsys.readouterr().err.splitlines() if "trying" not in line]
    assert f"{url}/dali/train-00003.tar: it has 7 bytes, its manifest says" in changed
    assert f"{url}/dali/train-00004.tar: there is no such file" in missing
