"""The state that each process has of its own, when a run goes on with another number of processes.

streams of augmentations    begin anew, from a seed that the run's seed, its iteration and the processes give
results of the meta set     go to the processes that score these images now
BatchNorm's statistics      are the means over the processes before, as an evaluation takes them
default random generators   begin anew, likewise
loaders chosen by `auto`    stay those of process 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlt.device.random_states import derived_seed, random_states
from fastlt.meta.class_accuracy import redistributed_results

STREAMS = ("augment", "meta_augment", "second_augment")  # of a step's state


def redistributed(
    processes: Sequence[Mapping[str, Any]], rank: int, world_size: int, *, seed: int, done: int
) -> dict[str, Any]:
    """The own state of process `rank` of `world_size`.

    processes: what each process had, by its rank, as a checkpoint holds it; left as it is. seed: of the run. done:
    iterations over all stages.
    """
    first = processes[0]
    step: dict[str, Any] = dict(first["step"])
    for stream in STREAMS:
        if step.get(stream) is not None:
            step[stream] = {"generator": _generator(seed, done, rank, world_size, stream)}
    if step.get("class_accuracy") is not None:
        results = [one["step"]["class_accuracy"] for one in processes]
        step["class_accuracy"] = redistributed_results(results, rank, world_size)
    means = {key: _means([one[key] for one in processes]) for key in ("buffers", "average_buffers") if key in first}
    return {**first, "step": step, **means, "random": _default_generators(seed, done, rank, world_size)}


def _generator(*seeds: object) -> Tensor:
    """The state of a generator that these seeds give."""
    return torch.Generator().manual_seed(derived_seed(*seeds)).get_state()


def _default_generators(*seeds: object) -> dict[str, Any]:
    """`random_states` that these seeds give."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derived_seed(*seeds))
        return random_states()


def _means(buffers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Floating-point buffers as means over processes; counters, which are the same on each, as they are."""
    return {
        name: torch.stack([one[name] for one in buffers]).mean(0) if first.is_floating_point() else first
        for name, first in buffers[0].items()
    }
