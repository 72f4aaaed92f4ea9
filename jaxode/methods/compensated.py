"""Long sums of short steps: what rounding takes from each is kept, and added to the next.

A state that moves by a millionth of itself keeps, in float32, one digit of that move: after a million steps
three digits of the state are left. So a second number beside each number of the state holds what is missing.

References: Kahan (1965), Further remarks on reducing truncation errors; Hairer, Lubich, Wanner (2006),
Geometric Numerical Integration, algorithm VIII.5.1; Knuth (1998), The Art of Computer Programming 2, 4.2.2.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.method import Around, Method, Step


class Remembered(NamedTuple):
    """The memory of the method inside; and what rounding has taken from the state, in float32 or better."""

    inner: PyTree
    rest: PyTree


@dataclasses.dataclass(frozen=True)
class Compensated(Around):
    """A method that says what a step adds to the state (`has_increment`), with sums that lose nothing.

    With that increment d and the rest r, y1 + r1 is y + r + d, y1 the nearest number to it. func is
    evaluated at y alone: its roundings are not added up. The derivative of y1 is that of y + d.
    """

    def __post_init__(self):
        super().__post_init__()
        values = dict(sums_slopes=True, explains=False, stage_count=self.method.stage_count + 1)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def check(self, func, y0: PyTree) -> None:
        self.method.check(func, y0)

    def backwards(self) -> Method:
        return Compensated(self.method.backwards())

    def start(self, f, s, y: PyTree) -> Remembered:
        return Remembered(self.method.start(f, s, y), nothing(y))

    def restarted(self, f, s, y: PyTree, memory: Remembered, seen) -> Remembered:
        return Remembered(self.method.restarted(f, s, y, memory.inner, seen), nothing(y))

    def slope(self, f, s, y: PyTree, memory: Remembered) -> PyTree:
        return self.method.slope(f, s, y, memory.inner)

    def step(self, f, s, y: PyTree, memory: Remembered, h) -> Step:
        step, d = self.method.with_increment(f, s, y, memory.inner, h)
        moves = jax.tree.map(lambda d, r: d + lax.stop_gradient(r), d, memory.rest)
        y1 = jax.tree.map(rounded, y, moves)
        rest = lax.stop_gradient(jax.tree.map(left, y, moves, y1))
        inside = step._replace(y=y1, errors=[], converged=None, evaluations=None)  # type: ignore[arg-type]
        return step._replace(y=y1, memory=Remembered(step.memory, rest), stages=inside)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        return self.method.inside(f, s, y, h, step.stages)


def nothing(y: PyTree) -> PyTree:
    """No rest of a state."""
    return jax.tree.map(lambda y: jnp.zeros_like(tree.wide(y)), y)


def rounded(y: Array, move: Array) -> Array:
    """y + move in the dtype of y. To half precision XLA would not round at all by a conversion alone, since the
    reverse one follows."""
    total = lax.add(tree.wide(y), move)
    if total.dtype != y.dtype:
        of = jnp.finfo(y.dtype)
        total = lax.reduce_precision(total, exponent_bits=of.nexp, mantissa_bits=of.nmant)
    return lax.convert_element_type(total, y.dtype)


def left(y: Array, move: Array, y1: Array) -> Array:
    """y + move - y1, exactly, whichever of the two is larger (Knuth's theorem 4.2.2 B)."""
    y, y1 = tree.wide(y), tree.wide(y1)
    moved = y1 - y
    return (y - (y1 - moved)) + (move - moved)
