"""Dynamics networks and models as equinox modules, one concept a file."""

from jaxode.nn.classifiers import (
    Classifier as Classifier,
)
from jaxode.nn.classifiers import (
    MLPClassifier as MLPClassifier,
)
from jaxode.nn.classifiers import (
    classifier as classifier,
)
from jaxode.nn.fields import ConvField as ConvField
from jaxode.nn.fields import MLPField as MLPField
from jaxode.nn.layers import Conv as Conv
from jaxode.nn.layers import GroupNorm as GroupNorm
from jaxode.nn.neural_ode import NeuralODE as NeuralODE
from jaxode.nn.resnet import ResidualBlock as ResidualBlock
from jaxode.nn.resnet import ResidualBlocks as ResidualBlocks
