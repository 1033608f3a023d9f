"""Iterations on a CPU as lists of their operations: recorded once, then called without the Python that led to them.

Of a head on features, an iteration is 20 to 300 small operations, and most of its time goes to Python, to modules and
to the graph for the backward pass. None of that is needed to do the same operations again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from fastlt.device.random_states import random_states, restore_random_states

aten = torch.ops.aten
# Arguments that an operation writes to although its schema does not say so.
WRITTEN = {aten.native_batch_norm.default: ("running_mean", "running_var")}
# The same tensor again, which needs no operation where nothing is differentiated.
SAME = (aten.detach.default, aten.alias.default)
# What an operation takes beside tensors.
PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class CpuCapture:
    """`Capture` on a CPU, by a list of the operations that torch dispatches.

    Operations run while they are recorded; tensors that were there before, and the generators, are put back.
    RuntimeError for an iteration that a list cannot repeat: it decides by the value of a tensor, or makes tensors from
    numbers.
    """

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        random, recorder = random_states(), _Recorder()
        try:
            with recorder:
                result = function()
        finally:
            recorder.put_back()
            restore_random_states(random)
        return recorder.replay(), result


class _Recorder(TorchDispatchMode):
    """Writes the operations that run inside to a graph.

    nodes: of the graph, by the tensors that are alive. given: the inputs of the graph: tensors that no operation inside
    made, views of them, and generators. before: by address, the memory of `given` that an operation wrote to, and what
    was in it. generators: that operations drew from, by address, with their nodes and their states before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes = WeakTensorKeyDictionary()
        self.given: list[Tensor | torch.Generator] = []
        self.inputs: list[fx.Node] = []
        self.given_memory: set[int] = set()  # addresses
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.generators: dict[int, tuple[torch.Generator, fx.Node, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _reads_values(func, args):
            raise RuntimeError(f"Python decides by the value of a tensor ({func}), which a list of operations cannot")
        if not _handles_tensors(func):
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            raise RuntimeError("a tensor is made from numbers in every iteration, which a list of operations keeps")
        taken = tree_map(self._node, args), tree_map(self._node, kwargs)
        self._keep_written(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in SAME:
            self.nodes[result] = self.nodes[args[0]]
        elif func.is_view and all(self.nodes[t].op == "placeholder" for t in tensors):
            for view in _tensors(result):
                self._give_tensor(view)
        else:
            self._note(result, self.graph.call_function(func, *taken))
        return result

    def _node(self, value: Any) -> Any:
        """The node of a tensor or generator; what is neither as it is."""
        if isinstance(value, Tensor):
            if value not in self.nodes:
                self._give_tensor(value)
            return self.nodes[value]
        if isinstance(value, torch.Generator):
            if id(value) not in self.generators:
                self.generators[id(value)] = value, self._give(value), value.get_state()
            return self.generators[id(value)][1]
        if not isinstance(value, PLAIN):
            raise RuntimeError(f"an operation takes a {type(value).__name__}, which a list of operations cannot keep")
        return value

    def _give(self, value: Tensor | torch.Generator) -> fx.Node:
        """A new input of the graph."""
        with self.graph.inserting_after(self.inputs[-1]) if self.inputs else self.graph.inserting_before():
            self.inputs.append(self.graph.placeholder(f"given_{len(self.given)}"))
        self.given.append(value)
        return self.inputs[-1]

    def _give_tensor(self, tensor: Tensor) -> None:
        self.nodes[tensor] = self._give(tensor)
        self.given_memory.add(tensor.untyped_storage()._cdata)

    def _keep_written(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the memory that an operation is about to write to, if it was there before all operations."""
        for position, argument in enumerate(func._schema.arguments):
            said = argument.alias_info is not None and argument.alias_info.is_write
            if not said and argument.name not in WRITTEN.get(func, ()):
                continue
            written = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(written):
                memory = tensor.untyped_storage()
                if memory._cdata in self.given_memory and memory._cdata not in self.before:
                    self.before[memory._cdata] = memory, memory.clone()

    def _note(self, result: Any, node: fx.Node) -> None:
        """Remember which node made the tensors of a result. Those that an operation wrote to have one already."""
        if isinstance(result, Tensor):
            result = {None: result}
        elif isinstance(result, (tuple, list)):
            result = dict(enumerate(result))
        for position, tensor in (result or {}).items():
            if isinstance(tensor, Tensor) and tensor not in self.nodes:
                self.nodes[tensor] = node if position is None else self.graph.call_function(getitem, (node, position))

    def put_back(self) -> None:
        """Undo what the recorded operations did to tensors and generators that were there before."""
        for memory, before in self.before.values():
            memory.copy_(before)
        for generator, _, state in self.generators.values():
            generator.set_state(state)

    def replay(self) -> Callable[[], None]:
        """What runs the operations again. Tensors that they made and that are still alive are overwritten by it."""
        alive = [(t, node) for t, node in self.nodes.items() if node.op != "placeholder"]
        kept = [tensor for tensor, _ in alive]
        self.graph.output([node for _, node in alive])
        run, given = fx.GraphModule(nn.Module(), self.graph).forward, self.given

        def replay() -> None:
            with torch.inference_mode():  # without what a graph for a backward pass would need
                results = run(*given)
                for tensor, result in zip(kept, results, strict=True):
                    tensor.copy_(result)

        return replay


def _tensors(value: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _reads_values(func: Any, args: tuple) -> bool:
    """Whether Python can decide by what an operation returns: a number, or a tensor whose shape follows from values."""
    if func is aten.index.Tensor:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _handles_tensors(func: Any) -> bool:
    """Whether an operation makes tensors or writes to some. Others, as of shapes, answer the same every time."""
    return func._schema.is_mutable or any("Tensor" in str(returned.type) for returned in func._schema.returns)
