"""A step that can be taken back: algebraically reversible, from any explicit Runge-Kutta table.

After McCallum and Foster (2024), Efficient, accurate and stable gradients for neural ODEs, arXiv 2410.11648.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.explicit import Tableau
from jaxode.methods.method import Around, Method, Step, combined

# By so many errors of a step, the largest one so far, the two states may differ; and where the table has no
# estimate of them, by so many times the distance after one step.
APART, GROWN = 3, 100
# By so many roundings they may in any case: over thousands of tiny steps these are more than the errors.
ROUNDINGS = 64


class Pair(NamedTuple):
    """The second state z, the slope of the first, the largest error of a step so far (less than 0 right
    after the states were made one, where the table has no estimate), and how often they were."""

    z: PyTree
    slope: PyTree
    error: Array
    joins: Array


def made_reversible(method: Method) -> "Reversible":
    """The method in steps that can be taken back.

    Raises:
        ValueError: it has no explicit table of its own.
    """
    if isinstance(method, Tableau):
        return Reversible(method)
    raise ValueError(
        "adjoint='reversible' takes steps of an explicit Runge-Kutta method ('tsit5', 'dop853', 'dopri5', "
        "'bosh3', 'rk4', ...), without events or a fold, and not `compensated`: use adjoint='replay' there."
    )


@dataclasses.dataclass(frozen=True)
class Reversible(Around):
    """Two states that step in turn, with Psi_h(x) what a step of size h of the table adds to x:

        y1 = y + Psi_h(z),   z1 = z - Psi_-h(y1),

    of the order of the table. From y1 and z1 the same two lines give z and then y, so that a backward pass
    needs no stored states. The states come apart at the rate of the fastest mode, growing or decaying (of
    a mode e^(mu t) there is one e^(-mu t) in their distance). McCallum and Foster pull them together
    by a factor in every step, which spoils the way back over many steps, and is not enough where a mode
    decays. Here they are made one, z = y, where they differ by more than some errors of a step. What
    that loses is all that is stored: about one pair of states in five time constants.
    """

    def __post_init__(self):
        super().__post_init__()
        assert isinstance(self.method, Tableau)
        for name, value in {
            "sums_slopes": True,
            "explains": False,
            "measures": True,
            "step_evaluations": 2 * self.method.step_evaluations + 2,
            "stage_count": 2 * self.method.stage_count,
        }.items():
            object.__setattr__(self, name, value)

    def start(self, f, s, y: PyTree) -> Pair:
        zero = jnp.zeros_like(s)
        return Pair(y, f(y, s), zero, zero)

    def slope(self, f, s, y: PyTree, memory: Pair) -> PyTree:
        return memory.slope

    def step(self, f, s, y: PyTree, memory: Pair, h, norm) -> Step:
        z, joins, error = self.joined(y, memory, norm)
        there, _, step = self.psi(f, s, z, h)
        y1 = jax.tree.map(lax.add, y, there)
        back, slope, _ = self.psi(f, s + h, y1, -h)
        z1 = tree.difference(z, back)
        if step.errors:
            norms = (measured(norm, e, y1, error) for e in step.errors)
            error = jnp.maximum(error, combined(*norms))
        memory1, stages = Pair(z1, slope, error, memory.joins + joins), (step, z)
        return Step(y1, memory1, slope, step.errors, stages, evaluations=self.step_evaluations or 0)

    def psi(self, f, s, x: PyTree, h) -> tuple[PyTree, PyTree, Step]:
        """Psi_h(x), the slope at x, and the step of the table."""
        table, slope = self.method, f(x, s)
        step = table.step(f, s, x, slope, h)
        terms = [(b, k) for b, k in zip(table.b, step.stages) if b]  # type: ignore[attr-defined]
        return tree.weighted_sum(h, terms), slope, step

    def joined(self, y: PyTree, memory: Pair, norm):
        """The second state where a step begins, whether it was made the first one, and the error.

        Without an estimate that is the distance after the first step from one state.
        """
        apart = measured(norm, tree.difference(y, memory.z), y, memory.error)
        error = memory.error
        if self.error_order is None:
            error = jnp.where(error > 0, error, jnp.maximum(-error, apart))
            joins = apart > GROWN * error
            error = jnp.where(joins, -error, error)
        else:
            of = lambda y: ROUNDINGS * float(jnp.finfo(y.dtype).eps) * y
            least = measured(norm, jax.tree.map(of, y), y, error)
            joins = apart > jnp.maximum(APART * error, least)
        return tree.where(joins, y, memory.z), joins.astype(memory.joins.dtype), error

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """Dense output of the step from z: what it adds, y gains."""
        there, z = step.stages
        return self.method.inside(f, s, z, h, there)


def measured(norm, x: PyTree, y: PyTree, like) -> Array:
    """The norm of x beside what is tolerated at y, as a number that is not differentiated."""
    return lax.stop_gradient(norm(x, y)).astype(like.dtype)
