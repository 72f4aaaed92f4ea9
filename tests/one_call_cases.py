"""Fields for `test_one_call.py`, and the child process that solves them.

A fault of one native call ends the process, so nothing here is solved by the tests themselves:

    python tests/one_call_cases.py FILE CASE [CASE ...]

solves each case, prints its name before that, and writes the results to FILE.
"""

import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode import solve
from jaxode.batch import plans
from jaxode.kernels import rules
from jaxode.methods.tables import methods


def with_a_rule(y):
    """A function with a derivative of its own."""
    sine = rules.custom_jvp(lambda y: jnp.sin(2 * y))
    sine.defjvp(
        lambda primals, tangents: (sine(*primals), 2 * jnp.cos(2 * primals[0]) * tangents[0])
    )
    return sine(y)


# One field for each rule of `kernels/one_call.py`.


def whole(x):
    """Numbers of x as integers: -2 to 2 or so."""
    return lax.convert_element_type(3 * x, jnp.int32)


def weight(x, like):
    """Something that is not differentiated, as numbers about 1."""
    return lax.convert_element_type(x, like.dtype) / 8


def of_pairs(reducer):
    """A reduction of one of two things that are true or false."""
    return lambda y: y * weight(reducer(jnp.stack([y > 0.41, y < 0.62]), (0,)), y)


@jax.custom_jvp
def softened(y):
    return jnp.sin(y)


softened.defjvp(lambda xs, xs_dot: (softened(*xs), jnp.cos(xs[0]) * xs_dot[0]))


@jax.custom_vjp
def halved(y):
    return y / 2


halved.defvjp(lambda y: (y / 2, None), lambda _, y_bar: (y_bar / 2,))


def powers(y):
    """A loop that ends when it may."""
    start = lax.stop_gradient(y)
    return lax.while_loop(lambda x: jnp.max(x) > 0.2, lambda x: 0.7 * x, start)


def summed(y):
    return lax.scan(lambda total, x: (total + x, total * x), jnp.zeros((), y.dtype), y)[1]


def written(y):
    one = jnp.ones(2, y.dtype)
    return lax.dynamic_update_slice(y, y[:2] * one, (jnp.argmax(y) // 2,))


def mixed(y):
    """A rule of addition that only transposes make."""
    return jax.grad(lambda y: jnp.sum(y * jnp.sin(y) + y))(y)


square3 = lambda y: jnp.outer(y[:3], y[1:])
bits = lambda y: jnp.int64 if y.dtype == jnp.float64 else jnp.int32
mask = lambda y: jnp.stack([y > 0.41, y < 0.62])
STEPS = np.array([0.1, 0.33, 0.41, 0.77])
ELEMENTWISE = {
    "abs": lambda y: lax.abs(y - 0.43),
    "acos": lambda y: lax.acos(y / 3),
    "acosh": lambda y: lax.acosh(y + 2),
    "add": lambda y: lax.add(y, y),
    "add_any": mixed,
    "and": lambda y: y * weight(whole(y) & 3, y),
    "asin": lambda y: lax.asin(y / 3),
    "asinh": lax.asinh,
    "atan": lax.atan,
    "atan2": lambda y: lax.atan2(y, 1 + y),
    "atanh": lambda y: lax.atanh(y / 3),
    "cbrt": lambda y: lax.cbrt(y + 1),
    "ceil": lambda y: y * lax.ceil(y),
    "clamp": lambda y: lax.clamp(np.asarray(0.2113, y.dtype), y, np.asarray(0.6217, y.dtype)),
    "complex": lambda y: lax.abs(lax.complex(y, 1 + y)),
    "conj": lambda y: lax.imag(lax.conj(lax.complex(y, y)) * lax.complex(y, 2 * y)),
    "copy": lambda y: jnp.array(y, copy=True),
    "cos": lax.cos,
    "cosh": lax.cosh,
    "convert_element_type": lambda y: y.astype(jnp.float32).astype(y.dtype),
    "digamma": lambda y: lax.digamma(y + 2),
    "div": lambda y: lax.div(y, 1 + y),
    "eq": lambda y: y * weight(lax.eq(whole(y), whole(2 * y)), y),
    "erf": lax.erf,
    "erf_inv": lambda y: lax.erf_inv(y / 3),
    "erfc": lax.erfc,
    "exp": lambda y: lax.exp(-y),
    "exp2": lambda y: lax.exp2(-y),
    "expm1": lambda y: lax.expm1(-y),
    "floor": lambda y: y * lax.floor(3 * y),
    "ge": lambda y: y * weight(lax.ge(y, 0.41 * jnp.ones_like(y)), y),
    "gt": lambda y: y * weight(lax.gt(y, 0.41 * jnp.ones_like(y)), y),
    "imag": lambda y: lax.imag(lax.complex(y, y) ** 2),
    "integer_pow": lambda y: y**3,
    "is_finite": lambda y: y * weight(lax.is_finite(y), y),
    "le": lambda y: y * weight(lax.le(y, 0.41 * jnp.ones_like(y)), y),
    "lgamma": lambda y: lax.lgamma(y + 2),
    "log": lambda y: lax.log(y + 1),
    "log1p": lax.log1p,
    "logistic": lax.logistic,
    "lt": lambda y: y * weight(lax.lt(y, 0.41 * jnp.ones_like(y)), y),
    "lt_to": lambda y: y * weight(jnp.searchsorted(STEPS.astype(y.dtype), y, side="right"), y),
    "le_to": lambda y: y * weight(jnp.searchsorted(STEPS.astype(y.dtype), y, side="left"), y),
    "max": lambda y: lax.max(y, 0.43 * jnp.ones_like(y)),
    "min": lambda y: lax.min(y, 0.43 * jnp.ones_like(y)),
    "mul": lambda y: lax.mul(y, y),
    "ne": lambda y: y * weight(lax.ne(whole(y), whole(2 * y)), y),
    "neg": lax.neg,
    "nextafter": lambda y: y + lax.nextafter(lax.stop_gradient(y), jnp.ones_like(y)),
    "not": lambda y: y * weight(~(y > 0.41), y) + y * weight(~whole(y), y),
    "one_minus_square": lambda y: jax.grad(lambda y: jnp.sum(jnp.tanh(y)))(y),
    "or": lambda y: y * weight(whole(y) | 1, y),
    "polynomial": lambda y: jax.grad(lambda y: jnp.sum(lax.erf(y)))(y),
    "pow": lambda y: lax.pow(y + 1, y),
    "real": lambda y: lax.real(lax.complex(y, y) ** 2),
    "reduce_precision": lambda y: y + 0.1 * lax.reduce_precision(y, 8, 10),
    "rem": lambda y: lax.rem(y, 0.37 * jnp.ones_like(y)),
    "round": lambda y: y * lax.round(3 * y),
    "rsqrt": lambda y: lax.rsqrt(y + 1),
    "select_n": lambda y: lax.select(y > 0.41, y, 2 * y),
    "shift_left": lambda y: y * weight(whole(y) << 1, y),
    "shift_right_arithmetic": lambda y: (
        y * weight(lax.shift_right_arithmetic(whole(4 * y), jnp.ones(4, jnp.int32)), y)
    ),
    "shift_right_logical": lambda y: (
        y * weight(lax.shift_right_logical(whole(4 * y), jnp.ones(4, jnp.int32)), y)
    ),
    "sign": lambda y: y * lax.sign(y - 0.41),
    "sin": lax.sin,
    "sinh": lax.sinh,
    "sqrt": lambda y: lax.sqrt(y + 1),
    "square": lax.square,
    "stop_gradient": lambda y: y * lax.stop_gradient(y),
    "sub": lambda y: lax.sub(y, 2 * y),
    "tan": lambda y: lax.tan(y / 2),
    "tanh": lax.tanh,
    "xor": lambda y: y * weight(whole(y) ^ 1, y),
}
MOVES = {
    "bitcast_convert_type": lambda y: y * weight(lax.bitcast_convert_type(y, bits(y)) >= 0, y),
    "broadcast_in_dim": lambda y: jnp.broadcast_to(y[0], y.shape),
    "concatenate": lambda y: lax.concatenate([y[1:], y[:1]], 0),
    "dynamic_slice": lambda y: lax.dynamic_slice(y, (whole(y[0]),), (1,)) * y,
    "dynamic_update_slice": written,
    "gather": lambda y: y[whole(y)],
    "iota": lambda y: y * lax.iota(y.dtype, 4),
    "optimization_barrier": lambda y: lax.optimization_barrier(2 * y) + y,
    "pad": lambda y: lax.pad(y, np.zeros((), y.dtype), [(1, -1, 0)]),
    "reshape": lambda y: y.reshape(2, 2).sum(1).repeat(2),
    "rev": lambda y: lax.rev(y, (0,)),
    "slice": lambda y: y[1:3].sum() * y,
    "split": lambda y: y * jnp.split(y, 2)[0][1],
    "tile": lambda y: jnp.sum(jnp.tile(y, 3).reshape(4, 3), 1),
    "squeeze": lambda y: jnp.squeeze(y[:1], 0) * y,
    "stack": lambda y: jnp.stack([y[0], y[2], y[1], y[3]]),
    "transpose": lambda y: jnp.sin(y.reshape(2, 2).T).reshape(4),
    "unstack": lambda y: y * jnp.unstack(y)[1],
}
# `jax.checkpoint`, by the name that this JAX has for it.
CHECKPOINT = jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name
CALLS = {
    CHECKPOINT: jax.checkpoint(lambda y: jnp.sin(jnp.cos(y))),
    "while": lambda y: y * powers(y),
    "empty2": lambda y: jax.grad(lambda y: lax.cond(y[0] > 0.41, jnp.sin, jnp.cos, y).sum())(y),
    "cond": lambda y: lax.cond(y[0] > 0.41, jnp.sin, jnp.cos, y),
    "scan": summed,
    "jit": lambda y: jax.jit(lambda y: 2 * y)(y),
    "custom_jvp_call": softened,
    "custom_vjp_call": halved,
    "ruled": with_a_rule,
    "custom_linear_solve": lambda y: lax.custom_linear_solve(
        lambda x: 2 * x, y, lambda _, b: b / 2, lambda _, b: b / 2
    ),
}
REDUCTIONS = {
    "argmax": lambda y: y * weight(jnp.argmax(y), y),
    "argmin": lambda y: y * weight(jnp.argmin(y), y),
    "cummax": lambda y: lax.cummax(y, 0),
    "cummin": lambda y: lax.cummin(y, 0),
    "cumprod": lambda y: lax.cumprod(y + 1, 0),
    "cumsum": lambda y: lax.cumsum(y, 0),
    "reduce_and": of_pairs(lax.reduce_and),
    "reduce_max": lambda y: y * jnp.max(y),
    "reduce_min": lambda y: y * jnp.min(y),
    "reduce_or": of_pairs(lax.reduce_or),
    "reduce_prod": lambda y: y * jnp.prod(y.reshape(2, 2) + 1, 0).sum(),
    "reduce_sum": lambda y: y * jnp.sum(y),
    "reduce_xor": of_pairs(lax.reduce_xor),
}
PRODUCTS = {
    "dot_general": lambda y: jnp.linspace(0, 1, 12, dtype=y.dtype).reshape(4, 3) @ y[:3] * y,
    "dot_general of vectors": lambda y: y * (y @ y),
    "dot_general of tiny matrices": lambda y: y * jnp.trace(square3(y) @ square3(y)),
    "dot_general of tiny batches": lambda y: y * jnp.einsum("bij,bjk->", *[jnp.stack([square3(y)] * 2)] * 2),
    "dot_general without sums": lambda y: jnp.tensordot(y, y, 0)[1],
}  # fmt: skip
WIDE = np.linspace(0, 1, 16000).reshape(4, 4000)
# The largest that the rules let through.
EDGES = {
    "a sum": lambda y: y * weight(jnp.sum(jnp.tile(y, 1000)) / 400, y),
    "a sum of columns": lambda y: y * jnp.sum(jnp.tile(y, (1000, 1)), 0) / 1000,
    "a sum of rows": lambda y: y * jnp.max(jnp.sum(jnp.tile(y, (1000, 1)), 1)),
    "a running sum": lambda y: y * jnp.cumsum(jnp.tile(y, 1000))[-4:] / 1000,
    "a running maximum": lambda y: y * lax.cummax(jnp.tile(y, 1000))[-4:],
    "the largest": lambda y: y * weight(jnp.argmax(jnp.tile(y, 1000)), y),
    "a product of vectors": lambda y: y * jnp.tile(y, 1000).dot(jnp.tile(y, 1000)) / 1000,
    "a matrix and a vector": lambda y: jnp.tile(y, (300, 1)).dot(y)[:4],
    "a vector and a matrix": lambda y: jnp.tile(y, 75).dot(jnp.tile(y, (300, 1))) / 300,
    "a wide matrix and a vector": lambda y: WIDE.astype(y.dtype) @ jnp.tile(y, 1000) / 4000,
    "tiny matrices": lambda y: y * jnp.sum(jnp.tile(y, (7, 7))[:, :7] @ jnp.tile(y, (7, 7))[:, :7]),
}
RULES = {**ELEMENTWISE, **MOVES, **CALLS, **REDUCTIONS, **PRODUCTS}
# Rules without a field: other names that JAX has given, or gives, to what is here.
NAMES = {
    "pjit": "jit",
    "core_call": "jit",
    "closed_call": "jit",
    "expand_dims": "broadcast_in_dim",
    "pmax": "reduce_max",
    "pmin": "reduce_min",
} | dict.fromkeys({"checkpoint", "remat2"} - {CHECKPOINT}, CHECKPOINT)


def group(names):
    """A field that has all of these operations, in both precisions."""

    def func(y, t):
        total = -y * jnp.cos(t)
        for name in names:
            term = {**RULES, **EDGES}[name]
            narrow = term(y.astype(jnp.float32)).astype(y.dtype)
            total += (jnp.tanh(term(y)) + jnp.tanh(narrow)) / (2 * len(names))
        return total

    return func


def case_of_rules(names):
    y0 = jnp.array([0.5123, 0.3712, 0.7312, 0.2345])
    return dict(func=group(names), y0=y0, args=(), options=dict(method="heun", dt=0.25))


# Solves of which something is not used, or is a constant.


def decay(y, t, *args):
    return -y


UNUSED = {
    "an argument": dict(func=decay, args=(jnp.ones(3), 2.0)),
    "a large argument": dict(func=decay, args=(np.ones(700),)),
    "arguments of every dtype": dict(
        func=lambda y, t, a, *rest: -a * y,
        args=(
            2.0,
            np.arange(3),
            np.ones(2, np.float32),
            np.ones(1, bool),
            np.ones(1, np.complex64),
        ),
    ),
    "an empty argument": dict(func=lambda y, t, a: -y + a.sum(), args=(np.ones((2, 0)),)),
    "a part of the state": dict(func=lambda y, t: (y[0] * 0 + 1, -y[0]), y0=(0.5, np.ones(2)[0])),
    "the state": dict(func=lambda y, t: jnp.ones_like(y), args=()),
    "everything": dict(func=lambda y, t: np.ones(3), y0=np.ones(3)),
    "an argument inside of a call": dict(
        func=lambda y, t, a: jax.jit(lambda y, a: -y)(y, a), args=(np.ones(3),)
    ),
    "an argument of a branch": dict(
        func=lambda y, t, a: lax.cond(t > 0.3, lambda y, a: -y, lambda y, a: -2 * y, y, a),
        args=(np.ones(3),),
    ),
    "a carry of a loop": dict(
        func=lambda y, t, a: lax.fori_loop(0, 3, lambda i, c: (jnp.sin(c[0]), c[1]), (y, a))[0],
        args=(np.ones(3),),
    ),
    "the outputs": dict(func=decay, loss="nothing"),
    "an output of a tuple": dict(func=lambda y, t: (y[1], -y[0]), y0=(0.5, 1.0), loss="one leaf"),
    "an argument that is a constant": dict(func=lambda y, t, a: -a * y, args=(2.0,), of="y0"),
    "a constant that func closes over": dict(func=lambda y, t: -TABLE[:2] * y, y0=np.ones(2)),
    "a large constant": dict(func=lambda y, t: -LARGE @ y, y0=np.ones(30) / 30),
    "a table that is looked up": dict(
        func=lambda y, t: jnp.interp(t, TABLE, TABLE**2) - y, args=()
    ),
    "all constants": dict(func=lambda y, t, a: -a * y, args=(np.ones(2),), y0=np.ones(2), of=""),
}
TABLE = jnp.linspace(0.0, 1.0, 9)
LARGE = np.ones((30, 30))


def case_of_unused(name):
    case = dict(y0=np.float64(0.5), args=(), options=dict(method="heun", dt=0.25), of="y0 args")
    return case | UNUSED[name]


# What is done with a case.


def solution(case, y0, t, args, solver):
    if solver == "steps":
        return by_steps(case["func"], y0, t, args, **case["options"])
    return solve(case["func"], y0, t, *args, **case["options"]).ys


def loss(case, ys):
    """A number made of the outputs, or of some of them."""
    leaves, kind = jax.tree.leaves(ys), case.get("loss", "all")
    if kind == "nothing":
        return sum(jnp.sum(y.real[:0]) for y in leaves)
    if kind == "last":
        leaves = [y[-1:] for y in leaves]
    if kind == "one leaf":
        leaves = leaves[-1:]
    return sum(jnp.sum(jnp.abs(y * y + 1).astype(jnp.float64)) for y in leaves)


def is_float(x):
    return isinstance(x, float | jax.Array | np.ndarray | np.floating) and jnp.issubdtype(
        jnp.result_type(x), jnp.inexact
    )


def work(case, solver):
    """A function of (y0, t, args): the solution, or the gradient, of one solve or of many."""
    lanes = case.get("lanes", 0)

    def one(y0, t, args):
        if not case.get("gradient"):
            return solution(case, y0, t, args, solver)
        given = dict(y0=y0, t=t, args=args)
        moving = {k: v for k, v in given.items() if k in case.get("of", "y0 args").split()}
        leaves, structure = jax.tree.flatten(moving)
        floats = [i for i, x in enumerate(leaves) if is_float(x)]

        def of(xs):
            new = list(leaves)
            for i, x in zip(floats, xs):
                new[i] = x
            now = given | jax.tree.unflatten(structure, new)
            return loss(case, solution(case, now["y0"], now["t"], now["args"], solver))

        return jax.value_and_grad(of)([leaves[i] for i in floats])

    def many(y0, t, args):
        scales = 1 + jnp.arange(lanes) / (4 * lanes)
        scaled = lambda scale, x: (x * scale).astype(jnp.result_type(x)) if is_float(x) else x
        each = lambda scale: one(
            jax.tree.map(lambda y: scaled(scale, y), y0),
            t,
            args if case["shared"] else jax.tree.map(lambda x: scaled(scale, x), args),
        )
        return jax.vmap(each)(scales)

    return many if lanes else one


def by_steps(func, y0, t, args, method, dt, **_):
    """The same solution by a table of coefficients, one operation at a time: only func is compiled."""
    table, known = methods[method], TIMES[-1]
    count = max(1, int(np.ceil(abs(known[-1] - known[0]) / dt)))
    span = t[-1] - t[0]
    h = span / count
    slope = jax.jit(lambda y, s: like(func(y, (t[0] + span * s).astype(t.dtype), *args), y))
    like = lambda k, y: jax.tree.map(lambda k, y: jnp.asarray(k).astype(y.dtype), k, y)

    def add(y, weights, ks):
        one = lambda y, *k: y + sum((w * h).astype(k.dtype) * k for w, k in zip(weights, k))
        return like(jax.tree.map(one, y, *ks), y)

    ys, slopes = [y0], []
    for i in range(count):
        ks = []
        for c, row in zip((*table.c, *table.extra_c), (*table.a, *table.extra_a)):
            ks.append(slope(add(ys[-1], row, ks), jnp.asarray((i + c) / count, t.dtype)))
        slopes.append(ks)
        ys.append(add(ys[-1], table.b, ks))

    def row_at(j):
        if j in (0, len(known) - 1):
            return ys[0] if j == 0 else ys[-1]
        place = (known[j] - known[0]) / (known[-1] - known[0]) * count
        i = int(np.clip(np.ceil(place - 1e-9) - 1, 0, count - 1))
        theta = (t[j] - t[0]) / span * count - i
        weights = [
            sum(theta ** (p + 1) * row[m] for p, row in enumerate(table.dense))
            for m in range(len(slopes[i]))
        ]
        return add(ys[i], weights, slopes[i])

    return jax.tree.map(lambda *y: jnp.stack(y), *map(row_at, range(len(known))))


TIMES = []  # those of the case, as numbers


def results(case):
    """Of a case: what the solver says, in how many calls, what it should say; whether float32 is in it."""
    dtype = tree_dtype(case["y0"])
    y0, args = jax.tree.map(jnp.asarray, case["y0"]), case.get("args", ())
    t = case.get("t", jnp.array([0.0, 0.6, 1.0], dtype))
    TIMES.append(np.asarray(t))
    dynamic, static = [], []
    leaves, structure = jax.tree.flatten(args)
    for x in leaves:
        (dynamic if is_float(x) else static).append(x)

    def fn(y0, t, dynamic, solver="ours"):
        xs, rest = iter(dynamic), iter(static)
        args = jax.tree.unflatten(structure, [next(xs if is_float(x) else rest) for x in leaves])
        return work(case, solver)(y0, t, args)

    lowered = jax.jit(fn).lower(y0, t, dynamic)
    marks = lowered.as_text().count('xla_cpu_small_call = "true"')
    found = lowered.compile()(y0, t, dynamic)
    options = case["options"]
    exact = "dt" in options and (not case.get("gradient") or options.get("adjoint") != "backsolve")
    if exact:
        wanted = fn(y0, t, dynamic, "steps")
    else:
        suits, plans.suits = plans.suits, lambda *args: False
        jax.clear_caches()
        wanted = jax.jit(fn)(y0, t, dynamic)
        plans.suits = suits
        jax.clear_caches()
    leaves_of = lambda x: [np.asarray(x) for x in jax.tree.leaves(x)]
    numbers = [jnp.result_type(x) for x in jax.tree.leaves((y0, dynamic))]
    narrow = any(jnp.finfo(dtype).bits < 64 for dtype in numbers)
    return leaves_of(found), marks, leaves_of(wanted), narrow


def tree_dtype(y0):
    kinds = {jnp.finfo(jnp.result_type(y)).dtype for y in jax.tree.leaves(y0)}
    return jnp.float64 if jnp.dtype("float64") in kinds else jnp.float32


def case_of(name):
    kind, _, rest = name.partition(":")
    if kind == "seed":
        from random_fields import random_case

        return random_case(int(rest))
    gradient = kind.endswith("'")
    case = case_of_rules(rest.split(",")) if kind.startswith("rules") else case_of_unused(rest)
    return case | dict(gradient=gradient)


def main(file, names):
    jax.config.update("jax_enable_x64", True)
    found = {}
    for name in names:
        print(name, flush=True)
        try:
            found[name] = results(case_of(name))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        with open(file, "wb") as out:
            pickle.dump(found, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
