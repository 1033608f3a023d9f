"""A replayed pass has the tangent of the recorded one, whatever the order and the readers of its operations."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlt.autograd import ForwardRecord
from fastlt.meta import gradient as meta_gradient

CLASSES = 5


class Network(nn.Module):
    """Two convolutions and BatchNorms, which `body` puts together, and a head."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(self, x).square().mean((2, 3)))


def relu_(x):
    return F.relu(x, inplace=True)


def in_place(net, x):
    return relu_(net.bn2(net.conv2(relu_(net.bn1(net.conv1(x))))))


def out_of_place(net, x):
    y = net.bn1(net.conv1(x))
    z = F.relu(y)
    return F.relu(net.bn2(net.conv2(z))) + y * z


def without_relu(net, x):
    return net.bn2(net.conv2(net.bn1(net.conv1(x))))


def residual(net, x):
    y = relu_(net.bn1(net.conv1(x)))
    return relu_(net.bn2(net.conv2(y)) + y)


def residual_in_place(net, x):
    y = relu_(net.bn1(net.conv1(x)))
    z = net.bn2(net.conv2(y))
    z += y
    return relu_(z)


def summand_read_again(net, x):
    y = net.bn1(net.conv1(x))
    z = net.bn2(net.conv2(y))
    return relu_(z + y) * z + y


def summand_read_before_sum(net, x):
    y = net.bn1(net.conv1(x))
    z = net.bn2(net.conv2(y))
    doubled = 2 * z
    return relu_(y + z) + doubled


def summand_named(net, x):
    y = relu_(net.bn1(net.conv1(x)))
    return relu_(net.bn2(net.conv2(y)).add(other=y))


def summand_read_at_the_end(net, x):
    y = relu_(net.bn1(net.conv1(x)))
    z = net.bn2(net.conv2(y))
    relu_(z + y)
    return z


def two_normalised_summands(net, x):
    y = net.conv1(x)
    return relu_(net.bn1(y) + net.bn2(net.conv2(y)))


def convolution_read_twice(net, x):
    y = net.conv1(x)
    return relu_(net.bn1(y)) * y + net.bn2(y)


def read_before_relu(net, x):
    y = net.bn1(net.conv1(x))
    doubled = 2 * y
    return relu_(y) + doubled


def two_relus(net, x):
    return F.relu(relu_(net.bn1(net.conv1(x))))


def dropout_between(net, x):
    return relu_(F.dropout(net.bn1(net.conv1(x)), 0.5, training=True))


def shared(net, x):
    y = relu_(net.bn1(net.conv1(x)))
    for _ in range(2):
        y = relu_(net.bn2(net.conv2(y)))
    return y


def constant_summand(net, x):
    return relu_(net.bn1(net.conv1(x)) + x.mean(1, keepdim=True).expand(-1, 4, -1, -1).clone())


def convolution_without_tangent(net, x):
    return relu_(net.bn1(F.conv2d(x, net.conv1.weight.detach(), padding=1)))


def pixels_as_samples(net, x):
    return relu_(F.batch_norm(x.flatten(2).mean(2) @ net.conv2.weight[:3, :, 0, 0], None, None, training=True))[
        :, :, None, None
    ]


BODIES = [
    in_place,
    out_of_place,
    without_relu,
    residual,
    residual_in_place,
    summand_read_again,
    summand_read_before_sum,
    summand_named,
    summand_read_at_the_end,
    two_normalised_summands,
    convolution_read_twice,
    read_before_relu,
    two_relus,
    dropout_between,
    shared,
    constant_summand,
    convolution_without_tangent,
    pixels_as_samples,
]


def problem(body, memory_format, dtype=torch.float64):
    """(parameters, losses as a function of them, which draw the same random numbers every time, a direction)."""
    torch.manual_seed(0)
    model = Network(body).to(dtype=dtype, memory_format=memory_format).train()
    images = torch.randn(6, 3, 7, 5, dtype=dtype).contiguous(memory_format=memory_format)
    labels = torch.arange(6) % CLASSES
    parameters = meta_gradient.trainable_parameters(model)

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")

    def losses(parameters):
        torch.manual_seed(1)
        return meta_gradient.functional_losses(model, loss, images, labels)(parameters)

    return parameters, losses, [torch.randn_like(p) for p in parameters.values()]


def gradient(loss, parameters):
    return torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def derivatives(losses_of, parameters, direction):
    """(b,), one backward pass a loss. In forward mode activations lie otherwise in memory, and dropout drops others."""
    losses = losses_of(parameters)
    return torch.stack(
        [sum((g * d).sum() for g, d in zip(gradient(loss, parameters), direction, strict=True)) for loss in losses]
    )


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm() + 1e-15


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_recorded_tangent_is_the_one_computed_anew(body, memory_format, lean):
    parameters, losses_of, direction = problem(body, memory_format)
    expected_tangent = derivatives(losses_of, parameters, direction)
    expected = gradient(losses_of(parameters).mean(), parameters)
    record = ForwardRecord(lean)
    with record.recording():
        losses = losses_of(parameters)
    record.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            tangent = meta_gradient.directional_derivative(losses_of, parameters, direction, record)
            assert_close([tangent], [expected_tangent])
            assert_close(gradient(losses.mean(), parameters), expected)
