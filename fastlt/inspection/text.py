"""A profile for the terminal, of any width and encoding, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlt.inspection.loading import Loading
from fastlt.inspection.profile import SMALL_SIDE, Profile
from fastlt.inspection.suggestion import Suggestion
from loaders.sources.duplicates import KINDS
from loaders.sources.messages import printable, readable_bytes, some

BARS = 20  # lines of the profile, at most; more classes are binned by rank
NARROWEST, WIDEST = 32, 120
SMALLEST = 8  # classes that are named
BLOCK = "█"
ASCII = {BLOCK: "#", "…": "...", "×": "x"}


def to_text(
    profile: Profile,
    loading: Loading | None,
    suggestion: Suggestion,
    *,
    width: int,
    encoding: str | None,
    written: bool = False,
) -> str:
    """The lines for a console of so many columns; where its encoding lacks a sign, ASCII stands for it.

    written: whether the suggested recipe is in a file.
    """
    width = max(NARROWEST, min(width, WIDEST))
    parts = [
        *_splits(profile),
        "",
        *_bars(profile, width, encoding),
        "",
        *_classes(profile),
        "",
        *_files(profile),
        "",
        *_loading(profile, loading),
        "",
        *_recipe(suggestion, written),
    ]
    lines = []
    for line in (_shown(part, encoding) for part in parts):
        lines += [line] if len(line) <= width else textwrap.wrap(line, width, subsequent_indent="  ")
    return "\n".join(lines)


def _shown(text: str, encoding: str | None) -> str:
    """With ASCII for the signs that the console lacks."""
    for sign, plain in ASCII.items():
        if sign in text and not _can_show(sign, encoding):
            text = text.replace(sign, plain)
    return text


def _can_show(sign: str, encoding: str | None) -> bool:
    try:
        sign.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _splits(profile: Profile) -> list[str]:
    lines = list(profile.notes)
    for name, split in profile.splits.items():
        lines.append(f"{name}: {len(split):,} images; {split.provenance}")
    return lines


def _bars(profile: Profile, width: int, encoding: str | None) -> list[str]:
    """Training images of each class, the largest first; means of ranks where there are many classes."""
    counts = profile.class_counts.counts
    order = np.argsort(-counts, kind="stable")
    if len(order) <= BARS:
        rows = [(_shown(_short(profile.class_names[c], width // 3), encoding), float(counts[c])) for c in order]
    else:
        rows = []
        for ranks in np.array_split(np.arange(len(order)), BARS):
            label = f"rank {ranks[0] + 1:,}-{ranks[-1] + 1:,}" if len(ranks) > 1 else f"rank {ranks[0] + 1:,}"
            rows.append((label, float(counts[order[ranks]].mean())))
    names = max(len(name) for name, _ in rows)
    numbers = [f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}" for _, value in rows]
    digits = max(map(len, numbers))
    room = max(1, width - names - digits - 2)
    largest = max(value for _, value in rows)
    title = "training images" + (", means over classes by rank" if len(order) > BARS else " by class")
    return [
        title,
        *(
            f"{name:{names}} {number:>{digits}} {BLOCK * max(1, round(room * value / largest))}"
            for (name, value), number in zip(rows, numbers, strict=True)
        ),
    ]


def _short(name: str, length: int) -> str:
    """The beginning and the end of a name that is too long."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 3) :]}"


def _classes(profile: Profile) -> list[str]:
    counts, names = profile.class_counts, profile.class_names
    order = np.argsort(counts.counts, kind="stable")[:SMALLEST]
    shots = []
    for (name, mask), words in zip(
        counts.shot_masks().items(), ("more than 100 images", "20 to 100", "fewer than 20"), strict=True
    ):
        images = int(counts.counts[mask].sum())
        shots.append(f"{name}-shot ({words}): {int(mask.sum()):,} classes, {images:,} images")
    lines = [
        f"{counts.num_classes:,} classes, {counts.counts.max():,} to {counts.counts.min():,} training images, "
        f"imbalance factor {counts.imbalance_factor:.4g}",
        *shots,
        f"smallest classes: {', '.join(f'{printable(names[c])} {counts.counts[c]:,}' for c in order)}",
    ]
    for split in ("meta", "test"):
        absent = profile.absent(split)
        if absent:
            lines.append(f"{split} lacks {len(absent):,} of {len(names):,} classes: {some(absent, ', ')}")
    return lines


def _files(profile: Profile) -> list[str]:
    lines = []
    sizes = profile.known_sizes
    if len(sizes):
        heights, widths = sizes.T
        ranges = [
            f"{what} {_low_median_high(values)}"
            for what, values in (("width", widths), ("height", heights), ("width/height", widths / heights))
        ]
        lines.append(f"sizes (least, median, most): {'; '.join(ranges)}")
        small = f"{profile.small_share:.1%} of the images have {SMALL_SIDE} pixels or less on their shorter side"
        lines.append(small)
    lines.append(f"on disk: {readable_bytes(profile.disk_bytes)}")
    if profile.unreadable:
        lines.append(f"headers that cannot be read: {len(profile.unreadable):,}")
        lines += [f"  {name}: {reason}" for name, reason in profile.unreadable[:5]]
    elif not profile.converted:
        lines.append("headers: all can be read (`fastlt convert` decodes the pixels, too)")
    groups = {kind: count for kind, count in profile.copies.groups.items() if count}
    if not groups:
        lines.append("exact duplicates: none")
    for kind, count in groups.items():
        images = profile.copies.images.get(kind, 0)
        what = "groups" if count > 1 else "group"
        lines.append(f"exact duplicates {KINDS[kind]}: {count:,} {what} of {images:,} images")
        named = [names for known, names in profile.copies.named if known == kind]
        lines += [f"  {some(names, ' = ')}" for names in named[:3]]
    return lines


def _low_median_high(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in (values.min(), np.median(values), values.max()))


def _loading(profile: Profile, loading: Loading | None) -> list[str]:
    if loading is None:
        return ["loaders: unknown, for no header of a split can be read"]
    lines = [f"memory of each loader, with {readable_bytes(loading.free)} free on {loading.device}"]
    for name, needed in loading.needed.items():
        if needed is None:
            lines.append(f"  {name}: batches alone")
        else:
            what = "pixels" if name == "resident" else "files with --mode jpg, at most"
            train, whole = readable_bytes(needed["train"]), readable_bytes(sum(needed.values()))
            lines.append(f"  {name}: {train} for train, {whole} in all ({what})")
    lines.append(f"auto takes {loading.reason}")
    decoding = profile.decoding
    if decoding is None or loading.decoding_s is None:
        lines.append("decoding: not measured, for no image of the sample can be decoded")
        return lines
    often = "once, when training begins" if loading.once else "in every epoch"
    lines.append(
        f"expected: the training images are decoded in {_duration(loading.decoding_s)}, {often}. Measured: "
        f"{decoding.images:,} of them by {decoding.decoder}, {decoding.images_per_s:,.0f} a second on one core, times "
        f"{loading.cores} cores. The network's own time is not in it: `fastlt benchmark step` measures that"
    )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _recipe(suggestion: Suggestion, written: bool) -> Sequence[str]:
    stage, data = suggestion.stage, suggestion.data
    how = "" if written else "; --recipe FILE.yaml writes it"
    return [
        f"suggested recipe: {suggestion.model['name']}, {data['image_size']} pixels, {stage['method']} with "
        f"{stage['loss']}, {stage['epochs']} epochs, batch {stage['batch_size']}, lr {stage['lr']:g}{how}",
        *(f"  {reason}" for reason in suggestion.reasons),
    ]


def to_tree(profile: Profile, loading: Loading | None, suggestion: Suggestion, why: str) -> dict[str, Any]:
    """All of it, for JSON."""
    counts, sizes = profile.class_counts, profile.known_sizes
    heights, widths = sizes.T if len(sizes) else (np.zeros(0), np.zeros(0))
    measures = {"width": widths, "height": heights, "aspect": widths / np.maximum(heights, 1)}
    decoding = profile.decoding
    return {
        "source": profile.source,
        "recognised_by": why,
        "place": profile.place,
        "converted": profile.converted,
        "notes": list(profile.notes),
        "splits": {
            name: {
                "images": len(split),
                "provenance": split.provenance,
                "class_counts": profile.counts(name).tolist(),
                "absent_classes": profile.absent(name),
            }
            for name, split in profile.splits.items()
        },
        "class_names": list(profile.class_names),
        "imbalance_factor": counts.imbalance_factor,
        "shots": {
            name: {"classes": int(mask.sum()), "images": int(counts.counts[mask].sum())}
            for name, mask in counts.shot_masks().items()
        },
        "sizes": {
            name: dict(zip(("min", "median", "max"), map(float, (v.min(), np.median(v), v.max())), strict=True))
            for name, v in measures.items()
            if len(v)
        },
        "small_share": profile.small_share,
        "small_side": SMALL_SIDE,
        "disk_bytes": profile.disk_bytes,
        "unreadable": [{"image": name, "reason": reason} for name, reason in profile.unreadable],
        "duplicates": {
            "groups": dict(profile.copies.groups),
            "images": dict(profile.copies.images),
            "named": [{"kind": kind, "images": list(names)} for kind, names in profile.copies.named],
        },
        "loading": None
        if loading is None
        else {
            "device": loading.device,
            "free_bytes": loading.free,
            "needed_bytes": {n: None if of is None else dict(of) for n, of in loading.needed.items()},
            "auto": loading.auto,
            "reason": loading.reason,
            "cores": loading.cores,
            "decoding_train_s": loading.decoding_s,
            "decoded_once": loading.once,
        },
        "decoding": None
        if decoding is None
        else {
            "images": decoding.images,
            "seconds": decoding.seconds,
            "decoder": decoding.decoder,
            "images_per_s_per_core": decoding.images_per_s,
            "mean": list(decoding.mean),
            "std": list(decoding.std),
        },
        "suggestion": {"recipe": suggestion.tree, "reasons": list(suggestion.reasons)},
    }
