"""Hypersolvers: an explicit Runge-Kutta method with a learnt correction of each step.

Reference: Poli, Massaroli, Yamashita, Asama, Park (2020), Hypersolvers: Toward Fast Continuous-Depth
Models, arXiv 2007.09601.
"""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.methods.explicit import Tableau
from jaxode.methods.method import Method, Step
from jaxode.methods.names import named


class Hypersolver(eqx.Module, Method):
    """A step of an explicit method of order p, and what a function, such as a network, adds to it:

        y1 = y + h psi(t, y) + h^(p+1) g(y, t, h, f(y, t)),

    psi the increment of the method (Poli et al. 2020, sec. 3). With g = 0 it is the method. With g the residual
    (y(t + h) - y - h psi) / h^(p+1) steps are exact, and with its limit at h = 0 they are of order p + 1. A
    correction that is off by a share delta of the residual leaves this share of the error of a step, O(delta
    h^(p+1)) (theorem 1): the order of the solution is still p. `jaxode.nn.residuals` finds what g should be at
    rows of accurate solutions, and `jaxode.nn.MLPCorrection` is a network to be fitted to it.

    A correction costs no evaluation of func, and `Stats` count none: it pays where g is far cheaper than func.
    Steps have the size `dt`: nothing estimates what is left of their errors, so that steps that adapt are
    refused.

    The arrays of a correction are found wherever `solve` finds those of func: in an equinox module, in args, in
    what it closes over. So it may be made under `jit`, batched by `vmap`, and trained through a solve, by
    "replay", "direct" or "forward". The adjoint "backsolve" knows of the differential equation alone, and is
    refused: derivatives in weights are not to be had from it. A Hypersolver is a pytree, of which the
    correction is a part: it may be an argument of a function, and a model to be trained.

    Attributes:
        method: an explicit Runge-Kutta method, or its name: "euler", "heun", "rk4", ...
        correction: g, called as `correction(y, t, h, slope, *args)`: y as func sees it, t and h numbers in the
            unit of time of func, h < 0 where times decrease, slope what func returns there. It returns a
            pytree like y.

    Raises:
        TypeError: the correction is no function, or returns something that is not like y0.
        ValueError: the method has no explicit table; or, of `solve`, there is no step size `dt`.

    >>> import jax.numpy as jnp
    >>> from jaxode import odeint
    >>> from jaxode.methods import Hypersolver
    >>> decay = lambda y, t: -y
    >>> half = lambda y, t, h, slope: y / 2  # y'' / 2, the limit of the residual of Euler's method
    >>> for method in ("euler", Hypersolver("euler", half)):
    ...     end = odeint(decay, jnp.array(1.0), [0.0, 1.0], method=method, dt=0.1)[-1]
    ...     print(f"{abs(end - jnp.exp(-1)):.4f}")
    0.0192
    0.0007
    """

    method: Tableau = eqx.field(static=True)
    correction: Callable
    error_order = None

    def __init__(self, method: str | Method, correction: Callable):
        table = named(method)
        if not isinstance(table, Tableau):
            raise ValueError(
                "a Hypersolver corrects an explicit Runge-Kutta method, such as 'euler', 'heun' or 'rk4'; got "
                f"{method if isinstance(method, str) else type(table).__name__!r}."
            )
        if not callable(correction):
            raise TypeError(
                "`correction` must be a function correction(y, t, h, slope, *args); got "
                f"{type(correction).__name__}."
            )
        self.method, self.correction = table, correction

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.method.order

    @property
    def step_evaluations(self) -> int:  # type: ignore[override]
        return self.method.step_evaluations

    @property
    def inside_evaluations(self) -> int:  # type: ignore[override]
        return self.method.inside_evaluations

    @property
    def stage_count(self) -> int:  # type: ignore[override]
        return self.method.stage_count + 1

    @property
    def stability(self) -> float:  # type: ignore[override]
        return self.method.stability

    def start(self, f, s, y: PyTree) -> PyTree:
        return f(y, s)

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        """As of the table, with one more slope in y1: (h span)^p span g, where dy/ds is span dy/dt.

        f is a `jaxode.corrections.Corrected`, whose `correction` is that.
        """
        stages = list(zip(self.method.c[1:], self.method.a[1:]))
        ks = [memory]
        for c, row in stages[:-1]:
            ks.append(f(tree.combine(y, h, row, ks), s + tree.scale(c, h)))
        extra = f.correction(s, y, memory, h, self.order)
        y1 = tree.combine(y, h, [*stages[-1][1], 1.0], [*ks, extra])
        slope = f(y1, s + h)
        stages = [*ks, slope], tree.weighted_sum(h, [(1.0, extra)])
        return Step(y1, slope, slope, [], stages, evaluations=self.step_evaluations)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """That of the table, and theta^2 (3 - 2 theta) times the correction: which is there at the end of the
        step, and changes no slope at either end."""
        ks, correction = step.stages
        d = self.method.inside(f, s, y, h, step._replace(stages=ks))
        for p, weight in ((1, 3.0), (2, -2.0)):
            d[p] = tree.combine(d[p], 1.0, [weight], [correction])
        return d

    def residual(self, f, s, y: PyTree, slope: PyTree, h, y1: PyTree) -> PyTree:
        """What the correction of a step from y should have been, for it to lead to y1, without that which
        there is: (y1 - y - h psi) / h^(p+1)."""
        left = tree.difference(y1, self.method.step(f, s, y, slope, h).y)
        return jax.tree.map(lambda x: tree.scale(h ** -(self.order + 1), x), left)

    def backwards(self) -> Method:
        raise ValueError(
            "adjoint='backsolve' differentiates the differential equation, and knows nothing of the "
            "correction of a Hypersolver, whose weights would have gradients of 0: use adjoint='replay'."
        )
