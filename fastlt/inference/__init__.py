"""A trained network in use: `load` a run, `predict` images."""

from fastlt.inference.evaluation import Evaluation
from fastlt.inference.loading import load
from fastlt.inference.predictions import Prediction, Predictions
from fastlt.inference.predictor import Coverage, Predictor
from fastlt.inference.temperature import Temperature

__all__ = ["Coverage", "Evaluation", "Prediction", "Predictions", "Predictor", "Temperature", "load"]
