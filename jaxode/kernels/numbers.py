"""A function of a few numbers as one kernel, in which everything is computed once.

XLA makes a kernel of each array that a program needs, and each computes again what leads to it: the vjp of a
step of rodas5p on three numbers becomes 7,634 operations in place of 2,086, and arrays are taken apart and
put together besides. Here its jaxpr is evaluated number by number: slices, stacks and pads vanish. What is
left is the body of a reduction with many results, of which XLA makes one kernel. Its rows are two equal ones,
and what it makes of them is the function of the last row, whatever came before.

A step of 64 of Robertson's problem by rodas5p takes 0.07 us each in place of 0.12, its vjp 0.40 in place of
1.09; they compile in 0.7 and 1.9 s in place of 2.3 and 9.3 (November 2026).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core
from jaxtyping import PyTree

from jaxode.kernels.one_call import ELEMENTWISE, one_call
from jaxode.kernels.traces import without_dead_code
from jaxode.kernels.writes import variables

INPUTS = 256  # numbers that go in
MOST = 12_000  # operations, which LLVM compiles in 10 s


def in_numbers(fn: Callable, many: PyTree, shared: PyTree) -> Callable | None:
    """fn(many, shared), which is of one solve, of all lanes as one kernel; to be used in one call.

    Lanes are along the last axis of all arrays of `many`, and of the results. None if fn of arguments like
    these is not one of few operations, all of which can be taken apart.
    """
    like_one = lambda x: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
    of_one = jax.tree.map(like_one, many), jax.tree.map(jax.typeof, shared)
    closed, like = jax.make_jaxpr(fn, return_shape=True)(*of_one)
    jaxpr: Any = without_dead_code(closed.jaxpr)
    consts = dict(zip(closed.jaxpr.constvars, closed.consts))
    used = set(variables([v for eqn in jaxpr.eqns for v in eqn.invars] + jaxpr.outvars))
    moving = [v for v, x in consts.items() if isinstance(x, Tracer)]
    given = [v for v in jaxpr.invars if v in used] + [v for v in moving if v in used]
    if not suits(jaxpr, given) or not keeps_order():
        return None
    known = {v: apart(x) for v, x in consts.items() if v in used and v not in moving}
    returned = jaxpr.outvars
    outs: list[Any] = list(dict.fromkeys(variables(returned)))
    jaxpr = jaxpr.replace(outvars=outs)

    def body(row):
        rest = iter(row)
        arrays = {v: filled(v.aval.shape, lambda _: next(rest)) for v in given}
        found = zip(evaluate(jaxpr, {**known, **arrays}), outs)
        return [jnp.asarray(x, v.aval.dtype) for out, v in found for x in out.reshape(-1)]

    def kernel(many, shared):
        many, shared = jax.tree.leaves(many), jax.tree.leaves(shared)
        values = dict(zip(jaxpr.invars, [*many, *shared])) | consts
        wide, own = many[0].shape[-1:], set(jaxpr.invars[: len(many)])
        row = [x for v in given for x in numbers_of(values[v], wide, v in own)]
        found = iter(
            of_last_row(body, row, [v.aval.dtype for v in outs for _ in range(v.aval.size)])
        )
        whole = {v: array_of(v.aval, found, wide) for v in outs}
        spread = lambda x: jnp.full((*x.aval.shape, *wide), x.val, x.aval.dtype)
        arrays = [whole[v] if isinstance(v, core.Var) else spread(v) for v in returned]
        return jax.tree.unflatten(jax.tree.structure(like), arrays)

    return kernel


def numbers_of(x, wide: tuple[int, ...], lanes: bool) -> list:
    """The numbers of an array, each with all lanes."""
    if lanes:
        return list(x.reshape(-1, *wide))
    return [jnp.broadcast_to(number, wide) for number in x.reshape(-1)]


def array_of(aval, found, wide: tuple[int, ...]):
    """An array of the next numbers found, each with all lanes."""
    if not aval.size:
        return jnp.zeros((*aval.shape, *wide), aval.dtype)
    return jnp.stack([next(found) for _ in range(aval.size)]).reshape(*aval.shape, *wide)


def of_last_row(body: Callable, rows: list, wanted: list) -> list:
    """body(numbers) for all lanes, as a reduction of two equal rows; `wanted` are the dtypes of its results.

    A reduction has as many results as operands, of the same dtypes: so there are more operands where needed.
    """
    slots = [x.dtype for x in rows]
    free = {dtype: [i for i, x in enumerate(slots) if x == dtype] for dtype in {*slots, *wanted}}
    places = []
    for dtype in wanted:
        if not free[dtype]:
            free[dtype].append(len(slots))
            slots.append(dtype)
        places.append(free[dtype].pop(0))
    operands = [*rows, *[jnp.zeros_like(rows[0], dtype) for dtype in slots[len(rows) :]]]

    def last(_, row):
        out = list(row)
        for place, x in zip(places, body(row[: len(rows)])):
            out[place] = x
        return tuple(out)

    twice = tuple(jnp.broadcast_to(x, (2, *x.shape)) for x in operands)
    out = lax.reduce(twice, tuple(np.zeros((), dtype) for dtype in slots), last, (0,))
    # A result that nothing uses crashes the canonicalisation of reductions (jaxlib 0.10).
    out = lax.optimization_barrier(out)
    return [out[place] for place in places]


@functools.lru_cache(maxsize=1)
def keeps_order() -> bool:
    """Whether this XLA combines the rows of a reduction in turn: asked once, of a reduction like these."""
    twice_and_one = lambda row: [2 * row[0] + 1, row[1] + row[0]]
    program = lambda x: of_last_row(twice_and_one, [x, x + 1], [x.dtype] * 2)
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.arange(1, 9, dtype=jnp.float32)
        a, b = jax.jit(one_call(program, program))(x)
        return bool(jnp.all(a == 2 * x + 1) & jnp.all(b == 2 * x + 1))


# What a jaxpr must be.


def suits(jaxpr: core.Jaxpr, given: list) -> bool:
    """Whether there are few numbers and operations, all known; and one precision, as reductions ask for."""
    avals: list[Any] = [v.aval for v in (*given, *jaxpr.outvars)]
    dtypes = {x.dtype for x in avals if not is_discrete(x.dtype)}
    numeric = all(jnp.issubdtype(x.dtype, jnp.number) or x.dtype == jnp.bool for x in avals)
    precise = dtypes in ({jnp.dtype("float32")}, {jnp.dtype("float64")})
    few = 0 < sum(v.aval.size for v in given) <= INPUTS
    return numeric and precise and few and operations(jaxpr) <= MOST


def is_discrete(dtype) -> bool:
    return dtype == jnp.bool or jnp.issubdtype(dtype, jnp.integer)


def operations(jaxpr: core.Jaxpr) -> float:
    """On numbers; infinite if one cannot be taken apart."""
    return sum(map(operations_of, without_dead_code(jaxpr).eqns))


def can_be_taken_apart(fn: Callable, *args) -> bool:
    return operations(jax.make_jaxpr(fn)(*args).jaxpr) < math.inf


def operations_of(eqn) -> float:
    name, size = eqn.primitive.name, sum(v.aval.size for v in eqn.outvars)
    if eqn.effects:
        return math.inf
    if name in ELEMENTWISE:
        return size
    if name in CALLS:
        return operations(CALLS[name](eqn).jaxpr)
    if name in REDUCTIONS or name in SCANS:
        return eqn.invars[0].aval.size or math.inf
    if name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[i] for i in axes)
    return 0 if name in MOVES else math.inf


# Evaluation, with arrays of numbers as numpy arrays of objects.


def evaluate(jaxpr: core.Jaxpr, values: dict) -> list:
    values = dict(values)
    read = lambda atom: apart(atom.val) if isinstance(atom, core.Literal) else values[atom]
    for eqn in without_dead_code(jaxpr).eqns:
        name, xs = eqn.primitive.name, [read(x) for x in eqn.invars]
        if name in ELEMENTWISE:
            outs = [elementwise(eqn, xs)]
        elif name in CALLS:
            inner = CALLS[name](eqn)
            if name == "custom_linear_solve":
                xs = of_solution(eqn, xs)
            given = dict(zip(inner.jaxpr.constvars, map(apart, inner.consts)))
            outs = evaluate(inner.jaxpr, given | dict(zip(inner.jaxpr.invars, xs)))
        elif name in REDUCTIONS:
            outs = [reduced(eqn, *xs)]
        elif name in SCANS:
            outs = [scanned(eqn, *xs)]
        elif name == "dot_general":
            outs = [product(eqn, *xs)]
        else:
            outs = MOVES[name](*xs, **eqn.params)
            outs = outs if isinstance(outs, list) else [outs]
        values |= zip(eqn.outvars, outs)
    return [read(x) for x in jaxpr.outvars]


def filled(shape, entry: Callable) -> np.ndarray:
    out = np.empty(shape, object)
    for i in np.ndindex(*shape):
        out[i] = entry(i)
    return out


def apart(x) -> np.ndarray:
    """A constant as an array of numbers."""
    x = np.asarray(x)
    return filled(x.shape, lambda i: x[i])


def elementwise(eqn, xs):
    aval, name = eqn.outvars[0].aval, eqn.primitive.name
    params = {**eqn.params, "sharding": None} if "sharding" in eqn.params else eqn.params
    xs = [np.broadcast_to(x, aval.shape) for x in xs]

    def entry(i):
        numbers = [x[i] for x in xs]
        if name in ("add", "add_any"):  # transposed slices are full of zeros
            numbers = [x for x in numbers if not is_zero(x)] or numbers[:1]
            if len(numbers) == 1:
                return numbers[0]
        return eqn.primitive.bind(*numbers, **params)

    return filled(aval.shape, entry)


def is_zero(x) -> bool:
    return isinstance(x, np.generic) and x == 0


def reduced(eqn, x):
    axes, shape = eqn.params["axes"], eqn.outvars[0].aval.shape
    rows = np.moveaxis(x, axes, range(len(axes))).reshape(-1, *shape)
    combine = REDUCTIONS[eqn.primitive.name]
    return filled(shape, lambda i: functools.reduce(combine, [row[i] for row in rows]))


def scanned(eqn, x):
    """Sums and the like of all up to each, along an axis."""
    axis, step = eqn.params["axis"], -1 if eqn.params["reverse"] else 1
    rows = np.moveaxis(x, axis, 0)[::step]
    columns = filled(rows.shape[1:], lambda _: None)
    for i in np.ndindex(*columns.shape):
        columns[i] = list(itertools.accumulate([row[i] for row in rows], SCANS[eqn.primitive.name]))
    found = filled(rows.shape, lambda i: columns[i[1:]][i[0]])
    return np.moveaxis(found[::step], 0, axis)


def product(eqn, a, b):
    """Sums of products: of batches first, then of what is left of each."""
    (of_a, of_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]

    def in_order(x, batch, summed):
        free = [i for i in range(x.ndim) if i not in (*batch, *summed)]
        shape = [x.shape[i] for i in (*batch, *free)]
        return np.transpose(x, (*batch, *free, *summed)).reshape(*shape, -1)

    a, b, count = in_order(a, batch_a, of_a), in_order(b, batch_b, of_b), len(batch_a)
    free = a.ndim - 1 - count

    def entry(i):
        row, column = a[i[: count + free]], b[(*i[:count], *i[count + free :])]
        return functools.reduce(lax.add, [lax.mul(x, y) for x, y in zip(row, column)])

    out = eqn.outvars[0].aval
    if not a.shape[-1]:
        return filled(out.shape, lambda _: np.zeros((), out.dtype)[()])
    return filled(out.shape, entry)


def of_solution(eqn, xs):
    """What the solution of a linear system is computed from."""
    lengths = eqn.params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    after = before + lengths.solve
    return [*xs[before:after], *xs[after + lengths.transpose_solve :]]


def padded(x, value, *, padding_config):
    low, high, interior = zip(*padding_config) if padding_config else ((), (), ())
    widths = zip(low, x.shape, interior, high)
    shape = [a + n + max(n - 1, 0) * more + b for a, n, more, b in widths]
    out = filled(shape, lambda _: value[()])
    for i in np.ndindex(*x.shape):
        place = tuple(a + j * (more + 1) for a, j, more in zip(low, i, interior))
        if all(0 <= p < n for p, n in zip(place, shape)):
            out[place] = x[i]
    return out


def broadcast(x, *, shape, broadcast_dimensions, **_):
    kept = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape):
        kept[axis] = size
    return np.broadcast_to(x.reshape(kept), shape)


def sliced(x, *, start_indices, limit_indices, strides):
    strides = strides or [None] * x.ndim
    return x[(*map(slice, start_indices, limit_indices, strides), ...)]


def split(x, *, sizes, axis):
    return np.split(x, list(itertools.accumulate(sizes))[:-1], axis)


def unstacked(x, *, axis):
    return [np.moveaxis(x, axis, 0)[i, ...] for i in range(x.shape[axis])]


def counted(*_, dtype, shape, dimension, **__):
    return filled(shape, lambda i: np.asarray(i[dimension], dtype)[()])


CALLS: dict[str, Callable[[Any], core.ClosedJaxpr]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call"), lambda eqn: eqn.params["jaxpr"]),
    **dict.fromkeys(("checkpoint", "remat2"), lambda eqn: closed(eqn.params["jaxpr"])),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), lambda eqn: eqn.params["call_jaxpr"]),
    "ruled": lambda eqn: eqn.params["call"],
    "custom_linear_solve": lambda eqn: eqn.params["jaxprs"].solve,
}
REDUCTIONS: dict[str, Callable] = {
    "reduce_and": lax.bitwise_and,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_or": lax.bitwise_or,
    "reduce_prod": lax.mul,
    "reduce_sum": lax.add,
}
SCANS: dict[str, Callable] = {
    "cummax": lax.max,
    "cummin": lax.min,
    "cumprod": lax.mul,
    "cumsum": lax.add,
}
MOVES: dict[str, Callable] = {
    "broadcast_in_dim": broadcast,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, dimensions),
    "iota": counted,
    "pad": padded,
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "slice": sliced,
    "split": split,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "stack": lambda *xs, axis: np.stack(xs, axis),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "unstack": unstacked,
}


def closed(jaxpr: core.Jaxpr) -> core.ClosedJaxpr:
    return core.ClosedJaxpr(jaxpr, ())
