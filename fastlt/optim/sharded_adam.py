"""Adam whose moments are divided among processes, by torch's ZeroRedundancyOptimizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdam:
    """The steps of torch.optim.Adam, each process taking those of its share; the shares are then sent to all.

    The parameters are laid into one piece of memory, which is cut into one chunk a process: shares are equal whatever
    the shapes. The same gradients have to be given on every process. options: of torch.optim.Adam.
    """

    def __init__(self, parameters: Sequence[Tensor], **options: Any) -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # heavy, and for several processes alone

        self.parameters = list(parameters)
        self.rank, processes = dist.get_rank(), dist.get_world_size()
        ends = list(accumulate(p.numel() for p in self.parameters))
        self.places = [slice(end - p.numel(), end) for p, end in zip(self.parameters, ends, strict=True)]
        self.length = -(-ends[-1] // processes)
        flat = self.parameters[0].detach().new_zeros(self.length * processes)
        for parameter, place in zip(self.parameters, self.places, strict=True):
            flat[place] = parameter.detach().reshape(-1)
            parameter.data = flat[place].view_as(parameter)
        self.chunks = list(flat.split(self.length))
        self.zero = ZeroRedundancyOptimizer(self.chunks, torch.optim.Adam, **options)
        self.own = self.chunks[self.rank]
        assert self.zero.optim.param_groups[0]["params"] == [self.own], "one chunk a process, in their order"

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down these gradients of the parameters; every process has to call it."""
        self.own.grad = self._mine(gradients)
        self.zero.step()
        self.own.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state of this process's share alone."""
        return {"share": dict(self.zero.optim.state[self.own])}

    def gathered(self) -> dict[str, Any]:
        """The state_dict of a torch.optim.Adam with these parameters, on the main process; every process calls it.

        The other processes get one without state.
        """
        groups = self.zero.optim.state_dict()["param_groups"]
        groups[0]["params"] = list(range(len(self.parameters)))
        share = self.state_dict()["share"]
        whole = {name: self._gather(share[name]) for name in MOMENTS if share}
        state = {
            i: {
                "step": share["step"].clone(),
                **{name: flat[place].view_as(parameter).clone() for name, flat in whole.items() if flat is not None},
            }
            for i, (parameter, place) in enumerate(zip(self.parameters, self.places, strict=True))
            if share and self.rank == 0
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` of this process, or `gathered`, was taken, by any number of processes."""
        entries = state.get("state", {})
        share = state["share"] if "share" in state else {"step": entries[0]["step"]} if entries else {}
        if entries:
            whole = [entries[i] for i in range(len(self.parameters))]
            share |= {name: self._mine([entry[name] for entry in whole]) for name in MOMENTS}
        own = {name: tensor.to(tensor if name == "step" else self.own).clone() for name, tensor in share.items()}
        if own and not self.zero.optim.param_groups[0].get("fused"):
            own["step"] = own["step"].cpu()
        self.zero.optim.state[self.own] = own

    def _mine(self, of_parameters: Sequence[Tensor]) -> Tensor:
        """This process's share of what there is for each parameter, flat, with zeros at the end of the last."""
        start, stop = self.rank * self.length, (self.rank + 1) * self.length
        pieces = [
            tensor.reshape(-1)[max(0, start - place.start) : max(0, stop - place.start)]
            for tensor, place in zip(of_parameters, self.places, strict=True)
        ]
        share = torch.cat(pieces)
        return torch.nn.functional.pad(share, (0, self.length - len(share)))

    def _gather(self, share: Tensor) -> Tensor | None:
        parts = [torch.empty_like(share) for _ in self.chunks] if self.rank == 0 else None
        dist.gather(share, parts)
        return None if parts is None else torch.cat(parts)
