"""Symplectic methods by their public names: `Splitting` makes one, `splittings` has them all."""

from jaxode.methods.symplectic import Splitting as Splitting
from jaxode.methods.symplectic import composed as composed
from jaxode.methods.symplectic import leapfrog as leapfrog
from jaxode.methods.symplectic import splittings as splittings
from jaxode.methods.symplectic import yoshida4 as yoshida4
