"""Dynamics networks and models as equinox modules, one concept a file."""

from jaxode.nn.classifiers import (
    classifier as classifier,
    Classifier as Classifier,
    MLPClassifier as MLPClassifier,
)
from jaxode.nn.fields import ConvField as ConvField, MLPField as MLPField
from jaxode.nn.layers import Conv as Conv, GroupNorm as GroupNorm
from jaxode.nn.neural_ode import NeuralODE as NeuralODE
from jaxode.nn.resnet import ResidualBlock as ResidualBlock, ResidualBlocks as ResidualBlocks
