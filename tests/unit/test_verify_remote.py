"""`fastlt verify URL`: every file read where it lies, and what is wrong by name."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
from test_streamed import convert_digits

from fastlt import cli
from loaders.stored import remote_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return convert_digits(tmp_path_factory.mktemp("server") / "digits", shard_images=100)


@pytest.fixture
def server(shards, tmp_path, monkeypatch) -> Path:
    """A copy that a test may damage, where nothing is waited for."""
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.001)
    monkeypatch.setattr(remote_folder, "PATIENCE_S", 0.1)
    monkeypatch.setattr(remote_folder, "PIECE_BYTES", 1000)
    return Path(shutil.copytree(shards, tmp_path / "server"))


def verify(server: Path, capsys) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and lines of stderr."""
    code = cli.main(["verify", f"file://{server}", "--quiet", "--workers", "2"])
    out, told = capsys.readouterr()
    return code, out, [line for line in told.splitlines() if "trying again" not in line]


def test_a_whole_data_set(server, capsys):
    before = sorted(server.parent.rglob("*"))
    code, out, told = verify(server, capsys)
    assert (code, told) == (0, [])
    files = sum(path.is_file() for path in server.rglob("*")) - 1
    assert out == f"file://{server}: every checksum of {files} files holds; images were not decoded\n"
    assert sorted(server.parent.rglob("*")) == before, "nothing is written"


def test_what_is_wrong_is_named(server, capsys):
    changed, longer, missing = (server / "dali" / f"train-0000{k}.tar" for k in range(3))
    changed.write_bytes(changed.read_bytes()[:-2000] + bytes(2000))
    size = longer.stat().st_size
    longer.write_bytes(longer.read_bytes() + bytes(5000))
    missing.unlink()
    code, _, told = verify(server, capsys)
    assert code == 1
    one, two, three = told
    assert f"file://{changed}: its sha256 is not what its manifest says, 3 times" in one
    assert f"file://{longer}: it has " in two
    assert f"bytes, its manifest says {size:,}, 3 times" in two
    assert f"file://{missing}: there is no such file" in three


def test_a_changed_manifest_and_none(server, capsys):
    path = server / "manifest.json"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 1'))
    code, _, told = verify(server, capsys)
    assert code == 1
    assert "manifest.json is not what was written; it was edited or damaged" in told[0]
    path.unlink()
    code, _, told = verify(server, capsys)
    assert code == 2
    assert "manifest.json: there is no such file" in told[0]


def test_a_server_that_goes_away_is_no_damage(server, capsys, monkeypatch):
    check = remote_folder.RemoteFolder._check

    def gone(remote, name, entry):
        if name.endswith("train-00001.tar"):
            raise ConnectionRefusedError("Connect call failed")
        check(remote, name, entry)

    monkeypatch.setattr(remote_folder.RemoteFolder, "_check", gone)
    code, _, told = verify(server, capsys)
    assert code == 2
    assert "train-00001.tar: Connect call failed" in told[0]
    assert "is the server up" in told[0]


def test_a_web_server_without_ranges(server, capsys):
    """As `python -m http.server`; every file is longer than a piece."""
    pytest.importorskip("aiohttp")

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said) -> None:
            pass

    address = ("127.0.0.1", 0)
    with http.server.ThreadingHTTPServer(address, functools.partial(Files, directory=str(server))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        assert cli.main(["verify", url, "--quiet", "--workers", "2"]) == 0
        shard = server / "dali" / "train-00001.tar"
        shard.write_bytes(shard.read_bytes()[:-2000] + bytes(2000))
        assert cli.main(["verify", url, "--quiet", "--workers", "2"]) == 1
        web.shutdown()
    assert f"{url}/dali/train-00001.tar: its sha256 is not what its manifest says" in capsys.readouterr().err


def test_inspect_says_what_to_do_with_a_url(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "https://host/shards"])
    assert ended.value.code == 2
    assert "https://host/shards is a URL" in capsys.readouterr().err
