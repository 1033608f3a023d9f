"""Difficulty-Net: from the accuracy of every class to a weight for every class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

DRIVER_TARGETS = ("relative", "absolute")
Width = int | Literal["auto"] | None
RULE_UP_TO = 4096  # classes, for which width "auto" is the rule's
WIDEST_TRIED = 2048  # hidden units, in Table 6 of the supplement


def hidden_width(num_classes: int) -> int:
    """H = 2^n with 2^(n-1) <= C < 2^n (supplement, Sec. 1.3): 100 -> 128, 365 -> 512, 1000 -> 1024."""
    return 1 << num_classes.bit_length()


def chosen_width(num_classes: int, asked: Width) -> int:
    """H that is asked for: a number; None, the rule; "auto", the rule to `RULE_UP_TO` classes and 2,048 beyond."""
    if asked == "auto" and num_classes > RULE_UP_TO:
        return WIDEST_TRIED
    return asked if isinstance(asked, int) else hidden_width(num_classes)


def advice_on_width(num_classes: int, asked: Width) -> str | None:
    """What the user is told of a network that is wider than any in Table 6; None of another."""
    width = chosen_width(num_classes, asked)
    if width <= WIDEST_TRIED:
        return None
    by_rule = "" if isinstance(asked, int) else f" by the rule for {num_classes:,} classes"
    return (
        f"options.hidden: is {width:,}{by_rule}. Wider than {WIDEST_TRIED:,} brings nothing that is known: Table 6 of "
        "the supplement is flat, 41.2, 41.4 and 40.8 % with 512, 1,024 and 2,048 on ImageNet-LT. Time and memory grow "
        "with the width; set options.hidden=1024"
    )


class DifficultyNet(nn.Module):
    """D(A; theta): an MLP C -> H -> H -> C with ReLU and a sigmoid at the end (supplement, Fig. 5).

    Every class sees the accuracy of every class: what comes out is relative difficulty.
    """

    def __init__(self, num_classes: int, width: Width = None) -> None:
        super().__init__()
        hidden = chosen_width(num_classes, width)
        self.layers = nn.Sequential(
            nn.Linear(num_classes, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
            nn.Sigmoid(),
        )

    def forward(self, accuracy: Tensor) -> Tensor:
        """accuracy: (C,) in [0, 1]. Returns the difficulties d: (C,) in (0, 1)."""
        return self.layers(accuracy)


def class_weights(difficulty: Tensor) -> Tensor:
    """Eq. 4: w_c = C * d_c / sum_k d_k, so that the weights (C,) have mean 1."""
    return difficulty * (difficulty.numel() / difficulty.sum())


def driver_target(accuracy: Tensor, kind: str) -> Tensor:
    """What the driver loss pulls the difficulties towards: (C,) in [0, 1].

    relative: 1 - A_c / sum_k A_k, as in the authors' release; 1 for every class when no image is classified right yet.
    absolute: 1 - A_c. The relative target lies within 1/C of 1 on average, so after Eq. 4 it asks for nearly uniform
        weights when there are many classes; the absolute one keeps the spread of the accuracies.
    """
    assert kind in DRIVER_TARGETS, kind
    if kind == "absolute":
        return 1 - accuracy
    total = accuracy.sum()
    # A total of zero means that every accuracy is zero: dividing by one instead gives the target 1.
    return 1 - accuracy / torch.where(total > 0, total, torch.ones_like(total))


def driver_loss(difficulty: Tensor, accuracy: Tensor, target: str) -> Tensor:
    """L_driver = (1/C) sum_c (d_c - target_c)^2, 0-d."""
    return (difficulty - driver_target(accuracy, target)).square().mean()


def difficulty_gradient_loss(
    net: nn.Module, accuracy: Tensor, class_gradient: Tensor, driver_weight: float, target: str
) -> tuple[Tensor, Tensor]:
    """A scalar whose gradient in theta is that of Eq. 10, L_meta(phi_hat(theta)) + lambda * L_driver(theta).

    class_gradient: dL_meta/dw (C,), constant; its inner product with w(theta) has the gradient of L_meta in theta.
    Returns (scalar, driver loss), both 0-d.
    """
    difficulty = net(accuracy)
    driver = driver_loss(difficulty, accuracy, target)
    return torch.dot(class_gradient.detach(), class_weights(difficulty)) + driver_weight * driver, driver.detach()
