"""A small computation as scalars, so that XLA makes one kernel of it.

A step of a three-dimensional system is some hundred multiplications, yet written with arrays it
compiles to a dozen kernels, because XLA cannot fuse through the slices and stacks with which a
vector field takes its state apart and puts it together; its derivative, full of padded slices, is
worse. `fuse(fn)` traces `fn` once and evaluates the jaxpr component by component: slices and
stacks vanish, what is left is scalar arithmetic, and each result is assembled by a chain of
selects, which XLA does fuse. Lorenz, dopri5, float64, two CPU cores: a step took 160 ns instead of
400 ns, and the step of a gradient 50 ns instead of 5 us.

Only arithmetic that stays small is rewritten (`LIMIT` scalar operations); anything else, and
anything under `jax.vmap`, where arrays are already wide, runs as it was written. `of_lanes(fn)` is
the same for many lanes: each scalar is then an array of all lanes, and all results come from one
kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

LIMIT = 3000  # scalar operations; beyond this, compiling costs more than the kernels it saves
INPUTS = 64  # scalars that go in

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp copy cos cosh
    convert_element_type div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real rem round
    rsqrt select_n sign sin sinh sqrt square sub tan tanh xor""".split()
)
DEAR = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cosh div erf erf_inv erfc exp exp2 expm1 lgamma log
    log1p logistic pow rem rsqrt sinh sqrt tan tanh""".split()
)
CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"))


def fuse(fn, *examples, cheap=False):
    """`fn`, evaluated in scalars, for arguments like the examples; None if it is not small enough.

    `cheap`: None, too, if there is a division or a function such as a root or a logarithm in it. XLA
    makes kernels of their own for these, each of which computes again what leads to it: a step of
    Kepler's problem then takes 1.6 times as long as with arrays (its derivative still half as long).
    """
    leaves = jax.tree.leaves(examples)
    if sum(jnp.size(leaf) for leaf in leaves) > INPUTS or not all(map(is_number, leaves)):
        return None
    jaxpr, out_shape = jax.make_jaxpr(fn, return_shape=True)(*examples)
    constants = sum(jnp.size(c) for c in jaxpr.consts)
    if constants > INPUTS or not cost(jaxpr.jaxpr) <= LIMIT or (cheap and dear(jaxpr.jaxpr)):
        return None
    tree = jax.tree.structure(out_shape)

    def as_arrays(consts, *leaves):
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.jaxpr, consts))(*leaves)

    @jax.custom_jvp
    def call(consts, *leaves):
        return narrow(consts, *leaves)

    @call.defjvp
    def call_jvp(primals, tangents):
        return jax.jvp(as_arrays, primals, tangents)

    @jax.custom_batching.custom_vmap
    def narrow(consts, *leaves):
        consts, leaves = map(take_apart, consts), map(take_apart, leaves)
        outs = evaluate(jaxpr.jaxpr, consts, leaves)
        return [put_together(o, v.aval) for o, v in zip(outs, jaxpr.jaxpr.outvars)]

    @narrow.def_vmap
    def wide(axis_size, batched, *args):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        outs = jax.vmap(as_arrays, axes, axis_size=axis_size)(*args)
        return outs, [True] * len(outs)

    def fused(*args):
        return jax.tree.unflatten(
            tree, call(jaxpr.consts, *map(jnp.asarray, jax.tree.leaves(args)))
        )

    return fused


def components(fn, *examples):
    """`fn` as a function of flat lists of scalars: those of the arguments in, those of the results out.

    None if it is not small enough. Under `jax.vmap` every scalar is an array of its own, and nothing
    is sliced or stacked; nor is it in a derivative of this.
    """
    found = small(fn, *examples)
    return None if found is None else found[0]


def small(fn, *examples):
    """The same, and the results as shapes and dtypes."""
    leaves = jax.tree.leaves(examples)
    if sum(jnp.size(leaf) for leaf in leaves) > INPUTS or not all(map(is_number, leaves)):
        return None
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*examples)
    if sum(jnp.size(c) for c in closed.consts) > INPUTS or not cost(closed.jaxpr) <= LIMIT:
        return None

    def apart(scalars):
        scalars = iter(scalars)
        args = [fill(v.aval.shape, lambda _: next(scalars)) for v in closed.jaxpr.invars]
        outs = evaluate(closed.jaxpr, [take_apart(c) for c in closed.consts], args)
        parts = zip(outs, closed.jaxpr.outvars)
        return [jnp.asarray(x, v.aval.dtype) for o, v in parts for x in o.reshape(-1)]

    return apart, shapes


def of_lanes(fn, *examples):
    """`fn` of one lane as a function of many, lanes along the last axis of every argument and result.

    All of it is one kernel, however many results there are: XLA gives each of several arrays a kernel
    of its own, which computes again what they have in common, but not so the several results of one
    reduction. So this is a reduction, of two equal rows x, that makes fn(x) of (anything, x). That is
    what comes out if XLA combines the rows in turn, as it does on a CPU. A mark goes along that shows
    whether it did: with the results comes where they are valid. None if `fn` is not small enough.
    """
    if (found := small(fn, *examples)) is None:
        return None
    apart, shapes = found
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves((examples, shapes))}
    if sum(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes) > 1:
        return None  # XLA reduces no arrays of different precisions together

    def many(*args):
        xs = [part for x in jax.tree.leaves(args) for part in rows(x)]
        wanted = [leaf.dtype for leaf in jax.tree.leaves(shapes) for _ in range(leaf.size)]
        places, slots = matched([x.dtype for x in xs], wanted)
        missing = [jnp.zeros_like(xs[0], dtype) for dtype in slots[len(xs) :]]
        operands = (*xs, *missing, jnp.ones_like(xs[0], jnp.int32))

        def last(_, row):
            *x, mark = row
            out = list(x)
            for place, value in zip(places, apart(x[: len(xs)])):
                out[place] = value
            return (*out, jnp.where(mark == 1, np.int32(2), np.int32(3)))

        begin = tuple(np.zeros((), x.dtype) for x in operands)
        twice = tuple(jnp.broadcast_to(x, (2, *x.shape)) for x in operands)
        out = lax.reduce(twice, begin, last, (0,))
        # A result that nothing uses crashes StableHLO's canonicalisation of reductions (jaxlib 0.10).
        *out, mark = lax.optimization_barrier(out)
        out = iter([out[place] for place in places])
        return jax.tree.map(lambda x: put_in_rows(x, out, mark.shape), shapes), mark == 2

    return many


def rows(x) -> list:
    """The scalars of one lane, each with its lanes."""
    return list(x.reshape(-1, x.shape[-1]))


def put_in_rows(like, scalars, lanes):
    """The next of these scalars, each with its lanes, as an array."""
    shape = (*like.shape, *lanes)
    found = [next(scalars) for _ in range(like.size)]
    return jnp.stack(found).reshape(shape) if found else jnp.zeros(shape, like.dtype)


def matched(given, wanted) -> tuple[list, list]:
    """A place for each wanted dtype among those given, and all of these: more where there are too few."""
    slots, free, places = list(given), {}, []
    for i, dtype in enumerate(given):
        free.setdefault(dtype, []).append(i)
    for dtype in wanted:
        if not free.get(dtype):
            free.setdefault(dtype, []).append(len(slots))
            slots.append(dtype)
        places.append(free[dtype].pop(0))
    return places, slots


def is_number(x) -> bool:
    """Whether x is an array of floats, complex numbers, integers or booleans (and not of keys)."""
    return jnp.issubdtype(jnp.result_type(x), jnp.number) or jnp.result_type(x) == jnp.bool


def cost(jaxpr) -> float:
    """Scalar operations of a jaxpr; infinite if some equation cannot be rewritten."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ELEMENTWISE:
            total += eqn.outvars[0].aval.size
        elif name in CALLS:
            total += cost(inner(eqn).jaxpr)
        elif name in REDUCTIONS:
            total += eqn.invars[0].aval.size
        elif name not in STRUCTURAL:
            return math.inf
    return total


def dear(jaxpr) -> bool:
    """Whether there is an operation that XLA does not fuse with those that use it."""
    return any(
        dear(inner(eqn).jaxpr) if eqn.primitive.name in CALLS else eqn.primitive.name in DEAR
        for eqn in jaxpr.eqns
    )


def inner(eqn):
    """The jaxpr that a call runs."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def evaluate(jaxpr, consts, args):
    """Evaluate a jaxpr whose values are numpy arrays of scalar tracers."""
    values = {}

    def read(atom):
        return take_apart(atom.val) if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts))
    values.update(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        name, xs = eqn.primitive.name, [read(x) for x in eqn.invars]
        if name in ELEMENTWISE:
            outs = [elementwise(eqn, xs)]
        elif name in CALLS:
            call = inner(eqn)
            outs = evaluate(call.jaxpr, [take_apart(c) for c in call.consts], xs)
        elif name in REDUCTIONS:
            outs = [reduction(eqn, xs[0])]
        elif name == "split":
            cuts = np.cumsum(eqn.params["sizes"])[:-1]
            outs = np.split(xs[0], cuts, axis=eqn.params["axis"])
        elif name == "unstack":
            outs = [_take(xs[0], i, **eqn.params) for i in range(len(eqn.outvars))]
        else:
            outs = [STRUCTURAL[name](*xs, **eqn.params)]
        values.update(zip(eqn.outvars, outs))
    return [read(x) for x in jaxpr.outvars]


def elementwise(eqn, xs):
    shape, name = eqn.outvars[0].aval.shape, eqn.primitive.name
    params = {**eqn.params, "sharding": None} if "sharding" in eqn.params else eqn.params
    xs = [np.broadcast_to(x, shape) for x in xs]

    def entry(i):
        operands = [x[i] for x in xs]
        if name in ("add", "add_any"):  # transposed slices are full of zeros
            operands = [x for x in operands if not is_zero(x)] or operands[:1]
            if len(operands) == 1:
                return operands[0]
        return eqn.primitive.bind(*operands, **params)

    return fill(shape, entry)


def is_zero(x) -> bool:
    return isinstance(x, np.generic) and x == 0


REDUCTIONS = {
    "reduce_and": lax.bitwise_and,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_sum": lax.add,
}


def reduction(eqn, x):
    axes = eqn.params["axes"]
    x = np.moveaxis(x, axes, range(len(axes))).reshape(-1, *eqn.outvars[0].aval.shape)
    combine = REDUCTIONS[eqn.primitive.name]
    return fill(
        x.shape[1:], lambda i: functools.reduce(combine, [x[(j, *i)] for j in range(len(x))])
    )


def fill(shape, entry):
    out = np.empty(shape, object)
    for i in np.ndindex(*shape):
        out[i] = entry(i)
    return out


def take_apart(x):
    """An array as a numpy array of its scalar components; numbers stay numbers."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        return fill(x.shape, lambda i: x[i])
    flat = x.reshape(-1)
    scalars = iter(
        [x] if not x.shape else [lax.index_in_dim(flat, i, keepdims=False) for i in range(x.size)]
    )
    return fill(x.shape, lambda _: next(scalars))


def put_together(scalars, aval):
    """The array of these scalars, by selects: XLA fuses a select, but not a long concatenate."""
    flat = [jnp.asarray(x, aval.dtype) for x in scalars.reshape(-1)]
    if not flat:
        return jnp.zeros(aval.shape, aval.dtype)
    if not aval.shape:
        return flat[0]
    wide = (len(flat),)
    place = np.arange(len(flat))
    out = lax.broadcast(flat[-1], wide)
    for i, x in enumerate(flat[:-1]):
        out = lax.select(place == i, lax.broadcast(x, wide), out)
    return lax.reshape(out, aval.shape)


def _slice(x, *, start_indices, limit_indices, strides):
    strides = strides or [1] * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _take(x, i, *, axis):
    return np.squeeze(x[(slice(None),) * axis + (slice(i, i + 1),)], axis)


def _broadcast_in_dim(x, *_, shape, broadcast_dimensions, **__):
    kept = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape):
        kept[axis] = size
    return np.broadcast_to(x.reshape(kept), shape)


def _pad(x, value, *, padding_config):
    low, high, interior = zip(*padding_config) if padding_config else ((), (), ())
    if any(n < 0 for n in (*low, *high)):
        raise NotImplementedError("negative padding")
    shape = [a + n + (n - 1) * i * (n > 0) + b for a, n, i, b in zip(low, x.shape, interior, high)]
    out = fill(tuple(shape), lambda _: value[()])
    out[
        tuple(
            slice(a, a + (n - 1) * (i + 1) + 1 if n else a, i + 1)
            for a, n, i in zip(low, x.shape, interior)
        )
    ] = x
    return out


STRUCTURAL = {
    **REDUCTIONS,
    "slice": _slice,
    "broadcast_in_dim": _broadcast_in_dim,
    "pad": _pad,
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, dimensions),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "split": None,  # several results: see `evaluate`
    "stack": lambda *xs, axis: np.stack(xs, axis),
    "unstack": None,
    "stop_gradient": lambda x, **_: x,
}
