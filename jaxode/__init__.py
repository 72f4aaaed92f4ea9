"""Differential equations inside JAX models: solved, differentiated, mapped over batches, trained through.

| to | use |
|---|---|
| solve dy/dt = func(y, t, *args): the states at some times | `odeint` |
| the same, with statistics, a status, events, dense output and all options | `solve` |
| read what `solve` returns | `Solution`, `Stats`, `Status`, `SolveError` |
| do something at a time, or where a condition changes its sign | `Event` |
| drive func by data that are known at some times | `Signal` |
| choose how step sizes follow errors | `Controller`, `pid` |
| find initial values of algebraic equations | `consistent` |
| know why a solve is slow, or fails | `explain` |
| know whether a gradient can be believed | `gradient_report` |
| build neural ODEs, flows, latent ODEs, point processes | `jaxode.nn` |
| train any model: progress, checkpoints, metrics | `jaxode.train` |
| find, configure or add a method, or say what structure a Jacobian has | `jaxode.methods` |
| configure or add a way to differentiate | `jaxode.adjoints` |
| try methods on problems whose answers are known | `jaxode.problems` |

>>> import jax
>>> from jaxode import odeint
>>> end = lambda rate: odeint(lambda y, t, rate: -rate * y, 1.0, [0.0, 1.0], rate)[-1]
>>> print(f"{end(2.0):.4f} {jax.grad(end)(2.0):.4f}")  # exp(-2), and its derivative
0.1353 -0.1353

What has no place in this table is not public, though it can be imported: the modules that
`help(jaxode)` lists below are how the library is made.
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

from jaxode.constraints import consistent
from jaxode.controllers import Controller, pid
from jaxode.diagnosis import explain
from jaxode.events import Event
from jaxode.gradients import gradient_report
from jaxode.integrate import odeint, solve
from jaxode.signals import Signal
from jaxode.solution import Solution, SolveError, Stats, Status
from jaxode.words import NAMES

if TYPE_CHECKING:  # those that read a program do not run `__getattr__`
    from jaxode import adjoints, methods, nn, problems, train

__all__ = [  # noqa: RUF022 - in the order of the table above
    "odeint",
    "solve",
    "Solution",
    "Stats",
    "Status",
    "SolveError",
    "Event",
    "Signal",
    "Controller",
    "pid",
    "consistent",
    "explain",
    "gradient_report",
    "nn",
    "train",
    "methods",
    "adjoints",
    "problems",
]
PACKAGES = ("nn", "train", "methods", "adjoints", "problems")


def __getattr__(name: str):
    """`jaxode.nn` and the like without an import of their own, made when they are asked for."""
    if name in PACKAGES:
        return importlib.import_module(f"jaxode.{name}")
    if name in NAMES:  # no AttributeError, of which `from jaxode import` would not keep the message
        raise ImportError(f"There is no `{name}` in jaxode: {NAMES[name]}.")
    raise AttributeError(f"module 'jaxode' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    """What is public, and nothing else: the names of the table above."""
    return __all__
