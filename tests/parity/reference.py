"""One iteration of Difficulty-Net as slow and plain as the equations: differentiated twice, no shortcuts."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def eq4(net: nn.Module, accuracy: Tensor) -> Tensor:
    d = net(accuracy)
    return len(accuracy) * d / d.sum()


def driver(net: nn.Module, accuracy: Tensor, target: str) -> Tensor:
    d = net(accuracy)
    total = 0.0
    for c in range(len(accuracy)):
        if target == "absolute":
            wanted = 1 - accuracy[c]
        elif accuracy.sum() == 0:
            wanted = torch.ones(())
        else:
            wanted = 1 - accuracy[c] / accuracy.sum()
        total = total + (d[c] - wanted) ** 2
    return total / len(accuracy)


def forward(model: nn.Module, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """The model with other parameters, on copies of its buffers."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
        return torch.func.functional_call(model, {**buffers, **parameters}, (images,))


def meta_objective(
    model: nn.Module,
    net: nn.Module,
    accuracy: Tensor,
    batch: tuple,
    meta_batch: tuple,
    *,
    lr: float,
    loss,
    weights=None,
    moved=None,
) -> Tensor:
    """L_meta(phi_hat(theta)) with the graph of the lookahead kept; `weights` stands in for Eq. 4 when given.

    moved: names of the parameters that take the lookahead; the others stay where they are. None is all of them.
    """
    (images, labels), (meta_images, meta_labels) = batch, meta_batch
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    w = eq4(net, accuracy) if weights is None else weights
    inner = 0.0
    for i, sample_loss in enumerate(loss(forward(model, parameters, images), labels)):
        inner = inner + w[labels[i]] * sample_loss
    gradients = torch.autograd.grad(inner / len(labels), list(parameters.values()), create_graph=True)
    ahead = {n: p - lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    if moved is not None:
        ahead = {n: p if n in moved else parameters[n].detach() for n, p in ahead.items()}
    return F.cross_entropy(forward(model, ahead, meta_images), meta_labels)


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Per-class top-1 accuracy in eval mode, one class after the other."""
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        right = frozen(images).argmax(1) == labels
    return torch.stack([right[labels == c].double().mean() for c in range(num_classes)]).to(images.dtype)


class ReferenceTrainer:
    """Algorithm 1, line by line, on a model and a Difficulty-Net it owns."""

    def __init__(
        self,
        model,
        net,
        *,
        lr,
        momentum,
        weight_decay,
        net_lr,
        net_weight_decay,
        driver_weight,
        target,
        loss,
        meta_weight=1.0,
    ):
        self.meta_weight = meta_weight
        self.model, self.net, self.lr, self.loss = model, net, lr, loss
        self.driver_weight, self.target = driver_weight, target
        self.sgd = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=False
        )
        self.adam = torch.optim.Adam(net.parameters(), lr=net_lr, weight_decay=net_weight_decay, foreach=False)

    def iterate(self, batch, meta_batch, meta_set, num_classes) -> None:
        accuracy = accuracy_of(self.model, *meta_set, num_classes)
        meta = meta_objective(self.model, self.net, accuracy, batch, meta_batch, lr=self.lr, loss=self.loss)
        objective = self.meta_weight * meta + self.driver_weight * driver(self.net, accuracy, self.target)
        self.adam.zero_grad()
        objective.backward()
        self.adam.step()
        images, labels = batch
        with torch.no_grad():
            weights = eq4(self.net, accuracy)
        self.sgd.zero_grad()
        self.model.train()
        (weights[labels] * self.loss(self.model(images), labels)).mean().backward()
        self.sgd.step()
