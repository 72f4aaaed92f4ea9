"""What a solve and its derivatives are, as numbers of the host: vectors, and the programs of a gradient report.

What is differentiated, `numbers`, is a pytree (func, y0, args) with None where there is nothing to
differentiate. A vector has all of it; of a complex number the real and the imaginary part.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import tree
from jaxode.integrate import solve
from jaxode.solution import succeeded
from jaxode.switches import unchecked

OF_OUTPUTS = ("save", "dense", "fold", "after_events")  # options that are not about states


def flat(x: PyTree) -> np.ndarray:
    """All numbers of a pytree as one vector of the host, in float64."""
    parts = [np.zeros(0)]
    for leaf in map(np.asarray, jax.tree.leaves(x)):
        of = (np.real(leaf), np.imag(leaf)) if np.iscomplexobj(leaf) else (leaf,)
        parts += [part.astype(np.float64).ravel() for part in of]
    return np.concatenate(parts)


def unflat(vector: np.ndarray, like: PyTree) -> PyTree:
    """The pytree of a vector, with the dtypes of `like`; a Python float stays one."""

    def leaf(x, begin):
        shape, size = np.shape(x), np.size(x)
        part = vector[begin : begin + size].reshape(shape)
        if np.iscomplexobj(x):
            part = part + 1j * vector[begin + size : begin + 2 * size].reshape(shape)
        return type(x)(part) if isinstance(x, float | complex) else part.astype(x.dtype)

    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([len(flat(x)) for x in leaves])
    return structure.unflatten([leaf(x, end - len(flat(x))) for x, end in zip(leaves, ends)])


def rows(ys: PyTree) -> np.ndarray:
    """States at several times, a vector for each."""
    count = len(jax.tree.leaves(ys)[0])
    return np.stack([flat(jax.tree.map(lambda y, i=i: y[i], ys)) for i in range(count)])


def widened(x: PyTree) -> PyTree:
    """The same numbers in float64 or complex128."""
    wide = lambda x: np.complex128 if np.iscomplexobj(x) else np.float64
    python = lambda x: type(x) in (float, complex)
    return jax.tree.map(lambda x: x if python(x) else np.asarray(x).astype(wide(x)), x)


def on_host(fn: Callable, wide: bool) -> Callable:
    """The function as a program with results on the host, in float64 if it is to be `wide`; without warnings,
    which belong to the solve of the user."""
    program = jax.jit(fn)

    def run(*args):
        precision = jax.enable_x64(True) if wide else contextlib.nullcontext()
        with precision, unchecked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return jax.device_get(program(*args))

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of one problem: its loss, its gradients, its states and their tangents.

    They take the numbers that are differentiated, and tolerances, so that other values do not compile again.
    `rest` is what is not differentiated of (func, y0, args), and `log` asks the solve for a log if it may.
    """

    rest: PyTree
    t: Any
    loss: Callable
    options: dict
    log: dict
    wide: bool
    gradients: dict = dataclasses.field(default_factory=dict)

    def solved(self, numbers: PyTree, t, tolerances, **options):
        func, y0, args = eqx.combine(numbers, self.rest)
        rtol, atol = tolerances
        return solve(func, y0, t, *args, rtol=rtol, atol=atol, throw=False, **options)

    @cached_property
    def value(self) -> Callable:
        """`value(numbers, tolerances)`: the loss, and the solution."""

        def value(numbers, tolerances):
            solution = self.solved(numbers, self.t, tolerances, **self.options, **self.log)
            return self.loss(solution), solution

        return on_host(value, self.wide)

    @cached_property
    def states(self) -> Callable:
        """`states(numbers, direction, tolerances, times)`: the states there, and their tangents."""
        options = {name: x for name, x in self.options.items() if name not in OF_OUTPUTS}

        def states(numbers, direction, tolerances, times):
            of = lambda x: self.solved(x, times, tolerances, **options, adjoint="forward").ys
            return jax.jvp(of, (numbers,), (direction,))

        return on_host(states, self.wide)

    def gradient(self, adjoint) -> Callable:
        """`gradient(numbers, tolerances)`: the gradient of the loss, and the length of y dL/dy over all outputs
        y: how much the loss changes where they change by their own size."""

        def gradient(numbers, tolerances):
            def solved(numbers):
                solution = self.solved(numbers, self.t, tolerances, **self.options, adjoint=adjoint)
                return eqx.partition(solution, eqx.is_inexact_array)

            found, pull, counts = jax.vjp(solved, numbers, has_aux=True)
            bar = jax.grad(lambda found: self.loss(eqx.combine(found, counts)))(found)
            # Rows after a terminal event are NaN, and no part of the loss.
            parts = jax.tree.map(lambda y, w: jnp.where(w == 0, 0, y * w), found, bar)
            return pull(bar)[0], jnp.sqrt(tree.dot(parts, jax.tree.map(jnp.conj, parts)))

        if adjoint not in self.gradients:
            self.gradients[adjoint] = on_host(gradient, self.wide)
        return self.gradients[adjoint]


class Slope(NamedTuple):
    """A directional derivative by differences, and how far those of other widths are from it."""

    value: float
    uncertainty: float


class Solves(NamedTuple):
    """Programs with the inputs and the tolerances that they are given: vectors in, vectors out."""

    programs: Programs
    numbers: PyTree
    tolerances: tuple[PyTree, PyTree]

    def moved(self, change: np.ndarray) -> PyTree:
        """The inputs, changed."""
        return unflat(flat(self.numbers) + change, self.numbers)

    def loss(self, change: np.ndarray) -> float:
        """The loss with changed inputs; NaN if the solve fails, whatever the loss makes of that."""
        value, solution = self.programs.value(self.moved(change), self.tolerances)
        return float(value) if succeeded(solution.status) else np.nan

    def states(self, change, move, times) -> tuple[np.ndarray, np.ndarray]:
        """The states at these times with changed inputs, and their tangent in a direction; a row for each."""
        times = self.time(times)
        given = self.moved(change), unflat(move, self.numbers)
        ys, tangents = self.programs.states(*given, self.tolerances, times)
        return rows(ys), rows(tangents)

    def time(self, t) -> np.ndarray:
        """Times in the dtype in which they are counted."""
        real = [tree.real_dtype(y) for y in jax.tree.leaves(self.numbers[1])]
        return np.asarray(t, tree.widest(np.float32, *real))

    def slope(self, move: np.ndarray, width: float) -> Slope:
        """The derivative of the loss in a direction by central differences of three widths: of the two that are
        next to each other the one of the smaller width."""
        halves = width / np.array([1.0, 3.0, 9.0])
        slopes = np.array([(self.loss(h * move) - self.loss(-h * move)) / (2 * h) for h in halves])
        gaps = np.abs(np.diff(slopes))
        if not np.any(np.isfinite(gaps)):
            return Slope(np.nan, np.nan)
        best = int(np.nanargmin(gaps))
        return Slope(float(slopes[best + 1]), float(gaps[best]))
