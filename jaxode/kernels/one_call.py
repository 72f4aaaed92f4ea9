"""A whole computation as one native function on a CPU.

XLA's CPU backend sends every kernel of a program, in every turn of a loop, through a dispatcher (0.1
to 1 us each). A call that carries the mark `xla_cpu_small_call` is compiled to one function instead,
nested loops and all: a Lorenz system with 101 outputs takes a tenth of the time.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

SMALL = 512  # numbers of an argument that travels with others in one array
LARGE = 4096  # numbers of an array in a field, beyond which threads and vector kernels are faster
REDUCED = (
    4000  # numbers that one reduction reads: from 4,096 on XLA makes it a kernel of its own kind
)
TINY = 7  # sizes of a matrix product that is written out; larger ones call a library


def always(eqn) -> bool:
    return True


def is_short(eqn) -> bool:
    """Whether a reduction reads few numbers."""
    return eqn.invars[0].aval.size <= REDUCED


def is_of_two_rows(eqn) -> bool:
    """Whether a reduction with many results is one of `jaxode.kernels.numbers`."""
    return eqn.params["dimensions"] == (0,) and {
        len(v.aval.shape) and v.aval.shape[0] for v in eqn.invars[: len(eqn.outvars)]
    } == {2}


def is_of_lanes(eqn) -> bool:
    """Whether a collective is a short reduction: `jax.vmap` has put the place of an axis for its name."""
    return is_short(eqn) and all(isinstance(axis, int) for axis in eqn.params["axes"])


def is_no_matrix_product(eqn) -> bool:
    """Whether a product is one of a vector, or of tiny matrices.

    XLA takes the axes of a matrix together before it chooses: (2, 2) by (6, 2, 3) is (2, 2) by (2, 18), which
    calls a library, and in one call there is none: "Fusion kind not implemented on CPU".
    """
    (contract_a, contract_b), (batch, batch_b) = eqn.params["dimension_numbers"]
    a, b = (x.aval.shape for x in eqn.invars)
    if not contract_a:
        return True
    free = lambda shape, axes: math.prod(n for i, n in enumerate(shape) if i not in axes)
    free_a, free_b = free(a, (*contract_a, *batch)), free(b, (*contract_b, *batch_b))
    depth = math.prod(a[i] for i in contract_a)
    tiny = all(n <= TINY for n in (*a, *b))
    if min(free_a, free_b) > 1:
        return tiny and max(free_a, free_b, depth) <= TINY
    return (tiny or not batch) and (max(free_a, free_b) > 1 or depth <= REDUCED)


def is_real(eqn) -> bool:
    return not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating)


ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj copy cos
    cosh convert_element_type digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow
    is_finite le le_to lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not one_minus_square or
    polynomial pow real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
MOVES = frozenset(
    """bitcast_convert_type broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims
    empty2 gather iota optimization_barrier pad reshape rev slice split squeeze stack tile transpose
    unstack""".split()
)
CALLS = frozenset(
    """while cond scan jit pjit closed_call core_call checkpoint remat2 custom_jvp_call custom_vjp_call
    custom_linear_solve ruled""".split()
)
# What one call can be made of, and when: found out by compiling each (tests/test_one_call.py does it
# again). Anything else (sort, scatter, fft, linear algebra, callbacks) goes the plain way.
RULES: dict[str, Callable] = {
    **dict.fromkeys((*ELEMENTWISE, *MOVES, *CALLS), always),
    **dict.fromkeys(
        """argmax argmin cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or
        reduce_prod reduce_sum reduce_xor""".split(),
        is_short,
    ),
    "clamp": is_real,
    "pmax": is_of_lanes,
    "pmin": is_of_lanes,
    "dot_general": is_no_matrix_product,
    "reduce": is_of_two_rows,
}


def able(jaxpr, largest: int | None = None) -> bool:
    """Whether a jaxpr can be one call; with no result of more numbers than `largest`, if that is given."""
    for eqn in jaxpr.eqns:
        rule = RULES.get(eqn.primitive.name)
        if rule is None or not rule(eqn):
            return False
        if largest is not None and any(v.aval.size > largest for v in eqn.outvars):
            return False
        if not all(able(inner, largest) for inner in core.jaxprs_in_params(eqn.params)):
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
    nothing uses would abort the process. So small arguments travel in one array for each dtype, and
    every array is read.
    """

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        groups: dict = {}  # of small arguments, by dtype
        for i, x in enumerate(leaves):
            if x.size <= SMALL:
                groups.setdefault(x.dtype, []).append(i)
        large = [i for i, x in enumerate(leaves) if x.size > SMALL]
        shapes = [x.shape for x in leaves]
        results: Any = None

        def body(packed, rest):
            nonlocal results
            xs = dict(zip(large, rest))
            for array, of in zip(packed, groups.values()):
                ends = list(itertools.accumulate(math.prod(shapes[i]) for i in of))
                for i, a, b in zip(of, [0, *ends], ends):
                    xs[i] = array[a:b].reshape(shapes[i])
            out = fn(*structure.unflatten([xs[i] for i in range(len(leaves))]))
            outs, results = jax.tree.flatten(out)
            return outs, sum(as_integer(x) for x in (*packed, *rest))

        packed = [pack([leaves[i] for i in of]) for of in groups.values()]
        # Constants must not be moved into the call: they would leave a parameter that nothing uses.
        packed, rest = lax.optimization_barrier((packed, [leaves[i] for i in large]))
        program = jax.jit(body, inline=False)
        if not able(program.trace(packed, rest).jaxpr.jaxpr):
            return otherwise(*args)
        outs, _ = program(packed, rest)
        outs = set_xla_metadata(outs, xla_cpu_small_call="true", inlineable="false")
        return results.unflatten(outs)

    return call


def pack(xs):
    """Arrays of one dtype as one, with a number more, so that it is never empty."""
    return jnp.concatenate([*(x.reshape(-1) for x in xs), jnp.zeros(1, xs[0].dtype)])


def as_integer(x):
    """The last number of an array: so it is read."""
    return lax.convert_element_type(jnp.real(x.reshape(-1)[-1]), jnp.int32)
