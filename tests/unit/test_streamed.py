"""Training from shards at a URL: the batches of a local copy, few shards on the disk, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import stop_after
from small_betons import needs_dali

from fastlt.batches import build_loader
from fastlt.recipe import RecipeError, load_recipe
from fastlt.run import checkpoint
from fastlt.run.dataset import open_data_source, request
from fastlt.run.folder import last_checkpoint
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.train import main
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.order.shard_order import ShardOrder
from loaders.readers import prefetched_loader
from loaders.stored import remote_folder
from loaders.stored.cached_folder import _remove_unused
from loaders.stored.convert import convert
from loaders.stored.damage import DamageError, NoRoomError, RemoteError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.manifest import sealed
from loaders.stored.streamed import StreamedDataset

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"
ORDER = ShardOrder(parts=2, block=2)
EVERY_READER = ["torch", pytest.param("dali", marks=needs_dali)]
STAGE = "stages.end_to_end"


def convert_digits(folder: Path, shard_images: int = 20) -> Path:
    data = load_recipe(RECIPE).data
    convert(
        open_data_source(data),
        folder,
        options=FfcvOptions(num_workers=1),
        request=request(data),
        formats=("dali",),
        progress=False,
        shard_images=shard_images,
    )
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The digits in shards of 20: 22 for training."""
    return convert_digits(tmp_path_factory.mktemp("server") / "digits")


@pytest.fixture
def server(shards, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "server"))


def opened(folder: Path, cache: Path, limit: int = 10**9, **options) -> StreamedDataset:
    return StreamedDataset.open_url(f"file://{folder}", cache, limit, **options)


def loader(dataset: ConvertedDataset, backend: str, **options):
    arguments = {"batch_size": 16, "device": "cpu", "train": True, "crop": CropSpec("none"), "num_workers": 1}
    return make_loader(dataset, "train", backend=backend, **{**arguments, "by_shards": ORDER, "seed": 3, **options})


def batches(loader, epoch: int, first: int = 0) -> list:
    return list(loader.epoch(epoch, first))


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("images", "labels", "index"))


def on_disk(dataset: StreamedDataset) -> list[str]:
    return sorted(path.name for path in dataset.root.glob("dali/train-*.tar"))


@pytest.mark.parametrize("backend", EVERY_READER)
def test_the_batches_are_those_of_a_local_copy(shards, tmp_path, backend):
    local, remote = ConvertedDataset.open(shards), opened(shards, tmp_path)
    assert on_disk(remote) == []
    one, other = loader(local, backend, num_workers=int(backend != "torch")), loader(remote, backend)
    for epoch in (0, 1):
        assert_same(batches(other, epoch), batches(one, epoch))
    assert_same(batches(other, 1, 9), batches(one, 1)[9:])
    assert len(on_disk(remote)) == 22
    one.close()
    other.close()


@pytest.mark.parametrize("backend", EVERY_READER)
def test_a_small_cache_holds_the_epoch_and_every_shard_is_fetched_once(shards, tmp_path, backend):
    """With room for a third of the shards; on two ranks each fetches its own."""
    whole = opened(shards, tmp_path / "other")
    small = sum(entry.bytes for name, entry in whole.files.files.items() if (whole.root / name).exists())
    largest = max(entry.bytes for name, entry in whole.files.files.items() if "train-" in name)
    limit = small + 13 * largest
    one = loader(ConvertedDataset.open(shards), backend)
    remote = opened(shards, tmp_path / "cache", limit)
    before = remote.files.figures.files
    streamed = loader(remote, backend)
    assert_same(batches(streamed, 0), batches(one, 0))
    streamed.close()
    assert len(on_disk(remote)) <= 13
    fetched = remote.files.figures.files - before
    if backend == "dali":  # torch's worker may fetch one before the threads of this process do
        assert fetched == streamed.asked == 22
    one.close()


def test_two_processes_fetch_their_own_shards(shards, tmp_path):
    whole = batches(loader(ConvertedDataset.open(shards), "torch", num_workers=0), 0)
    parts, names = [], []
    for rank in range(2):
        remote = opened(shards, tmp_path / str(rank))
        one = loader(remote, "torch", num_workers=0, batch_size=8, rank=rank, world_size=2)
        parts.append(batches(one, 0))
        one.close()
        names.append(set(on_disk(remote)))
    for batch, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(batch.index, torch.cat([left.index, right.index]))
        assert torch.equal(batch.images, torch.cat([left.images, right.images]))
    assert len(names[0] & names[1]) <= 1
    assert len(names[0] | names[1]) == 22


def test_evaluation_of_the_training_split_goes_through_the_shards_in_order(shards, tmp_path):
    one, other = (
        loader(dataset, "torch", num_workers=0, train=False, by_shards=None)
        for dataset in (ConvertedDataset.open(shards), opened(shards, tmp_path))
    )
    assert_same(batches(other, 0), batches(one, 0))
    other.close()


def test_auto_reads_small_splits_from_memory_and_training_images_shard_by_shard(shards, tmp_path):
    remote = opened(shards, tmp_path)
    pytest.importorskip("nvidia.dali")
    training = loader(remote, "auto")
    assert (training.backend, training.reason) == ("dali", f"dali: shards are fetched from file://{shards}")
    meta = make_loader(remote, "meta", backend="auto", batch_size=4, device="cpu", train=False, crop=CropSpec("none"))
    assert meta.backend == "resident"
    training.close()
    with pytest.raises(ValueError, match="the 'resident' backend reads data sets that are on the disk as a whole"):
        loader(remote, "resident")


def test_shards_are_fetched_ahead_and_not_further_than_that(shards, tmp_path):
    remote = opened(shards, tmp_path)
    one = loader(remote, "torch", num_workers=0)
    running = one.epoch(0)
    next(running)
    fetching = one._fetching
    assert fetching.room == one.ahead == 2 * ORDER.parts * ORDER.block
    deadline = 50
    while len(on_disk(remote)) < 8 and deadline:
        prefetched_loader.time.sleep(0.1)
        deadline -= 1
    assert len(on_disk(remote)) == 8
    needed = {number for number, _ in fetching.queue[:8]}
    assert on_disk(remote) == sorted(f"train-{number:05d}.tar" for number in needed)
    for _ in running:
        assert len(fetching._held) <= 8
    one.close()
    assert not fetching._held


def test_what_is_on_the_disk_is_not_fetched_again(shards, tmp_path):
    first = loader(opened(shards, tmp_path), "torch", num_workers=0)
    batches(first, 0)
    again = opened(shards, tmp_path)
    second = loader(again, "torch", num_workers=0)
    batches(second, 1)
    assert again.files.figures.files == 0
    assert second.asked == 22
    first.close()
    second.close()


@pytest.mark.parametrize("backend", EVERY_READER)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changed_is_never_read(server, tmp_path, backend, workers, monkeypatch):
    if backend == "dali" and workers == 0:
        pytest.skip("dali has threads of its own")
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.01)
    remote = opened(server, tmp_path / "cache")
    one = loader(remote, backend, num_workers=workers)
    changed = server / "dali" / "train-00007.tar"
    changed.write_bytes(changed.read_bytes()[:-2000] + bytes(2000))
    seen = []
    with pytest.raises(DamageError, match=r"train-00007.tar: its sha256 is not what its manifest says"):
        seen.extend(batch.index for batch in one.epoch(0))
    one.close()
    assert not any((index // 20 == 7).any() for index in seen)
    assert "train-00007.tar" not in on_disk(remote)


@pytest.mark.parametrize("backend", EVERY_READER)
def test_a_server_that_goes_away_is_one_sentence(server, tmp_path, backend, monkeypatch):
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.01)
    monkeypatch.setattr(remote_folder, "PATIENCE_S", 0.1)
    one = loader(opened(server, tmp_path / "cache"), backend)
    shutil.rmtree(server)
    with pytest.raises(RemoteError, match=r"train-000.*: there is no such file; data.converted is the URL") as raised:
        batches(one, 0)
    one.close()
    assert "\n" not in str(raised.value)


def test_a_damaged_manifest_and_data_sets_without_shards(server, tmp_path):
    path = server / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 1'))
    with pytest.raises(DamageError, match=r"manifest.json is not what was written; it was edited or damaged"):
        opened(server, tmp_path / "cache")
    path.write_text("no manifest")
    with pytest.raises(DamageError, match=f"file://{server}/manifest.json is not a manifest of a converted data set"):
        opened(server, tmp_path / "cache")
    del manifest["formats"]["dali"]
    manifest["formats"]["ffcv"] = {}
    manifest["files"] |= {f"{split}.beton": {"bytes": 1, "sha256": ""} for split in ("train", "meta", "test")}
    path.write_text(sealed(manifest))
    with pytest.raises(
        ValueError, match=r"it was converted to .beton files only; make one with `fastlt convert SOURCE"
    ):
        opened(server, tmp_path / "cache")
    path.unlink()
    with pytest.raises(
        RemoteError, match=r"manifest.json: there is no such file; data.converted is the URL of a folder"
    ):
        opened(server, tmp_path / "cache")


def test_a_manifest_that_changes_while_a_run_begins(server, tmp_path):
    seal = opened(server, tmp_path / "cache").seal
    assert opened(server, tmp_path / "cache", seal=seal).seal == seal
    with pytest.raises(DamageError, match="became another data set while the run began"):
        opened(server, tmp_path / "cache", seal="another")


def test_a_cache_without_room_for_what_is_in_use(shards, tmp_path):
    remote = opened(shards, tmp_path)
    needed = sum(path.stat().st_size for path in remote.root.rglob("*.[nt]*") if path.suffix in (".npz", ".tar"))
    trains = sorted(path.stat().st_size for path in shards.glob("dali/train-*.tar"))[-12:]
    opened(shards, tmp_path, needed + sum(trains)).check_room(12)
    with pytest.raises(
        NoRoomError, match=r"data.stream.cache_gb is .* but 12 training shards of file://.*: give 0.\d+ or"
    ):
        opened(shards, tmp_path, needed + sum(trains) - 1).check_room(12)


def test_batches_of_a_url_keep_its_files_in_the_cache(shards, tmp_path):
    with build_loader(f"file://{shards}", "train", 16, loader="torch", num_workers=0, cache=tmp_path):
        kept = [path for path in tmp_path.glob("fastlt-*/**/*.npz") if not _remove_unused(path)]
    assert {path.name for path in kept} == {"labels.npz", "train.npz", "meta.npz", "test.npz"}


# Recipes and runs


@pytest.mark.parametrize(("workers", "more"), [(0, 0), (1, 4), (3, 10)])
def test_what_workers_read_ahead_needs_room(shards, tmp_path, monkeypatch, workers, more):
    """Two batches of 64 of each worker, from shards of 20 in each of two segments."""
    asked = []
    monkeypatch.setattr(StreamedDataset, "check_room", lambda dataset, shards: asked.append(shards))
    run = words(f"file://{shards}", tmp_path, f"data.num_workers={workers}", f"{STAGE}.batch_size=64")
    prepare(load_recipe(RECIPE, run))
    assert asked == [12 + 2 * more]


def words(place: str | Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *(f"data.converted={place}", f"data.stream={{parts: 2, block: 2, cache: {tmp_path / 'cache'}}}"),
        *(f"runs={tmp_path / 'runs'}", "data.loader=torch", "data.num_workers=0", "num_threads=1", "log_every=1"),
        *(f"{STAGE}.iterations=12", f"{STAGE}.warmup=2", f"{STAGE}.evaluate_every=6", *more),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(last_checkpoint(folder))["step"]["model"]


def test_a_recipe_with_a_url_is_read_by_shards(tmp_path):
    recipe = load_recipe(RECIPE, words("https://host/digits", tmp_path))
    assert recipe.data.order == "shards"
    assert load_recipe(RECIPE, words("/data/digits", tmp_path)).data.order == "images"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.loader=ffcv", "data.loader: is 'ffcv', which reads data sets that are on the disk as a whole, but"),
        ("data.loader=resident", "allowed with it: auto, torch, dali"),
        ("data.order=images", "data.order: is 'images', which needs all images at any time"),
        (
            f"{STAGE}.sampling=class_balanced",
            "sampling: is 'class_balanced', which takes images of any class at any time",
        ),
        ("data.stream.parts=1000", "each of 1000 data.stream.parts has a place in every batch"),
        ("data.converted=htps://host/x", "data.converted: htps://host/x begins with htps://; allowed are https://"),
        ("data.converted=https://me:secret@host/x", "data.converted: the URL of host holds a password"),
        ("data.convert=false", "data.convert: is false, but data.converted names a folder"),
    ],
)
def test_what_a_url_cannot_be_combined_with(tmp_path, word, says):
    with pytest.raises(RecipeError) as raised:
        load_recipe(RECIPE, words("https://host/digits", tmp_path, word))
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_run_on_a_url_is_that_on_a_local_copy_and_goes_on_on_it(shards, tmp_path):
    assert main([str(RECIPE), *words(shards, tmp_path, "name=local", "data.order=shards")]) == 0
    remote = [str(RECIPE), *words(f"file://{shards}", tmp_path, "name=remote")]
    trainer = Trainer(prepare(load_recipe(remote[0], remote[1:])))
    with pytest.raises(Interrupted):
        stop_after(trainer, 4).fit()  # in the middle of an epoch of six
    again = [word for word in remote if not word.startswith("data.converted")]
    assert main([*again, f"data.converted={shards}", "data.order=shards", "data.stream.cache_gb=5"]) == 0
    one, other = (weights(tmp_path / "runs" / name) for name in ("local", "remote"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_shards_of_the_same_images_are_another_order(shards, tmp_path, capsys):
    assert main([str(RECIPE), *words(f"file://{shards}", tmp_path)]) == 0
    other = convert_digits(tmp_path / "other", shard_images=30)
    capsys.readouterr()
    assert main([str(RECIPE), *words(f"file://{other}", tmp_path, f"{STAGE}.iterations=14")]) == 2
    assert "its training images lie in other shards, which decide their order" in capsys.readouterr().err
    assert main([str(RECIPE), *words(shards, tmp_path)]) == 2
    assert "data.order: 'shards' and 'images'" in capsys.readouterr().err


def test_before_training_all_mistakes_end_with_code_2(server, tmp_path, capsys, monkeypatch):
    """And during it a server that is gone is not the user's doing: what was saved stays."""
    monkeypatch.setattr(remote_folder, "PAUSE_S", 0.01)
    small = f"data.stream={{parts: 2, block: 2, cache: {tmp_path / 'cache'}, cache_gb: 0.0001}}"
    assert main([str(RECIPE), *words(f"file://{server}", tmp_path, small)]) == 2
    assert "full of files in use" in capsys.readouterr().err
    assert main([str(RECIPE), *words(f"file://{server}/nothing", tmp_path)]) == 2
    assert "/nothing/manifest.json: there is no such file" in capsys.readouterr().err
    assert main([str(RECIPE), *words(f"file://{server}", tmp_path, "data.imbalance_factor=7")]) == 2
    assert f"file://{server} holds another data set than the recipe asks for" in capsys.readouterr().err
    run = words(f"file://{server}", tmp_path, f"{STAGE}.evaluate_every=1")
    trainer = Trainer(prepare(load_recipe(RECIPE, run)))
    del trainer
    for shard in server.glob("dali/train-*.tar"):
        shard.unlink()
    assert main([str(RECIPE), *run]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt:")]
    assert "there is no such file" in line


def test_images_of_a_class_are_spread_over_the_parts(shards):
    """As labels lie in a converted data set, sorted by class, so that a block has few of them."""
    labels = ConvertedDataset.open(shards).labels("train")
    first = np.arange(0, len(labels), 20)
    order = ShardOrder(8, 2).draw(first, np.arange(len(labels)), 64, np.random.default_rng(0))
    classes = [len(np.unique(labels[batch])) for batch in order[: len(order) // 64 * 64].reshape(-1, 64)]
    assert np.mean(classes) > 4
