"""A fold over the accepted steps of a solve: a minimum, an integral, a count, without a call to the host.

The value is a part of the memory that one step hands to the next. So it is where the state is, on a tape,
in lanes, and backwards: the loops and the adjoints need to know nothing of it.

>>> import jax.numpy as jnp
>>> from jaxode import solve
>>> swing = lambda y, t: jnp.stack([y[1], -y[0]])
>>> of_step = lambda value, y, t: (jnp.minimum(value[0], y[0]), value[1] + 1)
>>> sol = solve(swing, jnp.array([1.0, 0.0]), [0.0, 6.0], fold=((jnp.inf, 0), of_step), hmax=0.1)
>>> round(float(sol.folded[0]), 2), int(sol.folded[1]) == int(sol.stats.accepted)
(-1.0, True)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, tree
from jaxode.functions import FOLD, in_order
from jaxode.kernels.traces import Trace
from jaxode.methods.method import Around, Step
from jaxode.stepping.field import AroundField, Field, unravelled
from jaxode.switches import unchecked


class Fold(NamedTuple):
    """A fold with its function traced: `trace` of ((value, y), t), which is static, and its arrays, (start,
    leaves of the function). Both are None if there is none."""

    trace: Trace | None
    arrays: tuple | None

    @property
    def start(self) -> PyTree:
        return None if self.arrays is None else self.arrays[0]


class OfPair(eqx.Module):
    """function(value, y, t, *args) as a function of ((value, y), t, *args)."""

    function: Callable

    def __call__(self, given, t, *args):
        return self.function(*given, t, *args)


def fold_of(fold, exact, y0, t, func_time, args) -> Fold:
    """The fold of a solve, checked and traced. Raises errors that say what to do."""
    if fold is None:
        return Fold(None, None)
    if not isinstance(fold, tuple | list) or len(fold) != 2 or not callable(fold[1]):
        raise TypeError(
            "`fold` must be a pair (start, function) of the value before the first step, and "
            f"function(value, y, t, *args), the value after one; got {fold!r}."
        )
    dtype = tree.widest(jnp.float32, *map(tree.real_dtype, jax.tree.leaves(y0)))
    with unchecked():  # a minimum starts with infinity
        start = jax.tree_util.tree_map_with_path(partial(as_value, dtype), fold[0])
    if not jax.tree.leaves(start):
        raise TypeError(
            "the start of a `fold` must be an array or a pytree of arrays; it holds none."
        )
    checked = lambda value, given: like_start(value, given[0])
    given = (start, y0), t, func_time, args
    in_order(FOLD, fold[1])
    trace, leaves = arguments.trace_of(OfPair(fold[1]), *given, checked, FOLD)
    arguments.check_resolution(exact, func_time, trace, FOLD)
    trace, leaves = trace.needed(leaves)
    return Fold(trace, (start, leaves))


def as_value(dtype, path, x) -> Array:
    """A leaf of the start of a fold as an array; one of floats that has no dtype of its own in that of the
    state."""
    where = f"the start of a `fold`{jax.tree_util.keystr(path)}"
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where} must be an array: {error}") from error
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number)):
        raise TypeError(f"{where} must hold numbers or booleans; got {x.dtype}.")
    floats = x.weak_type and jnp.issubdtype(x.dtype, jnp.floating)
    return lax.convert_element_type(x, dtype if floats else x.dtype)


def like_start(value: PyTree, start: PyTree) -> PyTree:
    """What the function of a fold returned, if it is a value like its start; else a TypeError."""
    if jax.tree.structure(value) != jax.tree.structure(start):
        raise TypeError(
            "the function of a `fold` must return a value like its start, which is "
            f"{jax.tree.structure(start)}; it returned {jax.tree.structure(value)}. Its arguments are "
            "(value, y, t, *args), in this order."
        )

    def leaf(path, x, start):
        x, where = jnp.asarray(x), jax.tree_util.keystr(path)
        with jax.numpy_dtype_promotion("standard"):
            fits = jnp.result_type(x, start) == start.dtype
        if x.shape != start.shape or not fits:
            raise TypeError(
                f"the function of a `fold` returned {x.dtype} of shape {x.shape}, where its start{where} is "
                f"{start.dtype} of shape {start.shape}: pass a start like what the function returns."
            )
        return lax.convert_element_type(x, start.dtype)

    return jax.tree_util.tree_map_with_path(leaf, value, start)


# Inside of a solve.


class Folding(AroundField):
    """A field with a fold over its solution."""

    function: Field  # its `value` of (value, y) is the next value
    start: PyTree  # as numbers

    def next(self, numbers: PyTree, y, s) -> PyTree:
        """The value, as numbers, when a step has ended at s in y."""
        value = from_numbers(numbers, self.function.trace.like())
        return as_numbers(self.function.value((value, unravelled(self.field, y)), s))


class Memory(NamedTuple):
    """That of the method, and the value of the fold, as numbers: after the last step, and before it."""

    inner: PyTree
    value: PyTree
    before: PyTree


@dataclasses.dataclass(frozen=True)
class WithFold(Around):
    """A method whose fields are `Folding`: each step of any size hands on the next value."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "carries", True)

    def start(self, f: Folding, s, y: PyTree) -> Memory:
        return Memory(self.method.start(f.field, s, y), f.start, f.start)

    def step(self, f: Folding, s, y: PyTree, memory: Memory, h, *norm) -> Step:
        step = self.method.step(f.field, s, y, memory.inner, h, *norm)
        # A step of size 0 is none. Nothing goes back through one: 0 times an infinite derivative is NaN.
        given = memory.value, step.y, s + h
        taken = f.next(*tree.where(h != 0, given, lax.stop_gradient(given)))
        values = tree.where(h != 0, (taken, memory.value), (memory.value, memory.before))
        return step._replace(memory=Memory(step.memory, *values))

    def inside(self, f: Folding, s, y: PyTree, h, step: Step) -> list[PyTree]:
        return self.method.inside(f.field, s, y, h, step._replace(memory=step.memory.inner))

    def restarted(self, f: Folding, s, y: PyTree, memory: Memory, seen) -> Memory:
        # The step before has ended a little behind the event: what counts is the event, whose time moves.
        value = memory.before
        for y_seen, s_seen in seen():
            value = f.next(value, y_seen, s_seen)
        return Memory(self.method.restarted(f.field, s, y, memory.inner, seen), value, value)

    def carried(self, memory: Memory) -> PyTree:
        return memory.value

    def heuristics(self, y: PyTree, h, step: Step):
        return self.method.heuristics(y, h, step)  # type: ignore[attr-defined]


def with_fold(adjoint: Callable, fold: Fold, times) -> Callable:
    """The adjoint, for a solve with a fold; `times` are those of its field, (t0, t1, span, dtype)."""
    assert fold.trace is not None and fold.arrays is not None
    start, leaves = fold.arrays
    function = Field(fold.trace, leaves, *times)

    def solve(integrator, field, y0, ss):
        f = Folding(field, function, as_numbers(start))
        integrator = dataclasses.replace(integrator, method=WithFold(integrator.method))
        (ys, numbers), report = adjoint(integrator, f, y0, ss)
        return ys, report._replace(carried=from_numbers(numbers, function.trace.like()))

    return solve


# Integers and booleans. What a step hands to the next has cotangents, which they have not.

DIGIT = 16  # bits of an integer that float32 holds exactly, whatever they are


def as_numbers(value: PyTree) -> PyTree:
    """A value with floats for its integers and booleans: their digits of 16 bits, along a last axis."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        bits = unsigned(x.dtype)
        x = lax.convert_element_type(x, bits)
        places = np.arange(0, 8 * bits.itemsize, DIGIT).astype(bits)
        digits = (x[..., None] >> places.reshape((1,) * x.ndim + (-1,))) & bits.type(2**DIGIT - 1)
        return lax.convert_element_type(digits, jnp.float32)

    return jax.tree.map(leaf, value)


def from_numbers(numbers: PyTree, like: PyTree) -> PyTree:
    """The value of such numbers: in the dtypes of `like`."""

    def leaf(x, like):
        if jnp.issubdtype(like.dtype, jnp.inexact):
            return x
        bits = unsigned(like.dtype)
        x = lax.convert_element_type(x, bits)
        parts = [x[..., i] << bits.type(DIGIT * i) for i in range(x.shape[-1])]
        return lax.convert_element_type(sum(parts[1:], parts[0]), like.dtype)

    return jax.tree.map(leaf, numbers, like)


def unsigned(dtype) -> np.dtype:
    """The dtype that holds the bits of an integer."""
    return np.dtype(np.uint64 if np.dtype(dtype).itemsize == 8 else np.uint32)
