"""Explicit Runge-Kutta tables by their public names: `tableau` makes one, `methods` has them all."""

from jaxode.methods.explicit import Tableau as Tableau
from jaxode.methods.explicit import tableau as tableau
from jaxode.methods.names import named as named
from jaxode.methods.tables import *  # noqa: F403
from jaxode.methods.tables import methods as methods
