"""The tables of backends and sources: one row each, which agrees with the file it stands for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_betons import EVERY_BACKEND

from fastlt.recipe.schema import DataRecipe
from loaders.readers import AUTO, BACKENDS, formats_for
from loaders.readers.base_loader import BaseLoader
from loaders.sources import SOURCES, sources_taking
from loaders.stored import FORMATS, SOURCE_FILES


def test_importing_the_tables_is_light():
    heavy = "torch", "nvidia", "ffcv", "numba", "torchvision", "sklearn", "cv2"
    code = f"import sys, loaders.readers, loaders.sources; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_each_row_names_a_loader_of_its_own_name(name):
    loader = BACKENDS[name].load()
    assert issubclass(loader, BaseLoader)
    assert loader.backend == BACKENDS[name].name == name


def test_every_format_is_streamed_by_one_backend_that_reads_it():
    streams = {backend.streams: backend for backend in BACKENDS.values() if backend.streams is not None}
    assert set(streams) == {*FORMATS, SOURCE_FILES}
    assert all(kind in backend.reads for kind, backend in streams.items())
    assert all(set(backend.reads) <= {*FORMATS, SOURCE_FILES} for backend in BACKENDS.values())


def test_a_data_set_made_for_one_loader_serves_it_and_auto():
    for name in (AUTO, *BACKENDS):
        assert "ffcv" in formats_for(name)
        assert name == AUTO or BACKENDS[name].reads[0] in formats_for(name)
    assert formats_for("ffcv") == formats_for(AUTO) == ("ffcv",)
    assert formats_for("resident_jpeg") == formats_for("dali") == ("ffcv", "dali")


def test_what_a_source_takes_is_what_a_recipe_or_a_conversion_can_say():
    keys = set(DataRecipe.__dataclass_fields__) | {"allow_duplicates"}
    assert all(set(kind.takes) <= keys for kind in SOURCES.values())
    assert {"cifar10", "cifar100"} <= set(sources_taking("download")) & set(sources_taking("convention"))
    assert "list_file" in sources_taking("train_list")
    assert "digits" not in sources_taking("root")
    assert all(SOURCES[name].small for name in sources_taking("download"))
