"""CIFAR-10 and CIFAR-100 in each form they are published in: pickles or binary records, a folder or the .tar.gz."""

from __future__ import annotations

import codecs
import io
import pickle
import socket
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.order.longtail import apply_convention
from loaders.sources.source import Source
from loaders.sources.split import ArraySplit

PIXEL_BYTES = 3 * 32 * 32
HOME_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Form:
    """One published form: its folder, its archive, and the names of its files."""

    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    names_file: str
    is_pickle: bool

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, *self.test_files, self.names_file)


@dataclass(frozen=True)
class CifarSpec:
    """What a CIFAR data set must look like; the last of a binary record's `label_bytes` is the label."""

    name: str
    num_classes: int
    num_train: int
    num_test: int
    label_key: str
    names_key: str
    label_bytes: int
    torchvision_class: str
    forms: tuple[Form, ...]


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10 = CifarSpec(
    "cifar10", 10, 50_000, 10_000, "labels", "label_names", 1, "CIFAR10",
    (
        Form("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, ("test_batch",), "batches.meta", True),
        Form(
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz",
            tuple(f"{name}.bin" for name in _BATCHES), ("test_batch.bin",), "batches.meta.txt", False,
        ),
    ),
)  # fmt: skip
CIFAR100 = CifarSpec(
    "cifar100", 100, 50_000, 10_000, "fine_labels", "fine_label_names", 2, "CIFAR100",
    (
        Form("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta", True),
        Form(
            "cifar-100-binary", "cifar-100-binary.tar.gz",
            ("train.bin",), ("test.bin",), "fine_label_names.txt", False,
        ),
    ),
)  # fmt: skip


def open_cifar(
    spec: CifarSpec,
    root: Path,
    *,
    imbalance_factor: float | None,
    convention: str,
    meta_per_class: int,
    download: bool,
) -> Source:
    """CIFAR-10/100 cut by one of the two long-tailed conventions.

    Raises ValueError when the data are not there and cannot be downloaded, or are not what they should be.
    """
    train, test, class_names = read_cifar(spec, root, download=download)
    tail = apply_convention(convention, train.labels, imbalance_factor, meta_per_class, spec.num_classes)
    where = train.provenance
    splits = {}
    for name, rows in (("train", tail.train), ("meta", tail.meta)):
        part = train.subset(rows)
        splits[name] = ArraySplit(part.pixels, part.labels, part.rows, part.origin, f"{where}: {tail.provenance}")
    splits["test"] = test
    return Source(spec.name, class_names, splits)


def open_whole_cifar(spec: CifarSpec, root: Path, *, download: bool) -> Source:
    """CIFAR-10/100 as published, train and test. ValueError as `open_cifar`."""
    train, test, class_names = read_cifar(spec, root, download=download)
    return Source(spec.name, class_names, {"train": train, "test": test})


def read_cifar(spec: CifarSpec, root: Path, *, download: bool) -> tuple[ArraySplit, ArraySplit, tuple[str, ...]]:
    """All training images, all test images and the class names of a CIFAR data set, in file order.

    Both splits hold uint8 (N, 32, 32, 3). Raises ValueError as `open_cifar`.
    """
    if download and _find(spec, root) is None:
        _download(spec, root)
    found = _find(spec, root)
    if found is None:
        raise ValueError(_absent(spec, root))
    form, read, where = found
    class_names = _class_names(spec, form, read, where)
    splits = []
    for split, files, expected in (
        ("train", form.train_files, spec.num_train),
        ("test", form.test_files, spec.num_test),
    ):
        parts = [_records(spec, form, read(file), f"{where}/{file}") for file in files]
        pixels = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        if len(labels) != expected:
            raise ValueError(f"{where} holds {len(labels):,} {split} images, {spec.name} has {expected:,}: get it anew")
        pixels = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        splits.append(ArraySplit.whole(pixels, labels, origin=split, provenance=f"{spec.name} {split} from {where}"))
    return splits[0], splits[1], class_names


def _find(spec: CifarSpec, root: Path) -> tuple[Form, Callable[[str], bytes], str] | None:
    """The first form that is under `root` (or is `root`), a function that reads its files, and where it is."""
    for form in spec.forms:
        for folder in (root / form.folder, root):
            there = [name for name in form.files if (folder / name).is_file()]
            # Inside `root` itself a lone `train` or `meta` may be anything: only the whole set of files counts there.
            if there and (folder != root or len(there) == len(form.files)):
                missing = [name for name in form.files if name not in there]
                if missing:
                    raise ValueError(f"{folder} is incomplete: {', '.join(missing)} missing; unpack the archive again")
                return form, lambda name, folder=folder: (folder / name).read_bytes(), str(folder)
    for form in spec.forms:
        for archive in (root / form.archive, root):
            if archive.is_file() and archive.name == form.archive:
                contents = _unpack(archive, form)
                return form, contents.__getitem__, str(archive)
    return None


def _unpack(archive: Path, form: Form) -> dict[str, bytes]:
    """The archive's files, read into memory in one pass (a .tar.gz cannot be sought in)."""
    contents = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in form.files and (file := tar.extractfile(member)) is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again from {HOME_PAGE}") from None
    missing = [name for name in form.files if name not in contents]
    if missing:
        raise ValueError(f"{archive} does not hold {', '.join(missing)}: download it again from {HOME_PAGE}")
    return contents


def _download(spec: CifarSpec, root: Path) -> None:
    import torchvision.datasets  # lazily: heavy, and only this branch needs it

    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none: behind a firewall it would wait for ever
    try:
        getattr(torchvision.datasets, spec.torchvision_class)(str(root), download=True)
    except Exception as error:  # URLError, RuntimeError, OSError, …: whatever it was, the files are not here
        raise ValueError(f"{_absent(spec, root)}; the download failed: {error}") from None
    finally:
        socket.setdefaulttimeout(timeout_s)


def _absent(spec: CifarSpec, root: Path) -> str:
    forms = " or ".join(f"{form.archive} (or its folder {form.folder})" for form in spec.forms)
    return f"{spec.name} is not under {root.absolute()}: download it from {HOME_PAGE} and put {forms} there"


def _records(spec: CifarSpec, form: Form, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, uint8 (N, 3072) channel first, and labels, int64 (N,), of one file, checked."""
    if form.is_pickle:
        pixels, labels = _pickled_records(spec, data, where)
    else:
        size = spec.label_bytes + PIXEL_BYTES
        if not data or len(data) % size:
            raise ValueError(f"{where} is damaged: {len(data):,} bytes are not a multiple of {size}; get it anew")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
        pixels, labels = records[:, spec.label_bytes :], records[:, spec.label_bytes - 1].astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < spec.num_classes):
        raise ValueError(
            f"{where} holds labels {labels.min()} to {labels.max()}, {spec.name} has 0 to {spec.num_classes - 1}"
        )
    return pixels, labels


def _pickled_records(spec: CifarSpec, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_pickle(data, where)
    absent = [key for key in ("data", spec.label_key) if key not in batch]
    if absent:
        raise ValueError(f"{where} has no {absent[0]!r} entry, so it is no {spec.name} batch; it has {sorted(batch)}")
    pixels, labels = batch["data"], batch[spec.label_key]
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (PIXEL_BYTES,)):
        raise ValueError(f"{where}: 'data' is not a uint8 array of N x {PIXEL_BYTES}")
    labels = np.asarray(labels)
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: {spec.label_key!r} is not one whole number for each of the {len(pixels):,} images")
    return pixels, labels.astype(np.int64)


def _class_names(spec: CifarSpec, form: Form, read: Callable[[str], bytes], where: str) -> tuple[str, ...]:
    data, where = read(form.names_file), f"{where}/{form.names_file}"
    if form.is_pickle:
        names = [_text(name) for name in load_pickle(data, where).get(spec.names_key, ())]
    else:
        names = [line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip()]
    if len(names) != spec.num_classes:
        raise ValueError(f"{where} names {len(names)} classes, {spec.name} has {spec.num_classes}: get it anew")
    return tuple(names)


def load_pickle(data: bytes, where: str) -> dict:
    """Unpickle a dictionary of numpy arrays and plain containers, keys as str; anything else is refused.

    Raises ValueError when the pickle is damaged, asks for another class (a pickle can run any code), or is no dict.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: Python 2 wrote the originals
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{where} cannot be read as a CIFAR pickle ({error}): get it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a dictionary: this is no CIFAR file")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes: `_codecs.encode(text, "latin1")`; other codecs are not needed, so not allowed."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return codecs.encode(text, "latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what a pickled numpy array or plain container needs, under its old and its new names."""

    numpy_modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
                     "numpy._core.numeric")  # fmt: skip
    numpy_names = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
    containers = ("list", "dict", "tuple", "set", "frozenset", "bytes", "bytearray", "int", "str")

    def find_class(self, module: str, name: str) -> object:
        if module in self.numpy_modules and name in self.numpy_names:
            # NumPy 2 renamed numpy.core; NumPy 1 does not know the new name.
            core = "_core" if hasattr(np, "_core") else "core"
            return super().find_class(
                module.replace("numpy._core", f"numpy.{core}").replace("numpy.core", f"numpy.{core}"), name
            )
        if module in ("builtins", "__builtin__") and name in self.containers:
            return super().find_class("builtins", name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data file has no need of")
