"""Ways to differentiate a solve: one idea a file, and every name.

An adjoint is a function `adjoint(integrator, f, y0, ss) -> (ys, report)`. `integrator(f, y0, ss)`
computes that; `f` is the field on [0, 1], a pytree whose arrays are the parameters (t0 and t1 among
them); `ss` are the output times in [0, 1]. Whatever the adjoint returns is differentiated by JAX; a
new one may live outside this library.
"""

from jaxode.adjoints.backsolve import backsolve as backsolve
from jaxode.adjoints.direct import direct as direct
from jaxode.adjoints.direct import forward as forward
from jaxode.adjoints.names import adjoints as adjoints
from jaxode.adjoints.names import named as named
from jaxode.adjoints.replay import replay as replay
from jaxode.adjoints.reversible import reversible as reversible
