"""jaxode: differential equations inside JAX models."""

__version__ = "0.1.0"

from jaxode.constraints import consistent as consistent
from jaxode.controllers import Controller as Controller
from jaxode.controllers import pid as pid
from jaxode.diagnosis import explain as explain
from jaxode.events import Event as Event
from jaxode.gradients import gradient_report as gradient_report
from jaxode.integrate import odeint as odeint
from jaxode.integrate import solve as solve
from jaxode.signals import Signal as Signal
from jaxode.solution import (
    Solution as Solution,
)
from jaxode.solution import (
    SolveError as SolveError,
)
from jaxode.solution import (
    Stats as Stats,
)
from jaxode.solution import (
    Status as Status,
)
