"""Time, memory and exactness of a training step: plain, ours, and other ways to the same meta-gradient.

plain            descent on the mean loss: what a step costs without a learned weighting
ours_frozen      fastlt's step, the class accuracies given: the cost of the exact meta-gradient alone
ours_exact       ... with the accuracies measured on the whole meta set (10 images a class) in every step
ours_rolling     ... on a tenth of it in every step, or on --images-per-step images
double_backward  the same gradient by torch's create_graph
higher, torchopt the same gradient by these packages

On request (--rows), with the accuracies given, what takes less memory, and what costs less than exactness can:
general          as exact; with passes of their own for lookahead, tangent and update, also where one pass serves all
lean             as exact; activations that are cheap to compute are computed again
fp32_tangent     in bf16, the tangent is float32, and not of the training pass's types
late_weights     the update takes the weights of the lookahead
lookahead_head   the lookahead moves the head alone
late_head        both late_weights and lookahead_head

Times are medians of rounds in which every way takes one step in turn, in one process on the same data, after steps
that are not measured. Ratios are medians of the ratios within a round, so that what slows the machine down slows both.
The gradient is that of the meta loss in the parameters of Difficulty-Net, in the first step; its error is relative, in
norm, to the same gradient in float64. The peak memory of a CPU is that of the resident set over two steps, in a process
for each way, above what was resident before (torch, model, data, and a step on 8 images, so that libraries are
loaded); it holds the activations and everything the libraries allocate for themselves. Linux only. On a GPU it is
the allocator's peak above what was allocated before, of a step that is not compiled.

With --processes N so many processes of this machine take a step together; batches are those of all of them, and each
takes its part. A table of its own tells what a process communicates in a step, and which share of the step's time is
exposed: not hidden behind computation. That is how much longer the step takes than one without communication, which the
processes take in turns with it; at once is the same where no gradient is on its way before all are computed. Times are
those of the slowest process. Memory, errors and the rows of other packages are left out.

With --compile cudagraph all ways are captured, the packages' whole step like ours. On a GPU the last column is the
share of the device's matrix rate that a way gets: the operations that torch counts in its convolutions and matrix
products, by its time, by the rate of a large matrix product in the same precision (TF32, for fp32 convolutions that
may use it).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlt.arguments import make_parser, positive, worker_count
from fastlt.benchmarks import communication
from fastlt.benchmarks.meta_steps import ON_REQUEST, OWN, WAYS, Problem, Way, float64_gradient, make_problem, missing
from fastlt.benchmarks.options import add_device
from fastlt.benchmarks.rounds import median_ratio, report
from fastlt.device.available import wait_for
from fastlt.device.compiled import MODES
from fastlt.device.host_memory import allocator, keep_freed_memory
from fastlt.device.openmp import runtime
from fastlt.models.classifier import check_model
from fastlt.models.trained_part import WORDS
from fastlt.recipe.yaml_text import parse as parse_yaml

NAME = "fastlt benchmark step"
# Steps between two waits for a GPU, which otherwise idles while the first kernels are launched; not of LONG ones.
IN_A_ROW, LONG = 10, 0.2  # seconds


@dataclass(frozen=True)
class Row:
    """One way; None where it has no value. `why`: it could not be measured at all, or not as --compile says.

    matrix_share: operations of its convolutions and matrix products a second, of the rate that the device was measured
    to have; on a GPU only.
    """

    name: str
    ms: float | None = None
    ratio_plain: float | None = None
    ratio_frozen: float | None = None
    peak_bytes: int | None = None
    grad_rel_error: float | None = None
    matrix_share: float | None = None
    why: str | None = None


def main(arguments: list[str], prog: str = NAME) -> int:
    """Measure and print; returns the exit code."""
    words = parse(arguments, prog)
    if words.threads:
        torch.set_num_threads(words.threads)
    # As the trainer does; every way gains.
    if words.device == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
    if words.peak_of:
        print(peak_on_cpu(words))
        return 0
    check_model(words.backbone)
    rows: list[Any] = measure(words) if words.processes == 1 else communication.measure(words, problem_of)
    settings = {k: v for k, v in vars(words).items() if k not in ("json", "peak_of", "rows")}
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    if words.device == "cpu":
        settings["malloc"] = allocator()
        settings["openmp"] = runtime()
    table = print_table if words.processes == 1 else communication.print_table
    report(rows, settings, as_json=words.json, table=table)
    return 0


def parse(arguments: list[str], prog: str = NAME) -> argparse.Namespace:
    """The options; exits with code 2 and one message when they make no sense."""
    parser = make_parser(__doc__, NAME, prog)

    parser.add_argument("--backbone", default="cifar_resnet32", metavar="NAME", help="default: cifar_resnet32")
    parser.add_argument("--classes", type=positive, default=10, metavar="C", help="default: 10")
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="training batch (default: 128)")
    parser.add_argument("--meta-batch", type=positive, default=128, metavar="N", help="meta batch (default: 128)")
    parser.add_argument("--image-size", type=positive, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument(
        "--hidden", type=positive, metavar="H", help="width of Difficulty-Net (default: the rule for the classes)"
    )
    parser.add_argument(
        "--images-per-step", type=positive, metavar="N", help="meta images that ours_rolling scores (default: a tenth)"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--threads", type=worker_count, metavar="N", help="CPU threads of torch (default: all)")
    parser.add_argument(
        "--train", nargs="+", default=["all"], metavar="PART", help="model.train of a recipe (default: all)"
    )
    parser.add_argument(
        "--adapt", metavar="YAML", help="model.adapt of a recipe, such as '{lora: {rank: 4, targets: [qkv, fc1]}}'"
    )
    parser.add_argument("--norm", choices=("train", "frozen"), help="model.norm of a recipe")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", choices=MODES, default="none", help="as in a recipe (default: none)")
    add_device(parser)
    parser.add_argument("--rows", nargs="+", choices=list(WAYS), help="default: all but those on request")
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="of this machine that take a step together"
    )
    parser.add_argument(
        "--reduce-precision", choices=("fp32", "bf16"), default="fp32", help="as in a recipe; of several processes"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument(
        "--errors", action=argparse.BooleanOptionalAction, default=True, help="compare gradients with float64"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    words = parser.parse_args(arguments)
    possible = WAYS if words.processes == 1 else OWN
    words.rows = words.rows or [name for name in possible if name not in ON_REQUEST]
    others = [name for name in words.rows if name not in possible]
    if others:
        parser.error(f"argument --rows: {others[0]} is measured in one process: leave it or --processes out")
    return words


def problem_of(words: argparse.Namespace, **changes: Any) -> Problem:
    """The problem that the options describe; changes: of `make_problem`, in their place."""
    options = {"batch": words.batch, "meta_batch": words.meta_batch, "device": words.device, **changes}
    return make_problem(
        backbone=words.backbone,
        num_classes=words.classes,
        image_size=words.image_size,
        channels_last=words.channels_last,
        precision=words.precision,
        compile=words.compile,
        hidden=words.hidden,
        images_per_step=words.images_per_step,
        train=words.train[0] if words.train[0] in WORDS else words.train,
        norm=words.norm,
        adapt=None if words.adapt is None else parse_yaml(words.adapt, "--adapt"),
        **options,
    )


def measure(words: argparse.Namespace) -> list[Row]:
    """A row for each way that was asked for, in order."""
    problem = problem_of(words)
    of_all = all(p.requires_grad for p in problem.model.parameters())
    reasons = {name: missing(name, of_all) for name in words.rows}
    ways = {name: WAYS[name](problem) for name in words.rows if reasons[name] is None}
    on_gpu = problem.device.type == "cuda"
    errors = peaks = dict.fromkeys(ways)
    if words.errors:
        errors = gradient_errors(problem, ways)
    else:
        for way in ways.values():
            way.step()  # what the first step allocates is no part of the peak
    if words.memory:
        peaks = {name: peak_on_gpu(way) if on_gpu else ask_child(name, words) for name, way in ways.items()}
    rate = matrix_rate(problem) if on_gpu else None
    counts = {name: matrix_operations(way) for name, way in ways.items()} if on_gpu else {}
    steps = {}
    for name, way in ways.items():
        steps[name], reason = (way.step, None) if words.compile == "none" else way.compiled()
        reasons[name] = reason and f"not compiled: {reason}"
    times = interleaved(steps, {name: way.cycle for name, way in ways.items()}, words.rounds, problem.device)
    rows = []
    for name in words.rows:
        row = Row(name, why=reasons[name])
        if name in ways:
            row = replace(
                row,
                ms=1e3 * statistics.median(times[name]),
                ratio_plain=ratio(times, name, "plain"),
                ratio_frozen=ratio(times, name, "ours_frozen"),
                peak_bytes=peaks[name],
                grad_rel_error=errors[name],
                matrix_share=None if rate is None else counts[name] / statistics.median(times[name]) / rate,
            )
        rows.append(row)
    return rows


def gradient_errors(problem: Problem, ways: dict) -> dict[str, float | None]:
    """The relative error of each way's gradient in its first step; all start from the same state."""
    exact: dict[tuple, torch.Tensor] = {}
    errors: dict[str, float | None] = {}
    for name, way in ways.items():
        gradient = way.theta_gradient()
        if gradient is None:
            errors[name] = None
            continue
        key = tuple(way.accuracy.tolist())
        if key not in exact:
            exact[key] = float64_gradient(problem, way.accuracy)
        errors[name] = ((gradient.double() - exact[key]).norm() / exact[key].norm()).item()
    return errors


def interleaved(
    steps: dict[str, Callable], cycles: dict[str, int], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step of each way in each round: of one on a CPU, of the mean of up to `IN_A_ROW` on a GPU.

    cycles: how many steps each way needs to have done everything once; they are not measured.
    """

    def seconds(step: Callable, count: int) -> float:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        wait_for(device)
        return (time.perf_counter() - started) / count

    at_a_time = {}
    for name, step in steps.items():
        seconds(step, cycles[name])
        at_a_time[name] = 1 if device.type == "cpu" or seconds(step, 1) > LONG else IN_A_ROW
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, at_a_time[name]))
    return times


def matrix_operations(way: Way) -> int:
    """Operations of the convolutions and matrix products of one step, a multiplication and an addition counted as 2."""
    with FlopCounterMode(display=False) as counter:
        way.step()
    return counter.get_total_flops()


def matrix_rate(problem: Problem) -> float:
    """Operations a second of a large matrix product, in the precision that the problem's convolutions have."""
    bf16, side = problem.precision == "bf16", 8192 if problem.device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=problem.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = []
        for _ in range(8):
            wait_for(problem.device)
            started = time.perf_counter()
            for _ in range(4):
                torch.matmul(a, b)
            wait_for(problem.device)
            seconds.append((time.perf_counter() - started) / 4)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / statistics.median(seconds)


def ratio(times: dict[str, list[float]], name: str, other: str) -> float | None:
    """How many times as long as another way, the median over the rounds; None when that one was not measured."""
    if other not in times:
        return None
    return median_ratio(times[name], times[other])


def peak_on_gpu(way) -> int:
    """Bytes of torch's allocator at the peak of two steps, above those before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way.step()
    way.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ask_child(name: str, words: argparse.Namespace) -> int | None:
    """`peak_on_cpu` in a process of its own; None on systems that do not tell."""
    if not Path("/proc/self/status").exists():
        return None
    layout = "--channels-last" if words.channels_last else "--no-channels-last"
    command = [sys.executable, "-W", "ignore", "-m", *NAME.split(), "--peak-of", name, layout, "--device", words.device]
    passed = ("backbone", "classes", "batch", "meta_batch", "image_size", "precision", "threads", "norm", "adapt")
    for key in (*passed, "hidden", "images_per_step"):
        if getattr(words, key) is not None:
            command += [f"--{key.replace('_', '-')}", str(getattr(words, key))]
    command += ["--train", *words.train]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def peak_on_cpu(words: argparse.Namespace) -> int:
    """Bytes by which the resident set of this process grew, at its peak, over two steps of one way."""
    WAYS[words.peak_of](problem_of(words, batch=8, meta_batch=8)).step()
    way = WAYS[words.peak_of](problem_of(words))
    gc.collect()
    before = resident("VmRSS")
    way.step()
    way.step()
    return resident("VmHWM") - before


def resident(entry: str) -> int:
    """VmRSS (now) or VmHWM (at the peak) of this process, in bytes. `getrusage` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(entry)


def print_table(rows: list[Row]) -> None:
    """The rows for people."""
    print(
        f"{'':16} {'ms':>8} {'x plain':>8} {'x frozen':>9} {'peak MiB':>9} {'gradient error':>15} {'matrix rate':>12}"
    )
    for row in rows:
        if row.ms is None:
            print(f"{row.name:16} {row.why}")
            continue
        cells = (
            f"{row.ms:8.1f}",
            _cell(row.ratio_plain, "8.2f"),
            _cell(row.ratio_frozen, "9.2f"),
            _cell(row.peak_bytes and row.peak_bytes / 2**20, "9.0f"),
            _cell(row.grad_rel_error, "15.1e"),
            _cell(row.matrix_share, "12.1%"),
            row.why or "",
        )
        print(f"{row.name:16} {' '.join(cells)}".rstrip())


def _cell(value: float | None, form: str) -> str:
    return f"{'' if value is None else format(value, form):>{form.split('.')[0]}}"
