"""How many solves are done: one after another, in lanes, or all at once; and as one call or not."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxode import tree
from jaxode.batch.vmap_rules import Form
from jaxode.kernels.forms import CALLS, ONE_CALL, PLAIN
from jaxode.kernels.numbers import can_be_taken_apart
from jaxode.kernels.one_call import LARGE, able, one_call, suits
from jaxode.methods.linear import WRITTEN_OUT

CACHE = 128 * 1024  # bytes that the stages of all lanes may take
FEW = 8  # so many solves are done one after another
IMPLICIT = {1: 8, 2: 6}  # numbers of a state up to which lanes take implicit steps; with a vjp
TINY = 64  # numbers of a state whose lanes are the last axis
# Lanes in one call, by the numbers of a state: what stages take stays in the nearest cache, and loops
# over lanes are whole vector instructions (85 lanes of Lorenz systems: 1.5 times the time of 64).
LANES = {4: 64, 16: 32, 32: 16, TINY: 8}
CHEAP = (
    1000  # operations of a field, up to which one after another is faster than lanes of matrices
)


class Plan(NamedTuple):
    """`width` lanes, 1 for one after another; along an axis; in one call."""

    width: int
    axis: int
    fused: bool

    @property
    def kernel(self) -> str:
        return ONE_CALL if self.fused else PLAIN


def alone(form: Form, fn: Callable, problem) -> Callable:
    """fn(..., kernel=) of one solve, in the form that suits it; `problem` is (f, y0, ss)."""
    if form.platform != "cpu":
        return fn
    f, y0, ss = problem
    in_calls = partial(fn, kernel=CALLS)
    if not is_small(f, y0, ss):
        return in_calls
    return one_call(partial(fn, kernel=ONE_CALL), in_calls)


def plan(form: Form, integrator, f, y0, ss, copies: int = 1) -> Plan:
    """For many solves; the arguments are those of the first one. `copies`: 2 if they are differentiated."""
    size, count = form.size or 1, tree.count(y0)
    tiny = count <= TINY
    # Wide is fast there; and what is best for any number of solves (`jax.export`) cannot be known.
    if form.platform != "cpu" or not isinstance(size, int):
        return Plan(size, -1 if tiny else 0, False)
    one = is_small(f, y0, ss)
    implicit = tiny and integrator.method.implicit  # larger ones call a library
    if one and implicit and not steps_in_lanes(integrator, f, y0, ss, copies):
        return Plan(1, 0, True)
    if one and size <= FEW:
        return Plan(1, 0, True)
    if one and tiny and wide_enough(form, f, y0, ss):
        width = lanes_in_one_call(count)
        return Plan(size if size <= 2 * width else width, -1, True)
    if one and operations(f, y0, ss[0]) <= CHEAP:
        return Plan(1, 0, True)
    return Plan(min(size, lanes_at_once(integrator.method, y0, copies)), 0, False)


def steps_in_lanes(integrator, f, y0, ss, copies: int) -> bool:
    """Whether implicit steps of many solves are lanes: kernels of numbers (`jaxode.kernels.numbers`).

    As arrays those of 8 numbers take as long as one solve after another, and of 32 five times as long; their
    gradients compile in three times the time besides (rodas5p, kvaerno5 and auto, November 2026). Newton's
    iterations on up to 4 numbers take half the time.
    """
    if integrator.method.iterates and copies == 1:
        return tree.count(y0) <= WRITTEN_OUT
    few = tree.count(y0) <= IMPLICIT[min(copies, 2)]
    return few and integrator.method.in_numbers() is not None and can_be_taken_apart(f, y0, ss[0])


def go_in_turn(form: Form, f, y0, ss) -> bool:
    """Whether many solves that are no lanes are one call, one after another."""
    if form.platform != "cpu" or not isinstance(form.size, int):
        return False
    return is_small(f, y0, ss) and operations(f, y0, ss[0]) <= CHEAP


def is_small(f, y0, ss) -> bool:
    """Whether a solve of this field can be one call."""
    return suits(lambda f, y, s: f(y, s), f, y0, ss[0])


def lanes_in_one_call(count: int) -> int:
    return next(width for most, width in LANES.items() if count <= most)


def wide_enough(form: Form, f, y0, ss) -> bool:
    """Whether lanes of a field are one call: not if a matrix that they share makes products of matrices."""
    lanes = lambda x: jnp.zeros((*jnp.shape(x), 2), jnp.result_type(x))
    of_f = form.flags[1]
    f = jax.tree.map(lambda x, flag: lanes(x) if flag else x, f, of_f)
    axes = jax.tree.map(lambda flag: -1 if flag else None, of_f), -1, -1
    many = jax.vmap(lambda f, y, s: f(y, s), axes, -1)
    return able(jax.make_jaxpr(many)(f, jax.tree.map(lanes, y0), lanes(ss[0])).jaxpr, LARGE)


def operations(f, y0, s) -> int:
    """Multiplications and other operations of one evaluation."""
    return count(jax.make_jaxpr(lambda f, y, s: f(y, s))(f, y0, s).jaxpr)


def count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(eqn.params))
        if inner:
            total += sum(map(count, inner))
        elif eqn.primitive.name == "dot_general":
            (axes, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in axes], dtype=int)
            total += int(depth) * eqn.outvars[0].aval.size
        else:
            total += max(v.aval.size for v in eqn.outvars)
    return total


def lanes_at_once(method, y0, copies: int) -> int:
    """On a CPU as many as fit into a cache with their stages."""
    one = copies * method.stage_count * tree.size_in_bytes(y0)
    return 1 << max(5, min(10, (CACHE // one).bit_length() - 1))
