"""Learnt corrections: how the function of a `jaxode.methods.Hypersolver`, and its arrays, reach a step.

A method is static, and what a correction is made of are arrays, traced ones too. So the function is traced at
the door. Its trace, which is a value, stays with the method; its arrays become leaves of the field, beside
those of func, where every adjoint and every batch finds them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import arguments, tree
from jaxode.functions import CORRECTION, in_order
from jaxode.methods.method import Method
from jaxode.stepping.field import AroundField, Field


class OfStep(eqx.Module):
    """correction(y, t, h, slope, *args) as a function of ((y, h, slope), t, *args)."""

    function: Callable

    def __call__(self, given, t, *args):
        y, h, slope = given
        return self.function(y, t, h, slope, *args)


def correction_of(method: Method, exact, y0, t, func_time, args) -> tuple[Method, Any]:
    """The method with its correction as a trace, and the arrays of that; None if it has no correction."""
    function = getattr(method, "correction", None)
    if function is None:
        return method, None
    in_order(CORRECTION, function)
    checked = lambda found, given: arguments.like_state(found, given[0], CORRECTION)
    given = (y0, jnp.zeros((), func_time), y0), t, func_time, args
    trace, leaves = arguments.trace_of(OfStep(function), *given, checked, CORRECTION)
    arguments.check_resolution(exact, func_time, trace, CORRECTION)
    trace, leaves = trace.needed(leaves)
    return dataclasses.replace(method, correction=trace), leaves  # type: ignore[type-var]


class Corrected(AroundField):
    """A field with the correction of its steps."""

    function: Field  # its `value` of (y, h, slope) is g

    def correction(self, s, y: PyTree, k: PyTree, h, order: int) -> PyTree:
        """What a step from s to s + h in y gets, by h: (h span)^order span g, for a slope k = span f."""
        of, size = self.function, h * self.function.span
        slope = jax.tree.map(lambda k: tree.scale(1 / of.span, k), k)
        g = of.value((y, lax.convert_element_type(size, of.time_dtype), slope), s)
        return jax.tree.map(lambda g: tree.scale(size**order * of.span, g), g)


def with_correction(adjoint: Callable, function: Field) -> Callable:
    """The adjoint, for a field with the correction of its steps."""

    def solve(integrator, field, y0, ss):
        return adjoint(integrator, Corrected(field, function), y0, ss)

    return solve
