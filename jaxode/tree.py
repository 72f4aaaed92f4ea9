"""What a solver does to a state: combine it with derivatives, choose between two of it, measure it.

A state is any pytree of real or complex arrays. Every function here works leaf by leaf, so that no
state is ever flattened into one vector and copied back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

SMALL = (
    32 * 1024
)  # bytes of arrays, up to which a choice among all their rows is faster than a write


EXACT = lax.Precision.HIGHEST


def matmul(a, b) -> Array:
    """The matrix product, in the precision of its dtype whatever `jax.default_matmul_precision` says.

    By default a GPU multiplies float32 with 10 bits of its fraction, and a TPU with 7.
    """
    return jnp.matmul(a, b, precision=EXACT)


def combine(y: PyTree, h, weights, ks) -> PyTree:
    """y + h sum_i w_i k_i. Weights that are the number 0 cost nothing."""
    terms = [(w, k) for w, k in zip(weights, ks) if not (isinstance(w, float) and w == 0.0)]
    if not terms:
        return y
    return jax.tree.map(moved, y, wide_sum(h, terms))


def moved(y: Array, step: Array) -> Array:
    """y + step, a step as wide as `wide`, in the dtype of y."""
    return lax.convert_element_type(lax.add(wide(y), step), y.dtype)


def weighted_sum(h, terms) -> PyTree:
    """h sum_i w_i k_i, for pairs (w_i, k_i)."""
    narrow = lambda x, k: lax.convert_element_type(x, k.dtype)
    return jax.tree.map(narrow, wide_sum(h, terms), terms[0][1])


def wide_sum(h, terms) -> PyTree:
    """The same, in float32 or better."""
    weights, ks = zip(*terms)

    def leaf(*k):
        total = scale(weights[0], wide(k[0]))
        for w, k_i in zip(weights[1:], k[1:]):
            total = lax.add(total, scale(w, wide(k_i)))
        return scale(h, total)

    return jax.tree.map(leaf, *ks)


def wide(x: Array) -> Array:
    """float16 and bfloat16 as float32: the weights of a step cancel, and would leave their roundings."""
    half = x.dtype.itemsize == 2
    return lax.convert_element_type(x, jnp.float32) if half else x


def scale(w, x: Array) -> Array:
    """w x in the dtype of x, whatever the dtype of the (real) number w."""
    number = isinstance(w, float | int)
    w = np.asarray(w, x.dtype) if number else lax.convert_element_type(w, x.dtype)
    return lax.mul(w, x)  # `w * x` is the same, and takes JAX four times as long to trace


def where(condition, x: PyTree, y: PyTree) -> PyTree:
    """x if the (scalar) condition holds, else y."""
    return jax.tree.map(lambda x, y: select(condition, x, y), x, y)


def where_needed(needed, fn) -> PyTree:
    """What `fn()` returns, or zeros like that."""
    return lax.cond(needed, fn, lambda: zeros_of(fn))


def zeros_of(fn) -> PyTree:
    """Zeros like what `fn()` returns, which is not called."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn))


def at_most_once(flag, fn, carry) -> Any:
    """fn(carry) if the flag is set; unlike a conditional it leaves large arrays where they are."""
    turn = lambda state: (jnp.zeros_like(state[0]), fn(state[1]))
    return lax.while_loop(lambda state: state[0], turn, (flag, carry))[1]


def select(condition, x, y):
    """`jnp.where` of arrays that are alike, which JAX traces and lowers in a third of the time."""
    if jnp.shape(x) != jnp.shape(y) or jnp.result_type(x) != jnp.result_type(y):
        return jnp.where(condition, x, y)
    return lax.select(condition, *map(jnp.asarray, (x, y)))


def norm(x: PyTree, tolerated: PyTree) -> Array:
    """Root mean square of x / tolerated over every component of every leaf, in float32 or better.

    Hairer, Norsett, Wanner (1993), eq. II.4.11. An empty state has norm 0.
    """
    leaves = [
        lax.square(lax.div(magnitude(x), stretched(s, x)))
        for x, s in zip(jax.tree.leaves(x), jax.tree.leaves(tolerated), strict=True)
    ]
    size = sum(leaf.size for leaf in leaves)
    if size == 0:
        return jnp.zeros((), jnp.float32)
    dtype = widest(*(leaf.dtype for leaf in leaves))
    whole = lambda x: lax.reduce(x, np.zeros((), dtype), lax.add, tuple(range(x.ndim)))
    total = functools.reduce(lax.add, [whole(lax.convert_element_type(x, dtype)) for x in leaves])
    return lax.sqrt(scale(1 / size, total))


def stretched(scale: Array, x: Array) -> Array:
    """A scale (of shape 1 where it is the same) in the shape of x, and in its precision."""
    return jnp.broadcast_to(lax.convert_element_type(scale, real_dtype(x)), x.shape)


def difference(x: PyTree, y: PyTree) -> PyTree:
    """x - y."""
    return jax.tree.map(lax.sub, x, y)


def length(x: PyTree) -> Array:
    """The root mean square, differentiable at 0 too."""
    squares = dot(x, jax.tree.map(jnp.conj, x))
    size = count(x)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1) / size), 0)


def unit(x: PyTree) -> PyTree:
    """x, with a root mean square of 1; 0 if it is 0."""
    size = length(x)
    inverse = ratio(jnp.ones_like(size), size)
    return jax.tree.map(lambda x: scale(inverse, x), x)


def any_direction(y: PyTree) -> PyTree:
    """A vector like y that has something of every mode: where a power method begins."""
    return jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype), y)


def ratio(x: Array, y: Array) -> Array:
    """x / y for y > 0, and 0 else; differentiable."""
    positive = y > 0
    return jnp.where(positive, x / jnp.where(positive, y, 1), 0)


def polynomial(y: PyTree, theta, d: list[PyTree], times: Callable = scale) -> PyTree:
    """y + sum_p theta^(p+1) d_p, by Horner's rule, in which `times` multiplies a number and an array."""

    def leaf(y, *d):
        total = wide(d[-1])
        for term in d[-2::-1]:
            total = lax.add(wide(term), times(theta, total))
        return moved(y, times(theta, total))

    return jax.tree.map(leaf, y, *d)


def slope(theta, width, d: list[PyTree]) -> PyTree:
    """sum_p (p + 1) theta^p d_p over the width of a step: the derivative of `polynomial`, by Horner's rule."""

    def leaf(*d):
        total: Any = scale(float(len(d)), wide(d[-1]))
        for p in range(len(d) - 1, 0, -1):
            total = lax.add(scale(float(p), wide(d[p - 1])), scale(theta, total))
        return lax.convert_element_type(scale(1 / width, total), d[0].dtype)

    return jax.tree.map(leaf, *d)


def hermite(h, moved: PyTree, k: PyTree, k1: PyTree) -> list[PyTree]:
    """The d_p of the cubic through y, y', y + moved, y1' (HNW eq. II.6.7)."""
    first, last = (weighted_sum(h, [(1.0, k)]) for k in (k, k1))
    third = jax.tree.map(lambda a, b, d: a + b - 2 * d, first, last, moved)
    second = difference(moved, jax.tree.map(lambda a, t: a + t, first, third))
    return [first, second, third]


def largest(xs):
    """The maximum of several arrays, entry by entry."""
    return functools.reduce(lax.max, xs)


def names_of(y0: PyTree) -> tuple[str, ...]:
    """The name of every component of a state, such as y['a'][7] or y[0][2, 3]."""
    names = []
    for path, y in jax.tree_util.tree_leaves_with_path(y0):
        whole = "y" + jax.tree_util.keystr(path)
        places = [", ".join(map(str, index)) for index in np.ndindex(y.shape)]
        names += [f"{whole}[{place}]" if place else whole for place in places]
    return tuple(names)


def count(x: PyTree) -> int:
    """How many numbers there are in all leaves together."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(x))


def size_in_bytes(x: PyTree) -> int:
    """Of all leaves together; at least 1."""
    return max(1, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x)))


def magnitude(x: Array) -> Array:
    """|x| as a real array of at least float32."""
    return lax.convert_element_type(lax.abs(x), real_dtype(x))


def real_dtype(x):
    """The real dtype, float32 or wider, in which errors, tolerances and step sizes of x are kept."""
    return widest(jnp.finfo(x.dtype).dtype, jnp.float32)


def widest(*dtypes):
    """The real dtype with the most bits."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def all_finite(*xs: PyTree) -> Array:
    """Whether every component of every leaf is finite."""
    leaves = jax.tree.leaves(xs)
    every = lambda x: lax.reduce(x, np.array(True), lax.bitwise_and, tuple(range(x.ndim)))
    finite = [every(is_finite(leaf)) for leaf in leaves]
    return functools.reduce(lax.bitwise_and, finite) if finite else jnp.array(True)


def is_finite(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.ones(x.shape, bool)
    if jnp.iscomplexobj(x):
        return lax.is_finite(lax.real(x)) & lax.is_finite(lax.imag(x))
    return lax.is_finite(x)


def dot(x: PyTree, y: PyTree) -> Array:
    """Re sum x_i y_i, the real pairing under which JAX's cotangents act."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    if not pairs:
        return jnp.zeros(())
    wide = widest(*(real_dtype(a) for a, _ in pairs))
    parts = [jnp.sum(jnp.real(a * b).astype(wide)) for a, b in pairs]
    return jnp.sum(jnp.stack(parts))


def real_parts(x) -> list[Array]:
    """The real and the imaginary part of a complex number, or a real one alone."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def or_nan(fine, x) -> Array:
    """x where that is fine, else NaN: of a complex number both parts."""
    nan = complex(np.nan, np.nan) if jnp.iscomplexobj(x) else np.nan
    return jnp.where(fine, x, np.asarray(nan).astype(x.dtype))


def between(t, low, high) -> Array:
    """t, moved onto the ends where it is beyond them. `where`, not `clip`: at a tie its derivative is
    its own."""
    return jnp.where(t < low, low, jnp.where(t > high, high, t))


def known(*xs) -> bool:
    """Whether values are there to look at, outside of any transformation."""
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(xs))


def row(rooms: PyTree, i) -> PyTree:
    """Row i of every array."""
    pick = lambda room: lax.dynamic_index_in_dim(room, i, 0, False, allow_negative_indices=False)
    return jax.tree.map(pick, rooms)


def put(i, xs: PyTree, rooms: PyTree) -> PyTree:
    """The arrays with xs in row i."""
    write = lambda x, room: lax.dynamic_update_index_in_dim(room, x, i, 0)
    return jax.tree.map(write, xs, rooms)


def put_where(flag, i, xs: PyTree, rooms: PyTree) -> PyTree:
    """The arrays with xs in row i where the flag is set. (It is True where it is known to be.)"""
    if size_in_bytes(rooms) > SMALL:
        if flag is not True:
            xs = where(flag, xs, row(rooms, i))
        return put(i, xs, rooms)
    here = jnp.arange(len(jax.tree.leaves(rooms)[0]), dtype=jnp.int32) == i
    here = here if flag is True else here & flag
    fit = lambda x: here.reshape((-1,) + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda x, room: jnp.where(fit(room), x, room), xs, rooms)


def rooms(x: PyTree, count: int) -> PyTree:
    """Arrays of zeros for so many like x."""
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), x)
