"""Ways to differentiate a solve: one idea a file, and every name.

An adjoint is a function `adjoint(integrator, f, y0, ss) -> (ys, report)`. `integrator(f, y0, ss)`
computes that; `f` is the field on [0, 1], a pytree whose arrays are the parameters (t0 and t1 among
them); `ss` are the output times in [0, 1]. Whatever the adjoint returns is differentiated by JAX; a
new one may live outside this library.
"""

from jaxode.adjoints.backsolve import backsolve
from jaxode.adjoints.direct import direct, forward
from jaxode.adjoints.names import adjoints, named
from jaxode.adjoints.replay import replay
from jaxode.adjoints.reversible import reversible

__all__ = [  # noqa: RUF022 - in reading order
    "adjoints",
    "named",
    "replay",
    "backsolve",
    "reversible",
    "direct",
    "forward",
]
