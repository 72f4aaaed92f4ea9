"""A whole computation as one native function on a CPU.

XLA's CPU backend sends every kernel of a program, in every turn of a loop, through a dispatcher (0.1
to 1 us each). A call that carries the mark `xla_cpu_small_call` is compiled to one function instead,
nested loops and all: a Lorenz system with 101 outputs takes a tenth of the time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

SMALL = 512  # numbers of an argument that travels with others in one array
LARGE = 4096  # numbers of an array in a field, beyond which threads and vector kernels are faster

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp copy cos cosh
    convert_element_type div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real rem round
    rsqrt select_n sign sin sinh sqrt square sub tan tanh xor""".split()
)
STRUCTURE = frozenset(
    """broadcast_in_dim bitcast_convert_type concatenate dynamic_slice dynamic_update_slice
    expand_dims gather iota pad reduce_and reduce_max reduce_min reduce_or reduce_sum reshape rev select_and_gather_add slice split squeeze stack stop_gradient
    transpose unstack shift_left shift_right_logical shift_right_arithmetic reduce_precision""".split()
)
CALLS = frozenset(
    "while cond scan jit pjit closed_call core_call custom_jvp_call custom_vjp_call".split()
)


def can_dot(eqn) -> bool:
    """Not a product of two matrices: those call a library, which one call cannot."""
    (contract_a, contract_b), (batch, _) = eqn.params["dimension_numbers"]
    a, b = (x.aval for x in eqn.invars)
    free_a = a.size // int(np.prod([a.shape[i] for i in (*contract_a, *batch)], dtype=int)) if a.size else 0
    free_b = b.size // int(np.prod([b.shape[i] for i in contract_b], dtype=int)) if b.size else 0
    return not batch and (free_a <= 1 or free_b <= 1)


def able(jaxpr, largest: int | None = None) -> bool:
    """Whether a jaxpr can be one call; with no array of more numbers than `largest`, if that is given."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if largest is not None and any(v.aval.size > largest for v in (*eqn.invars, *eqn.outvars)):
            return False
        if name in CALLS:
            if not all(able(inner, largest) for inner in core.jaxprs_in_params(eqn.params)):
                return False
        elif name == "dot_general":
            if not can_dot(eqn):
                return False
        elif name not in ELEMENTWISE and name not in STRUCTURE:
            return False
    return True


def suits(fn: Callable, *examples) -> bool:
    """Whether a function of one solve is small enough to be one call."""
    if not all(map(is_number, jax.tree.leaves(examples))):
        return False
    return able(jax.make_jaxpr(fn)(*examples).jaxpr, LARGE)


def is_number(x) -> bool:
    return jnp.result_type(x) == jnp.bool or jnp.issubdtype(jnp.result_type(x), jnp.number)


def one_call(fn: Callable, otherwise: Callable) -> Callable:
    """`fn` as one call, if it can be; else `otherwise`, which computes the same.

    To be used inside of a lowering rule, where JAX removes nothing: a parameter of the call that
    nothing uses would abort the process. So small arguments travel in one array, and every other one
    is read once.
    """

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        flat = lambda *leaves: fn(*jax.tree.unflatten(structure, leaves))
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        if not able(closed.jaxpr):
            return otherwise(*args)
        outs = marked(closed, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return call


def marked(closed: core.ClosedJaxpr, leaves: list) -> list:
    """The results of a jaxpr, computed in one call."""
    given = [*map(jnp.asarray, closed.consts), *leaves]
    groups: dict = {}  # of small arguments, by dtype
    for i, x in enumerate(given):
        if x.size <= SMALL:
            groups.setdefault(x.dtype, []).append(i)
    large = [i for i, x in enumerate(given) if x.size > SMALL]
    packed = [jnp.concatenate([given[i].reshape(-1) for i in of]) for of in groups.values()]
    packed = [jnp.concatenate([x, jnp.zeros(1, x.dtype)]) for x in packed]
    shapes = [x.shape for x in given]

    def body(packed, rest):
        xs = dict(zip(large, rest))
        for array, of in zip(packed, groups.values()):
            at = 0
            for i in of:
                end = at + math.prod(shapes[i])
                xs[i] = array[at:end].reshape(shapes[i])
                at = end
        read = sum(as_integer(x) for x in (*packed, *rest))
        args, n = [xs[i] for i in range(len(given))], len(closed.consts)
        jaxpr = core.ClosedJaxpr(closed.jaxpr, args[:n])
        return core.jaxpr_as_fun(jaxpr)(*args[n:]), read

    # Constants must not be moved into the call: they would leave a parameter that nothing uses.
    packed, rest = lax.optimization_barrier((packed, [given[i] for i in large]))
    outs, _ = jax.jit(body, inline=False)(packed, rest)
    return set_xla_metadata(list(outs), xla_cpu_small_call="true", inlineable="false")


def as_integer(x):
    """The last number of an array: so it is read."""
    return lax.convert_element_type(jnp.real(x.reshape(-1)[-1]), jnp.int32)
