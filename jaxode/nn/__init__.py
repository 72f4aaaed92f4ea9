"""Dynamics networks and models as equinox modules, one concept a file.

| for | use |
|---|---|
| a field dy/dt = f(y, t) | `MLPField`, `ConvField`, `ConcatSquash`, `PlanarField` |
| one that keeps energy, or volume | `HamiltonianField`, `SeparableHamiltonian`, `DivergenceFreeField` |
| a solve as a layer | `NeuralODE`, with more dimensions than its input `Augmented` |
| the correction of a `jaxode.methods.Hypersolver`, and what it is fitted to | `MLPCorrection`, `residuals` |
| integrals beside a solve | `WithIntegrals`, `kinetic_energy`, `JacobianNorm`, `divergence`, `Hutchinson` |
| classifiers | `classifier`, `Classifier`, `MLPClassifier`, `ResidualBlock`, `ResidualBlocks` |
| densities and samples | `ContinuousFlow`, `PlanarFlow`, `Normal` |
| flow matching | `flow_matching_loss`, `ProbabilityPath`, `linear_path`, `diffusion_path`, `optimal_pairs` |
| irregular series | `LatentODE`, `RecognitionRNN`, `RNN`, `ODERNN`, `Series` |
| states driven by data | `NeuralCDE`, `ControlledField`, `control_path` |
| events in time | `PointProcess`, `JointModel` |
| layers of these | `Conv`, `GroupNorm` |
"""

from jaxode.nn.augmented import Augmented
from jaxode.nn.classifiers import Classifier, MLPClassifier, classifier
from jaxode.nn.controlled import ControlledField, NeuralCDE, control_path
from jaxode.nn.corrections import MLPCorrection, residuals
from jaxode.nn.fields import ConvField, MLPField
from jaxode.nn.flows import ConcatSquash, ContinuousFlow, Normal, PlanarField, PlanarFlow
from jaxode.nn.hamiltonian import DivergenceFreeField, HamiltonianField, SeparableHamiltonian
from jaxode.nn.integrals import Hutchinson, JacobianNorm, WithIntegrals, divergence, kinetic_energy
from jaxode.nn.latent import ODERNN, RNN, LatentODE, RecognitionRNN, Series
from jaxode.nn.layers import Conv, GroupNorm
from jaxode.nn.matching import (
    ProbabilityPath,
    diffusion_path,
    flow_matching_loss,
    linear_path,
    optimal_pairs,
)
from jaxode.nn.neural_ode import NeuralODE
from jaxode.nn.point_process import JointModel, PointProcess
from jaxode.nn.resnet import ResidualBlock, ResidualBlocks

__all__ = [  # noqa: RUF022 - in the order of the table
    "MLPField",
    "ConvField",
    "ConcatSquash",
    "PlanarField",
    "HamiltonianField",
    "SeparableHamiltonian",
    "DivergenceFreeField",
    "NeuralODE",
    "Augmented",
    "MLPCorrection",
    "residuals",
    "WithIntegrals",
    "kinetic_energy",
    "JacobianNorm",
    "divergence",
    "Hutchinson",
    "classifier",
    "Classifier",
    "MLPClassifier",
    "ResidualBlock",
    "ResidualBlocks",
    "ContinuousFlow",
    "PlanarFlow",
    "Normal",
    "flow_matching_loss",
    "ProbabilityPath",
    "linear_path",
    "diffusion_path",
    "optimal_pairs",
    "LatentODE",
    "RecognitionRNN",
    "RNN",
    "ODERNN",
    "Series",
    "NeuralCDE",
    "ControlledField",
    "control_path",
    "PointProcess",
    "JointModel",
    "Conv",
    "GroupNorm",
]
