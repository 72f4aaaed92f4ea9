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
from jaxode.methods.implicit import vectors
from jaxode.methods.linear import DENSE, Linear, in_forward_mode
from jaxode.methods.method import Method, Step, chosen
from jaxode.methods.rosenbrock import Rosenbrock, rodas5p
from jaxode.methods.tables import methods as tables

# A step looks stiff if h |lambda| is beyond STIFF: tsit5 is stable to 3.5 on the negative axis, and where
# accuracy limits it this is 0.3 to 2.4 (Lorenz, Kepler, 1e-3 to 1e-8). It does not below MILD.
STIFF, MILD = 2.8, 1.5
# So many steps more that look so than do not make the next one implicit; so many in a row, explicit.
PATIENCE, CALM = 8, 8
LARGE = 512  # numbers of a state beyond which a dense Jacobian is too much to try


class Memory(NamedTuple):
    """The slope, and how many accepted steps have looked stiff; from `PATIENCE` on steps are implicit,
    and those that do not look stiff are counted on top of it."""

    slope: PyTree
    seen: Array


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """Steps of tsit5, and of rodas5p where they look stiff: a choice of each solve, step by step.

    What looks stiff is h |lambda|, lambda the largest eigenvalue of df/dy. The last two slopes of an
    explicit step are both at its end; their difference v turns towards the fastest mode where
    stability limits the steps, and |J v| / |v| is |lambda| (as in HW eq. IV.2.26, but one product
    later, where what is smooth is gone). An implicit step is asked by the power method.

    Both methods are of order 5(4), so that one error norm and one controller serve them. States of
    more than 512 numbers take tsit5 alone, unless `linear` says what their Jacobian looks like. A batch
    pays for both kinds of steps where some of its solves are stiff and others are not.

    Attributes:
        linear: how df/dy is found, and systems with it solved (`jaxode.methods.linear`).

    >>> from jaxode import solve
    >>> f = lambda y, t, speed: -speed * (y - jnp.cos(t))
    >>> found = [solve(f, 1.0, [0.0, 3.0], k, method="auto", rtol=1e-4, atol=1e-4) for k in (1.0, 1e4)]
    >>> [bool(solution.stats.accepted < 60) for solution in found]
    [True, True]
    """

    linear: Linear = DENSE
    order = 5
    error_order = 4
    any_state = True
    implicit = True
    equal_steps = False
    stage_count = 16

    @property
    def mild(self) -> Tableau:
        return tables["tsit5"]  # type: ignore[return-value]

    @property
    def stiff(self) -> Rosenbrock:
        return dataclasses.replace(rodas5p, linear=self.linear)

    def jacobian(self, f, field, s, y: Array) -> PyTree:
        """df/dy, with the structure that is declared."""
        return self.stiff.jacobian(f, field, s, y)

    def suited_to(self, y0: PyTree) -> Method:
        size = tree.count(y0)
        return self if size <= LARGE or self.linear != DENSE else self.mild

    @property
    def stability(self) -> float:  # type: ignore[override]
        return self.mild.stability

    def stable_up_to(self, memory: Memory):
        return jnp.where(memory.seen >= PATIENCE, jnp.inf, self.stability)

    def start(self, f, s, y: PyTree) -> Memory:
        return Memory(f(y, s), jnp.zeros((), s.dtype))

    def slope(self, f, s, y: PyTree, memory: Memory) -> PyTree:
        return memory.slope

    def step(self, f, s, y: PyTree, memory: Memory, h) -> Step:
        seen = lax.stop_gradient(memory.seen)
        is_stiff = seen >= PATIENCE
        # With h = 0 for the others: what is computed and left out must have finite derivatives.
        zero = jnp.zeros_like(h)
        mild_h, stiff_h = jnp.where(is_stiff, zero, h), jnp.where(is_stiff, h, zero)
        step, seen = chosen(
            is_stiff,
            lambda: self.stiff_step(f, s, y, memory.slope, stiff_h, seen),
            lambda: self.mild_step(f, s, y, memory.slope, mild_h, seen),
        )
        return step._replace(memory=Memory(step.slope, seen), stages=(is_stiff, step.stages))

    def mild_step(self, f, s, y, k, h, seen):
        """An explicit step, and how many have looked stiff after it."""
        step = self.mild.step(f, s, y, k, h)
        v = tree.difference(step.stages[-1], step.stages[-2])
        rate = fastest(lambda y: f(y, s + h), *lax.stop_gradient((step.y, v)), 1)
        looks = h * lax.convert_element_type(rate, h.dtype) > STIFF
        seen = jnp.where(looks, seen + 1, jnp.maximum(seen - 1, 0))
        stages = [vectors(f, y)[1](k) for k in step.stages]
        spare = len(self.stiff.c) - len(stages)
        return alike(step, [*stages, *[jnp.zeros_like(stages[0])] * spare]), seen

    def stiff_step(self, f, s, y, k, h, seen):
        """An implicit step, and the same."""
        step = self.stiff.step(f, s, y, k, h)
        rate = fastest(lambda y: f(y, s), lax.stop_gradient(y), tree.any_direction(y), 3)
        looks = h * lax.convert_element_type(rate, h.dtype) > MILD
        seen = jnp.where(looks, PATIENCE, seen + 1)
        return alike(step, list(step.stages)), jnp.where(seen < PATIENCE + CALM, seen, 0)

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


def fastest(f, y: PyTree, v: PyTree, products: int):
    """About the largest |lambda| of J = df/dy: |J v| / |v|, after so many products with J."""
    with in_forward_mode():
        push = jax.linearize(f, y)[1]
    for _ in range(products):
        v = push(tree.unit(v))
    return tree.length(v)


methods: dict[str, Method] = {"auto": Auto()}
"""Every method by its name."""
