"""Dynamics networks and models as equinox modules, one concept a file."""

from jaxode.nn.augmented import Augmented as Augmented
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
from jaxode.nn.flows import ConcatSquash as ConcatSquash
from jaxode.nn.flows import ContinuousFlow as ContinuousFlow
from jaxode.nn.flows import Normal as Normal
from jaxode.nn.flows import PlanarField as PlanarField
from jaxode.nn.flows import PlanarFlow as PlanarFlow
from jaxode.nn.hamiltonian import DivergenceFreeField as DivergenceFreeField
from jaxode.nn.hamiltonian import HamiltonianField as HamiltonianField
from jaxode.nn.hamiltonian import SeparableHamiltonian as SeparableHamiltonian
from jaxode.nn.integrals import Hutchinson as Hutchinson
from jaxode.nn.integrals import JacobianNorm as JacobianNorm
from jaxode.nn.integrals import WithIntegrals as WithIntegrals
from jaxode.nn.integrals import divergence as divergence
from jaxode.nn.integrals import kinetic_energy as kinetic_energy
from jaxode.nn.latent import ODERNN as ODERNN
from jaxode.nn.latent import RNN as RNN
from jaxode.nn.latent import LatentODE as LatentODE
from jaxode.nn.latent import RecognitionRNN as RecognitionRNN
from jaxode.nn.latent import Series as Series
from jaxode.nn.layers import Conv as Conv
from jaxode.nn.layers import GroupNorm as GroupNorm
from jaxode.nn.neural_ode import NeuralODE as NeuralODE
from jaxode.nn.point_process import JointModel as JointModel
from jaxode.nn.point_process import PointProcess as PointProcess
from jaxode.nn.resnet import ResidualBlock as ResidualBlock
from jaxode.nn.resnet import ResidualBlocks as ResidualBlocks
