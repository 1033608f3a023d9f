"""What becomes synchronised, and that nothing else changes; tests/parity/test_processes.py trains with it."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.models import build_model
from fastlt.models.sync_batch_norm import SYNCHRONISED, Synchronised, synchronise_batch_norm

REDUCER = Reducer(1, 2)


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenetv3_small_100"])
def test_parameters_buffers_and_the_eval_pass_stay(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5)
    before, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    own = {key: id(p) for key, p in model.named_parameters()}
    synchronise_batch_norm(model, REDUCER)
    synchronise_batch_norm(model, REDUCER)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, Synchronised) and norm.reducer is REDUCER for norm in norms)
    assert {key: id(p) for key, p in model.named_parameters()} == own
    assert model.state_dict().keys() == before.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), before.eval()(images))


def test_every_kind_stays_an_instance_of_its_own_kind():
    for plain, synchronised in SYNCHRONISED.items():
        assert issubclass(synchronised, plain)
    layer = nn.Sequential(BatchNormAct2d(3))
    synchronise_batch_norm(layer, REDUCER)
    assert isinstance(layer[0], BatchNormAct2d)


def test_a_kind_without_a_counterpart_is_refused_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm2d(4), SplitBatchNorm2d(4))
    with pytest.raises(ValueError, match=r"SplitBatchNorm2d.*Set it to false"):
        synchronise_batch_norm(model, REDUCER)
    assert type(model[0]) is nn.BatchNorm2d
