"""A method for one who does not know whether a problem is stiff: explicit steps, or implicit ones.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.2; Petzold
(1983), Automatic selection of methods for solving stiff and nonstiff systems of ordinary differential
equations.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.explicit import Tableau
from jaxode.methods.implicit import begin_to_follow, followed, geometric, vectors
from jaxode.methods.linear import DENSE, Linear
from jaxode.methods.method import AT_REST, QUIET, SAFETY, Method, Step, chosen
from jaxode.methods.rosenbrock import Rosenbrock, rodas5p
from jaxode.methods.tables import methods as tables

# Implicit steps look mild where h |lambda| is below MILD; after CALM of them in a row the next one is explicit.
# Where accuracy limits steps of tsit5 it is 0.3 to 2.4 (Lorenz, Kepler, 1e-3 to 1e-8); beyond 3 they leave the
# stability region.
MILD, CALM = 1.5, 8
LARGE = 512  # numbers of a state beyond which a dense Jacobian is too much to try


class Memory(NamedTuple):
    """What the next step is told.

    Attributes:
        slope: dy/ds.
        left: how many steps from now on are implicit, whatever they look like.
        direction: a vector that turns to the fastest mode of df/dy, by a product with it in each step.
        rates: how much longer the last two products have made it.
    """

    slope: PyTree
    left: Array
    direction: PyTree
    rates: Array


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """Steps of tsit5, and of rodas5p where they look stiff: a choice of each solve, step by step.

    A step is implicit if it would leave the stability region of tsit5, and after it until eight in a row have
    looked mild. What is asked is h |lambda|, lambda the largest eigenvalue of df/dy, which a power method
    follows: each step multiplies a direction with df/dy. A matrix that is not normal stretches it by more
    than any eigenvalue, one of position and velocity by 1 and by omega^2 in turn; so |lambda| is the geometric
    mean of two products. (The difference of two stages at the end of a step, as in HW eq. IV.2.26, would only
    have modes that the solution excites.)

    So a derivative with step sizes held fixed is no product of unstable steps either, to which
    `jaxode.stepping.stability` sees for explicit methods. Where the solution is at rest no error keeps explicit
    steps short enough for modes that oscillate: there steps are implicit sooner.

    Both methods are of order 5(4), so that one error norm and one controller serve them. States of
    more than 512 numbers take tsit5 alone, unless `linear` says what their Jacobian looks like. A batch
    pays for both kinds of steps where some of its solves are stiff and others are not.

    Attributes:
        linear: how df/dy is found, and systems with it solved (`jaxode.methods.linear`).
        looks: where an implicit step looks at its dense output.

    >>> from jaxode import solve
    >>> f = lambda y, t, speed: -speed * (y - jnp.cos(t))
    >>> found = [solve(f, 1.0, [0.0, 3.0], k, method="auto", rtol=1e-4, atol=1e-4) for k in (1.0, 1e4)]
    >>> [bool(solution.stats.accepted < 60) for solution in found]
    [True, True]
    """

    linear: Linear = DENSE
    looks: tuple[float, ...] = ()
    order = 5
    error_order = 4
    any_state = True
    implicit = True
    measures = True
    equal_steps = False
    stage_count = 16

    @property
    def mild(self) -> Tableau:
        return tables["tsit5"]  # type: ignore[return-value]

    @property
    def stiff(self) -> Rosenbrock:
        return dataclasses.replace(rodas5p, linear=self.linear, looks=self.looks)

    def jacobian(self, f, field, s, y: Array) -> PyTree:
        """df/dy, with the structure that is declared."""
        return self.stiff.jacobian(f, field, s, y)

    def suited_to(self, y0: PyTree) -> Method:
        size = tree.count(y0)
        return self if size <= LARGE or self.linear != DENSE else self.mild

    def looking_inside(self) -> Method:
        return dataclasses.replace(self, looks=self.stiff.places)

    def start(self, f, s, y: PyTree) -> Memory:
        return Memory(
            f(y, s), jnp.zeros((), s.dtype), *begin_to_follow(lambda y: f(y, s), y, s.dtype)
        )

    def fastest(self, f, s, y: PyTree, memory: Memory):
        return geometric(memory.rates)

    def slope(self, f, s, y: PyTree, memory: Memory) -> PyTree:
        return memory.slope

    def step(self, f, s, y: PyTree, memory: Memory, h, norm=None) -> Step:
        _, left, direction, rates = lax.stop_gradient(memory)
        is_stiff = (left > 0) | (h * geometric(rates) > self.stable)
        # With h = 0 for the others: what is computed and left out must have finite derivatives.
        zero = jnp.zeros_like(h)
        mild_h, stiff_h = jnp.where(is_stiff, zero, h), jnp.where(is_stiff, h, zero)
        step = chosen(
            is_stiff,
            lambda: self.stiff_step(f, s, y, memory.slope, stiff_h),
            lambda: self.mild_step(f, s, y, memory.slope, mild_h),
        )
        direction, rates = followed(
            lambda y: f(y, s + h), lax.stop_gradient(step.y), direction, rates
        )
        left = self.left_after(step, is_stiff, left, h * geometric(rates), norm)
        memory = Memory(step.slope, left, direction, rates)
        return step._replace(memory=memory, stages=(is_stiff, step.stages))

    @property
    def stable(self) -> float:
        """The largest h |lambda| of an explicit step."""
        return SAFETY * self.mild.stability  # type: ignore[operator]

    def left_after(self, step: Step, is_stiff, left, speed, norm):
        """How many steps are to be implicit after this one, whose h |lambda| is `speed`."""
        at_rest = norm is not None and lax.stop_gradient(norm(*step.errors, step.y)) < QUIET
        most = jnp.where(at_rest, AT_REST / SAFETY * self.stable, self.stable)
        most = jnp.where(is_stiff, MILD, most)
        return jnp.where(speed > most, CALM, jnp.maximum(left - 1, 0)).astype(left.dtype)

    def mild_step(self, f, s, y, k, h):
        """An explicit step."""
        step = self.mild.step(f, s, y, k, h)
        stages = [vectors(f, y)[1](k) for k in step.stages]
        spare = len(self.stiff.c) - len(stages)
        step = step._replace(inside_errors=[jax.tree.map(jnp.zeros_like, y) for _ in self.looks])
        return alike(step, [*stages, *[jnp.zeros_like(stages[0])] * spare])

    def stiff_step(self, f, s, y, k, h):
        """An implicit step."""
        step = self.stiff.step(f, s, y, k, h)
        return alike(step, list(step.stages))

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        is_stiff, vs = step.stages
        of = lambda method, stages: method.inside(f, s, y, h, step._replace(stages=stages))
        slopes = lambda: [vectors(f, y)[2](v) for v in vs[: len(self.mild.c)]]
        return lax.cond(is_stiff, lambda: of(self.stiff, vs), lambda: of(self.mild, slopes()))

    def backwards(self) -> Method:
        raise ValueError(
            "adjoint='backsolve' needs a method with a name, such as 'tsit5' for a problem that is not "
            "stiff: method='auto' may take implicit steps. Or use adjoint='replay'."
        )


def alike(step: Step, stages) -> Step:
    """A step in the form that both methods have."""
    evaluations = jnp.asarray(step.evaluations, jnp.int32)
    return step._replace(
        memory=None, stages=stages, converged=jnp.asarray(step.converged), evaluations=evaluations
    )


methods: dict[str, Method] = {"auto": Auto()}
"""Every method by its name."""
