"""Recorded forward passes, saved tensors that are recomputed, tangent rules, folded BatchNorm: see README.md.

The rest of fastlt imports the names below and no module of this package.
"""

from fastlt.autograd.activations import OverwrittenError
from fastlt.autograd.folded_batch_norm import FoldedForward
from fastlt.autograd.forward_record import ForwardRecord, recordable
from fastlt.autograd.modes import NoGradWatch, TangentMode
from fastlt.autograd.rules import ForwardChangedError, scaled_and_shifted
from fastlt.autograd.saved_tensors import with_recompute

__all__ = [
    "FoldedForward",
    "ForwardChangedError",
    "ForwardRecord",
    "NoGradWatch",
    "OverwrittenError",
    "TangentMode",
    "recordable",
    "scaled_and_shifted",
    "with_recompute",
]
