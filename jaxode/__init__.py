"""jaxode: differential equations inside JAX models."""

from jaxode.controllers import Controller as Controller, pid as pid
from jaxode.solution import (
    Solution as Solution,
    SolveError as SolveError,
    Stats as Stats,
    Status as Status,
)
from jaxode.solve import odeint as odeint, solve as solve
