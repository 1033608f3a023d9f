"""The classes of a data set as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastlt.inspection.profile import Profile
from fastlt.report.style import INK, SHOTS, WRITERS, in_style, new_figure
from fastlt.run.atomic_file import write_atomically


def draw(profile: Profile, path: Path) -> None:
    """Write training images by the rank of the class, in the colours of the shots, and the other splits as lines."""
    counts = profile.class_counts
    order = np.argsort(-counts.counts, kind="stable")
    with in_style():
        title = f"{len(order):,} classes, imbalance factor {counts.imbalance_factor:.4g}"
        figure, axes = new_figure(title)
        ranks = np.arange(1, len(order) + 1)
        for name, mask in counts.shot_masks().items():
            inside = mask[order]
            if inside.any():
                label = f"{name}-shot, {int(inside.sum()):,} classes"
                height = np.where(inside, counts.counts[order], np.nan)
                edges = np.append(ranks - 0.5, ranks[-1] + 0.5)
                axes.stairs(height, edges, fill=True, color=SHOTS[name], label=label)
        for split, dashes in (("meta", ":"), ("test", "--")):
            of_split = profile.counts(split)[order]
            axes.step(ranks, np.where(of_split > 0, of_split, np.nan), dashes, where="mid", color=INK, label=split)
        axes.set_yscale("log")
        axes.set_xlabel("rank of the class by its training images")
        axes.set_ylabel("images")
        axes.legend()
        write_atomically(path, WRITERS[path.suffix.lower()](figure))
