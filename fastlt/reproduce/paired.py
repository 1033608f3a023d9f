"""The difference of two settings, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float] | None:
    """The mean difference ours - theirs over the seeds of both, and half of its 95 % interval by Student's t.

    ours, theirs: a value by seed. None below two common seeds.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return None
    differences = np.array([ours[seed] - theirs[seed] for seed in common])
    half = stats.t.ppf(0.975, len(common) - 1) * differences.std(ddof=1) / len(common) ** 0.5
    return float(differences.mean()), float(half)
