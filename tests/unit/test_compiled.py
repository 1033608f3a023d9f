"""A compiled step computes what the step computes, warming up leaves no trace, and what cannot be compiled says why."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlt.augment import build_augment
from fastlt.device import compiled
from fastlt.device.compiled import Compiler, load_optimizer, mode_for, ready
from fastlt.device.recorded_operations import CpuCapture
from fastlt.device.replay import CudaCapture
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.optim import Clip, make_optimizer
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.learned_weights import Approximation

CLASSES = 4
COUNTS = ClassCounts(torch.tensor([40, 20, 10, 5]).numpy(), tuple("abcd"))


def make_step(method, compiler, drop_rate=0.0, refresh="exact", device="cpu", frozen=None, optimizer="sgd", **options):
    """frozen: "norms", whose statistics then do not couple the samples of a batch, or all of the "backbone"."""
    torch.manual_seed(0)
    # As small as a network with BatchNorm can be: compiling takes longer with every layer.
    layers = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    model = Classifier(nn.Sequential(*layers), LinearHead(4 * 9, CLASSES), drop_rate).to(device)
    model.frozen_norms = frozenset(["backbone.1"] if frozen else [])
    model.train().backbone.requires_grad_(frozen != "backbone")

    def augment(seed, specs=("flip",)):
        return build_augment(specs, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, seed=seed, device=device)

    kind, trained = STEPS[method], [p for p in model.parameters() if p.requires_grad]
    accuracy = ClassAccuracy(*on(device, *meta_set()), CLASSES, prepare=augment(2, ()), refresh=refresh, window=3)
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", COUNTS),
        optimizer=make_optimizer(
            optimizer,
            [{"params": trained}],
            lr=0.1,
            device=torch.device(device),
            mode=compiler.mode,
            # So large that a gradient near zero is no matter of its sign.
            options={} if optimizer == "sgd" else {"eps": 1e-2},
        ),
        clip=options.pop("clip", None),
        accumulate=options.pop("accumulate", 1),
        augment=augment(0),
        meta_augment=augment(1),
        class_counts=COUNTS,
        class_accuracy=accuracy if kind.needs.class_accuracy else None,
        compiler=compiler,
    )
    return kind(parts, kind.Options(**options))


def meta_set():
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=draw), torch.arange(12) % CLASSES


def on(device, *tensors):
    return (tensor.to(device) for tensor in tensors)


def batches(seed, device="cpu"):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=draw)
    batch = images, torch.arange(8) % CLASSES, torch.arange(8)
    return Batch(*on(device, *batch)), Batch(*on(device, *meta_set(), torch.arange(12)))


def tensors(state, where=""):
    if isinstance(state, torch.Tensor):
        yield where, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{where}.{key}")


@pytest.mark.parametrize("method", ["plain", "difficulty"])
def test_a_compiled_step_computes_the_same_and_warming_up_leaves_no_trace(method):
    plain, compiled = make_step(method, Compiler()), make_step(method, Compiler("inductor"))
    before, random = copy.deepcopy(compiled.state_dict()), torch.get_rng_state()
    assert ready(compiled, *batches(0)) == (compiled, None)
    assert torch.equal(random, torch.get_rng_state())
    after = compiled.state_dict()
    assert compiled.parts.compiler.active
    for (name, old), (_, new) in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(old, new), name
    for iteration in range(3):
        plain(*batches(iteration))
        compiled(*batches(iteration))
    for (name, value), (_, other) in zip(tensors(plain.state_dict()), tensors(compiled.state_dict()), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("method", "drop_rate", "why"), [("mixup", 0.0, "passes of its own"), ("mwn", 0.5, "random")])
def test_what_cannot_be_compiled_says_why_and_trains(method, drop_rate, why):
    step = make_step(method, Compiler("inductor"), drop_rate)
    iterate, reason = ready(step, *batches(0))
    assert iterate is step
    assert why in reason
    assert not step.parts.compiler.active
    assert torch.isfinite(step(*batches(0)).loss)


class Standardised(nn.Conv2d):
    """Divides its weights by their norm, which is a constant to the backward pass."""

    def forward(self, x):
        with torch.no_grad():
            norm = self.weight.norm()
        return nn.functional.conv2d(x, self.weight / norm, None, self.stride)


@pytest.mark.parametrize(("method", "compiles"), [("difficulty", False), ("plain", True)])
def test_a_constant_of_the_backward_pass_is_not_compiled_into_a_tangent(method, compiles):
    """`torch.func.jvp` would differentiate it."""
    step, plain = make_step(method, Compiler("inductor")), make_step(method, Compiler())
    for one in (step, plain):
        one.parts.model.backbone[0].__class__ = Standardised
    reason = ready(step, *batches(0))[1]
    assert reason is None if compiles else "under torch.no_grad" in reason
    step(*batches(0))
    plain(*batches(0))
    for (name, value), (_, other) in zip(tensors(step.state_dict()), tensors(plain.state_dict()), strict=True):
        assert torch.allclose(value, other, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("method", "drop_rate"), [("plain", 0.5), ("difficulty", 0.0)])
def test_a_compiler_that_fails_is_given_up_with_its_reason_and_without_a_trace(monkeypatch, method, drop_rate):
    def failing(function, **options):
        def run(*args):
            function(*args)  # what it computed before it failed must not stay
            raise RuntimeError("no C++ compiler\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    step = make_step(method, Compiler("inductor"), drop_rate)
    if method == "difficulty":
        step.set_counters((7, (5, False, True)))  # as a run that resumes
    before, counters, random = copy.deepcopy(step.state_dict()), step.counters(), torch.get_rng_state()
    assert ready(step, *batches(0)) == (step, "RuntimeError: no C++ compiler")
    for (name, old), (_, new) in zip(tensors(before), tensors(step.state_dict()), strict=True):
        assert torch.equal(old, new), name
    assert step.counters() == counters
    assert torch.equal(random, torch.get_rng_state())
    assert torch.isfinite(step(*batches(0)).loss)


class Captured(CpuCapture):
    """Counts what it captures."""

    graphs = 0

    def __call__(self, function):
        self.graphs += 1
        return super().__call__(function)


class CalledAgain:
    """Runs the Python of an iteration where a capture would repeat its operations."""

    def __init__(self, step):
        self.step = step

    def __call__(self, function):
        def replay():
            counters = self.step.counters()
            function()
            self.step.set_counters(counters)

        return replay, None


GRAPHED = {
    "plain": ("plain", "exact", {}, 1),
    "cdb": ("cdb", "epoch", {}, 4),
    "difficulty-exact": ("difficulty", "exact", {}, 1),
    "difficulty-rolling": ("difficulty", "rolling", {}, 4),
    "difficulty-late": ("difficulty", "exact", {"approximate": Approximation(late_weights=True)}, 1),
    "difficulty-driver": ("difficulty", "exact", {"meta_weight": 0.0}, 1),
    "difficulty-uncoupled": ("difficulty", "exact", {"frozen": "norms"}, 1),
    "difficulty-head": ("difficulty", "rolling", {"frozen": "backbone"}, 4),
    "mwn": ("mwn", "exact", {}, 1),
    "mwn-uncoupled": ("mwn", "exact", {"frozen": "norms"}, 1),
    "sample_difficulty": ("sample_difficulty", "exact", {}, 1),
    "cb_da": ("cb_da", "exact", {"from_epoch": 1}, 2),
    "expert": ("expert", "exact", {}, 1),
    "clipped": ("plain", "exact", {"clip": Clip(norm=0.1)}, 1),
    "adamw": ("plain", "exact", {"optimizer": "adamw", "clip": Clip(agc=0.01), "accumulate": 2}, 1),
    "preconditioned": ("difficulty", "exact", {"optimizer": "adamw", "clip": Clip(value=0.01)}, 1),
    "accumulated": ("difficulty", "exact", {"accumulate": 2}, 1),
}


def test_every_method_that_allows_compilation_is_replayed():
    allowing = {name for name, step in STEPS.items() if step.allows.compilation}
    missing = sorted(allowing - {method for method, *_ in GRAPHED.values()})
    assert not missing, f"add a case to GRAPHED for {', '.join(missing)}"


def assert_replayed_as_stepped(case, device, capture=None):
    """Eight iterations of a graphed step beside those of an ordinary one; returns how many were captured."""
    method, refresh, options, _ = GRAPHED[case]
    plain = make_step(method, Compiler(), refresh=refresh, device=device, **options)
    graphed = make_step(method, Compiler("cudagraph"), refresh=refresh, device=device, **options)
    for augment in (plain.parts.augment, plain.parts.meta_augment):
        augment.static = True  # so that both draw the same
    before, random = copy.deepcopy(graphed.state_dict()), torch.get_rng_state()
    iterate, reason = ready(graphed, *batches(0, device), capture)
    assert reason is None
    assert torch.equal(random, torch.get_rng_state())
    for (name, old), (_, new) in zip(tensors(before["model"]), tensors(graphed.state_dict()["model"]), strict=True):
        assert torch.equal(old, new), name
    tried = getattr(capture, "graphs", 0)
    for iteration in range(8):
        for step in (plain, graphed):
            if iteration % 4 == 0:
                step.start_epoch(iteration // 4)
        plain.optimizer.param_groups[0]["lr"] = 0.1 / (1 + iteration)
        graphed.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + iteration))
        expected, output = plain(*batches(iteration, device)), iterate(*batches(iteration, device))
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    one, other = plain.state_dict(), graphed.state_dict()
    for key in ("model", "class_accuracy", "net", "iteration", "epoch"):
        for (name, value), (_, same) in zip(tensors({key: one.get(key)}), tensors({key: other.get(key)}), strict=True):
            assert torch.allclose(value.double(), same.double(), rtol=1e-3, atol=1e-5), name
    assert plain.counters() == graphed.counters()
    if "frozen" in options:
        assert plain.trial.refused is graphed.trial.refused is None
    return getattr(capture, "graphs", 0) - tried


@pytest.mark.parametrize("case", GRAPHED)
def test_replayed_iterations_are_those_of_the_step(case):
    assert assert_replayed_as_stepped(case, "cpu", Captured()) == GRAPHED[case][-1]


@pytest.mark.parametrize("case", GRAPHED)
def test_recorded_operations_compute_bit_for_bit_what_the_step_does(case):
    method, refresh, options, _ = GRAPHED[case]
    states = []
    for capture in (CalledAgain, CpuCapture):
        step = make_step(method, Compiler("replay"), refresh=refresh, **options)
        for augment in (step.parts.augment, step.parts.meta_augment):
            augment.static = True  # as a captured iteration draws
        iterate, reason = ready(step, *batches(0), capture(step) if capture is CalledAgain else capture())
        assert reason is None
        for iteration in range(8):
            if iteration % 4 == 0:
                step.start_epoch(iteration // 4)
            step.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + iteration))
            iterate(*batches(iteration))
        states.append(step.state_dict())
    for (name, one), (_, other) in zip(*map(tensors, states), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRAPHED)
def test_cuda_graphs_replay_the_iterations_of_the_step(case):
    assert_replayed_as_stepped(case, "cuda")


def test_a_graph_that_cannot_be_captured_says_why_and_the_step_draws_for_itself_again():
    def failing(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    step = make_step("difficulty", Compiler("cudagraph"))
    before = copy.deepcopy(step.state_dict()["model"])
    iterate, reason = ready(step, *batches(0), failing)
    assert (iterate, reason) == (step, "RuntimeError: operation not permitted when stream is capturing")
    for (name, old), (_, new) in zip(tensors(before), tensors(step.state_dict()["model"]), strict=True):
        assert torch.equal(old, new), name
    images = batches(0)[0].images
    assert not torch.equal(step.parts.augment(images), step.parts.augment(images))


def test_a_capture_that_fails_raises_what_failed_and_leaves_the_stream(monkeypatch):
    """Ending it is an error of its own, which would hide the reason and leave the capture's stream the current one."""

    @contextlib.contextmanager
    def graph(*args, **options):
        try:
            yield
        finally:
            streams.append("capture")
            raise RuntimeError("operation failed due to a previous error during capture")

    streams = []
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def reads():
        assert not torch.backends.cudnn.benchmark, "cuDNN would time its algorithms"
        raise ValueError("the host waits for the device")

    with pytest.raises(ValueError, match="the host waits"):
        CudaCapture()(reads)
    assert streams == ["capture", "before"]
    assert torch.backends.cudnn.benchmark


def test_each_round_of_graphs_has_a_pool_of_its_own(monkeypatch):
    """Once all graphs of a pool are gone, as those of the trial are, torch refuses to capture into it again."""
    made = []

    def capture():
        made.append(Captured())
        return made[-1]

    monkeypatch.setitem(compiled.CAPTURES, "cudagraph", capture)
    monkeypatch.setattr(compiled, "why_no_graph", lambda step, capture: None)
    step = make_step("plain", Compiler("cudagraph"))
    iterate, reason = ready(step, *batches(0))
    assert reason is None
    iterate(*batches(0))
    assert [one.graphs for one in made] == [1, 1]


def test_what_cannot_be_a_graph_is_told_before_anything_is_tried():
    step = make_step("plain", Compiler("cudagraph"))
    assert ready(step, *batches(0)) == (step, "CUDA graphs need a CUDA device")
    step = make_step("difficulty", Compiler("cudagraph"), approximate=Approximation(every=2))
    assert "not alike" in ready(step, *batches(0), Captured())[1]


def test_the_first_step_of_sgd_with_dampening_is_not_captured():
    step = make_step("plain", Compiler("replay"))
    step.optimizer.param_groups[0]["dampening"] = 0.5
    assert "dampening" in ready(step, *batches(0))[1]


def test_an_optimizer_that_counts_in_python_is_not_captured():
    step = make_step("plain", Compiler("cudagraph"), optimizer="lamb")
    assert ready(step, *batches(0), Captured())[1] == "Lamb counts its steps in Python, which is not captured"


def test_a_run_says_what_it_compiled_and_ends_as_without(digits_words, capsys, monkeypatch):
    from fastlt.recipe import load_recipe

    words = [*digits_words, "stages.end_to_end.method=plain", "stages.end_to_end.accuracy.refresh=exact"]
    # Compiling the network takes minutes on a small machine; that it is asked to, and once, is what counts here.
    asked = []

    def compiles(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiles)
    results = {}
    for mode in ("none", "inductor"):
        recipe = load_recipe("recipes/digits_lt.yaml", [*words, f"compile={mode}", f"name={mode}"])
        results[mode] = Trainer(prepare(recipe)).fit()
        assert ("compiled in" in capsys.readouterr().out) == (mode == "inductor")
    assert len(asked) == 1
    assert results["none"]["per_class_accuracy"] == results["inductor"]["per_class_accuracy"]


@pytest.mark.parametrize(("asked", "device", "processes", "mode"), [
    ("auto", "cuda", 1, "cudagraph"),
    ("auto", "cuda", 2, "none"),
    ("auto", "cpu", 1, "none"),
    ("replay", "cpu", 1, "replay"),
    ("inductor", "cuda", 1, "inductor"),
    ("none", "cuda", 1, "none"),
])  # fmt: skip
def test_auto_captures_where_iterations_can_be_captured(asked, device, processes, mode):
    assert mode_for(asked, torch.device(device), processes) == mode


@pytest.mark.parametrize(("device", "processes", "mode"), [
    ("cpu", 1, "replay"),
    ("cpu", 2, "none"),
    ("cuda", 1, "cudagraph"),
])  # fmt: skip
def test_auto_replays_the_operations_of_heads_on_features(device, processes, mode):
    assert mode_for("auto", torch.device(device), processes, on_features=True) == mode


@pytest.mark.parametrize("modes", [("none", "cudagraph"), ("cudagraph", "none"), ("replay", "none"), ("none", "none")])
def test_a_run_goes_on_with_another_implementation_of_its_optimizers(modes):
    steps = [make_step("difficulty", Compiler(mode)) for mode in modes]
    before, after = steps
    for iteration in range(3):
        before(*batches(iteration))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    own = make_step("difficulty", Compiler(modes[1]))
    for name in ("optimizer", "net_optimizer"):
        for group, its in zip(getattr(after, name).param_groups, getattr(own, name).param_groups, strict=True):
            assert {k: group[k] for k in ("foreach", "fused")} == {k: its[k] for k in ("foreach", "fused")}
            assert isinstance(group["lr"], torch.Tensor) == isinstance(its["lr"], torch.Tensor)
    for step in steps:
        for iteration in range(3, 5):
            step(*batches(iteration))
    for (name, value), (_, other) in zip(*(tensors(s.state_dict()["model"]) for s in steps), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-5, atol=1e-7), name


def test_adams_step_counts_come_to_the_host_unless_its_kernels_have_them():
    """From a GPU it would read them, and wait, in every iteration after a run was resumed."""
    with FakeTensorMode():
        for fused, where in ((False, "cpu"), (True, "cuda")):
            weight = torch.empty(3, device="cuda:0", requires_grad=True)
            saved = torch.optim.Adam([weight], fused=True)
            state = {
                "step": torch.empty((), device="cuda:0"),
                "exp_avg": weight.detach(),
                "exp_avg_sq": weight.detach(),
            }
            optimizer = torch.optim.Adam([weight], fused=fused)
            load_optimizer(optimizer, {**saved.state_dict(), "state": {0: state}})
            assert optimizer.state[weight]["step"].device.type == where
            assert optimizer.state[weight]["exp_avg"].device.type == "cuda"
