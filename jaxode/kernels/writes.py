"""`y.at[i].set(x)` of small arrays, as pieces that are put together.

JAX traces it to a scatter, which writes anywhere. One native call cannot hold a scatter
(`jaxode.kernels.one_call`), and it takes a kernel of its own elsewhere: a Lorenz system whose function writes
its components one by one took 7 times as long as one that stacks them, and its gradient 10 times. Where it is
written is nearly always known when the function is traced. Then it is slices and concatenations, which compute
the same numbers.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxode.kernels.one_call import LARGE

WRITES: dict[str, Callable] = {
    "scatter": lambda old, new: new,
    "scatter-add": lax.add,
    "scatter-mul": lax.mul,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}
TINY = 64  # numbers of an array, each of which is asked whether it is written
FEW = 16  # pieces that are written by one operation


def evaluate(jaxpr, consts, args) -> list:
    """What `jax.extend.core.jaxpr_as_fun` returns, with the writes whose places are known as pieces."""
    if not holds_writes(jaxpr):
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    known = {}

    def read(x, found):
        return x.val if isinstance(x, core.Literal) else found.get(x)

    for eqn in jaxpr.eqns:
        xs = [read(x, values) for x in eqn.invars]
        name, places = eqn.primitive.name, [read(x, known) for x in eqn.invars]
        if name in WRITES and (starts := starts_of(eqn, places)) is not None:
            outs = [written(eqn, starts, xs[0], xs[2])]
        elif name in WRITES and is_tiny(eqn):
            outs = [written_anywhere(eqn, *xs)]
        elif name in ("jit", "pjit") and holds_writes(inner := eqn.params["jaxpr"].jaxpr):
            outs = evaluate(inner, eqn.params["jaxpr"].consts, xs)
        else:
            outs = evaluated(jaxpr, eqn, values)
        if is_index(eqn) and all(x is not None for x in places):
            with jax.ensure_compile_time_eval():
                known |= zip(eqn.outvars, map(np.asarray, evaluated(jaxpr, eqn, known)))
        values |= zip(eqn.outvars, outs)
    return [read(x, values) for x in jaxpr.outvars]


def is_index(eqn) -> bool:
    """Whether an equation makes what can be an index."""
    kinds = [(v.aval.dtype, v.aval.size) for v in eqn.outvars]
    whole = all(jnp.issubdtype(d, jnp.integer) or jnp.issubdtype(d, jnp.bool_) for d, _ in kinds)
    return whole and not eqn.effects and all(size <= LARGE for _, size in kinds)


def evaluated(jaxpr, eqn, values: dict) -> list:
    """The results of an equation, from the values of variables."""
    call, invars = one_equation(jaxpr, eqn)
    return call(*(values[x] for x in invars))


def one_equation(jaxpr, eqn):
    """An equation as a function, and its variables."""
    invars = list(dict.fromkeys(variables(eqn.invars)))
    alone = jaxpr.replace(constvars=(), invars=invars, outvars=eqn.outvars, eqns=[eqn])
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ())), invars


def variables(atoms) -> list:
    """Those that are not literals."""
    return [x for x in atoms if not isinstance(x, core.Literal)]


def holds_writes(jaxpr) -> bool:
    """Whether there is one in it, or in a function that it calls."""
    inner = lambda eqn: (
        eqn.primitive.name in ("jit", "pjit") and holds_writes(eqn.params["jaxpr"].jaxpr)
    )
    return any(eqn.primitive.name in WRITES or inner(eqn) for eqn in jaxpr.eqns)


def starts_of(eqn, known: list) -> np.ndarray | None:
    """Where each window that is written starts in the array, a row for each, negative outside of it;
    None if that is not known, or the array is better left to a scatter."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    batched = numbers.operand_batching_dims or numbers.scatter_indices_batching_dims
    like = eqn.invars[1].aval
    indices = known[1] if like.size else np.zeros(like.shape, like.dtype)
    if indices is None or batched or math.prod(shape) > LARGE:
        return None
    count = math.prod(indices.shape[:-1])
    indices = indices.reshape(count, indices.shape[-1]).astype(np.int64)
    if len(indices) > FEW:
        return None
    starts = np.zeros((len(indices), len(shape)), np.int64)
    starts[:, list(numbers.scatter_dims_to_operand_dims)] = indices
    most = np.array(shape) - window(eqn)
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return np.clip(starts, 0, most)
    inside = np.all((starts >= 0) & (starts <= most), axis=1)
    return np.where(inside[:, None], starts, -1)


def window(eqn) -> list[int]:
    """The shape of what is written at one place: 1 along the axes that an index takes away."""
    numbers, updates = eqn.params["dimension_numbers"], eqn.invars[2].aval.shape
    sizes = iter(updates[i] for i in numbers.update_window_dims)
    axes = range(eqn.invars[0].aval.ndim)
    return [1 if axis in numbers.inserted_window_dims else next(sizes) for axis in axes]


def rows_of(eqn, updates) -> list:
    """What is written, one window after another, each with all axes of the array."""
    inner = eqn.params["dimension_numbers"].update_window_dims
    outer = [i for i in range(updates.ndim) if i not in inner]
    count = math.prod(updates.shape[i] for i in outer)
    return list(lax.transpose(updates, (*outer, *inner)).reshape(count, *window(eqn)))


def written(eqn, starts: np.ndarray, x, updates):
    """The array after writes at known places, one after another."""
    combine, shape = WRITES[eqn.primitive.name], window(eqn)
    for row, start in zip(rows_of(eqn, updates), starts, strict=True):
        if min(start, default=0) >= 0:
            old = lax.slice(x, start, start + shape)
            x = put(x, combine(old, row), start)
    return x


def is_tiny(eqn) -> bool:
    """Whether each number of the array can be asked whether it is written: a few times, of a few."""
    numbers, x = eqn.params["dimension_numbers"], eqn.invars[0].aval
    batched = numbers.operand_batching_dims or numbers.scatter_indices_batching_dims
    places = math.prod(eqn.invars[1].aval.shape[:-1])
    indexed = numbers.scatter_dims_to_operand_dims
    whole = all(
        size == (1 if axis in indexed else x.shape[axis]) for axis, size in enumerate(window(eqn))
    )
    return bool(whole and not batched and places <= FEW and x.size <= TINY)


def written_anywhere(eqn, x, indices, updates):
    """The array after writes at places that are not known before."""
    numbers, combine = eqn.params["dimension_numbers"], WRITES[eqn.primitive.name]
    axes = numbers.scatter_dims_to_operand_dims
    rows = rows_of(eqn, updates)
    for row, place in zip(rows, indices.reshape(len(rows), len(axes)), strict=True):
        here = jnp.ones(x.shape, bool)
        for axis, i in zip(axes, place):
            if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
                i = jnp.clip(i, 0, x.shape[axis] - 1)
            here = here & (lax.broadcasted_iota(i.dtype, x.shape, axis) == i)
        x = jnp.where(here, combine(x, jnp.broadcast_to(row, x.shape)), x)
    return x


def put(x, new, start):
    """The array with another one in it, which starts there."""
    for axis, (size, whole) in enumerate(zip(new.shape, x.shape, strict=True)):
        if size < whole:
            cuts = 0, start[axis], start[axis] + size, whole
            before, there, after = (lax.slice_in_dim(x, *ab, axis=axis) for ab in pairwise(cuts))
            middle = put(there, new, [*start[:axis], 0, *start[axis + 1 :]])
            pieces = [x for x in (before, middle, after) if x.shape[axis]]
            return lax.concatenate(pieces, axis)
    return new
