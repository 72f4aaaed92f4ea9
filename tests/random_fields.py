"""Random fields: any of JAX's operations, one after another, on a small state.

`random_case(seed)` is a solve of one, the same for the same seed. A field is made anew whenever it is
called, by a generator of random numbers with that seed, so it may look at the shapes that it meets.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LONG = 24  # numbers of an array, beyond which it is cut


def fit(x, shape):
    """The numbers of x, again and again, in this shape."""
    size = int(np.prod(shape))
    x = x.reshape(-1)
    if not x.size:
        return jnp.zeros(shape, x.dtype)
    return (
        jnp.concatenate([x] * -(-size // x.size))[:size].reshape(shape)
        if size
        else x[:0].reshape(shape)
    )


def square(x, n):
    return fit(x, (n, n))


@jax.custom_jvp
def sine(x):
    return jnp.sin(x)


sine.defjvp(lambda xs, xs_dot: (sine(*xs), jnp.cos(xs[0]) * xs_dot[0]))


@jax.custom_jvp
def with_a_count(x):
    """Two results, one of which has no derivative."""
    return jnp.tanh(x), jnp.sum(x > 0.1234)


@with_a_count.defjvp
def with_a_count_jvp(xs, xs_dot):
    y, count = with_a_count(*xs)
    return (y, count), ((1 - y**2) * xs_dot[0], np.zeros((), jax.dtypes.float0))


@jax.custom_vjp
def clipped(x):
    return jnp.tanh(x)


clipped.defvjp(lambda x: (jnp.tanh(x), x), lambda x, bar: ((1 - jnp.tanh(x) ** 2) * bar,))

ONE = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "gaussian": lambda x: jnp.exp(-x * x),
    "log1p": lambda x: jnp.log1p(x * x),
    "sqrt": lambda x: jnp.sqrt(1 + x * x),
    "rsqrt": lambda x: lax.rsqrt(1 + x * x),
    "ratio": lambda x: x / (1 + x * x),
    "abs": jnp.abs,
    "erf": jax.scipy.special.erf,
    "logistic": jax.nn.sigmoid,
    "cube": lambda x: jnp.tanh(x) ** 3,
    "sign": lambda x: jnp.sign(x - 0.1234),
    "floor": lambda x: jnp.floor(3 * x + 0.1234),
    "expm1": lambda x: jnp.expm1(jnp.tanh(x)),
    "arcsinh": jnp.arcsinh,
    "arctan": jnp.arctan,
    "cbrt": lambda x: jnp.cbrt(1 + x * x),
    "rem": lambda x: x % 1.3721,
    "lgamma": lambda x: jax.scipy.special.gammaln(2 + x * x),
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "custom_jvp": sine,
    "custom_vjp": clipped,
    "two results": lambda x: with_a_count(x)[0] + with_a_count(x)[1] / 10,
    "reverse": lambda x: x[..., ::-1] if x.ndim else x,
    "transpose": lambda x: x.T,
    "roll": lambda x: jnp.roll(x, 1),
    "every other": lambda x: x[..., ::2] if x.ndim else x[None],
    "first": lambda x: x.reshape(-1)[:2],
    "nothing": lambda x: jnp.sum(x.reshape(-1)[:0]) + x,
    "flat": lambda x: x.reshape(-1),
    "pad": lambda x: jnp.pad(x.reshape(-1), (1, 0)),
    "tile": lambda x: jnp.tile(x, 2),
    "cumsum": lambda x: jnp.tanh(jnp.cumsum(x)),
    "cumprod": lambda x: jnp.cumprod(jnp.tanh(x)),
    "cummax": lambda x: lax.cummax(x.reshape(-1)),
    "sort": lambda x: jnp.sort(x.reshape(-1)),
    "argsort": lambda x: jnp.argsort(x.reshape(-1)) * 0.1,
    "top_k": lambda x: lax.top_k(x.reshape(-1), min(2, x.size))[0],
    "gather": lambda x: x.reshape(-1)[jnp.array([0, -1])],
    "gather at": lambda x: x.reshape(-1)[jnp.argmax(x)],
    "set": lambda x: x.reshape(-1).at[0].set(0.5),
    "add at": lambda x: x.reshape(-1).at[jnp.array([0, 0])].add(0.25 * x.reshape(-1)[0]),
    "maximum": lambda x: jnp.max(x),
    "minimum": lambda x: jnp.min(x, axis=0) if x.ndim else x,
    "mean": lambda x: jnp.mean(x),
    "sum": lambda x: jnp.tanh(jnp.sum(x, axis=-1)) if x.ndim else x,
    "product": lambda x: jnp.prod(jnp.tanh(x)),
    "argmax": lambda x: jnp.argmax(x) * 0.1 * x,
    "any": lambda x: jnp.where(jnp.any(x > 0.2345), x, 2 * x),
    "all": lambda x: x * jnp.all(x > 0.2345).astype(x.dtype),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1) if x.ndim else x,
    "logsumexp": lambda x: jax.scipy.special.logsumexp(x),
    "norm": lambda x: jnp.sqrt(1e-2 + jnp.sum(x * x)),
    "inverse": lambda x: jnp.linalg.solve(square(x, 3) + 30 * jnp.eye(3, dtype=x.dtype), fit(x, (3,))),
    "cholesky": lambda x: jnp.linalg.cholesky(square(x, 2) @ square(x, 2).T + jnp.eye(2, dtype=x.dtype)),
    "determinant": lambda x: jnp.tanh(jnp.linalg.det(square(x, 2))),
    "fourier": lambda x: jnp.tanh(jnp.fft.fft(x.reshape(-1)).real.astype(x.dtype)),
    "complex": lambda x: jnp.abs(x + 1j * (1 + x)).astype(x.dtype),
    "phase": lambda x: jnp.real(jnp.exp(1j * x)).astype(x.dtype),
    "integers": lambda x: (jnp.floor(4 * x + 0.1234).astype(jnp.int32) % 5).astype(x.dtype) * 0.1 * x,
    "bits": lambda x: ((jnp.floor(4 * x + 0.1234).astype(jnp.int32) & 3) << 1).astype(x.dtype) * 0.1,
    "bytes": lambda x: (jnp.abs(8 * x + 0.1234).astype(jnp.uint8) // 3).astype(x.dtype) * 0.1,
    "count": lambda x: jnp.cumsum((x > 0.3456).reshape(-1)).astype(x.dtype) * 0.1,
    "popcount": lambda x: lax.population_count(jnp.abs(8 * x).astype(jnp.uint32)).astype(x.dtype) * 0.1,
    "iota": lambda x: x * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) * 0.1,
    "barrier": lambda x: lax.optimization_barrier(x),
    "stop": lambda x: x * lax.stop_gradient(jnp.tanh(x)),
    "jit": lambda x: jax.jit(lambda x, unused: jnp.sin(x))(x, x + 1),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x),
    "cond": lambda x: lax.cond(jnp.sum(x) > 0.3456, lambda x: jnp.sin(x), lambda x: 0.5 * x, x),
    "cond without": lambda x: lax.cond(jnp.sum(x) > 0.3456, lambda: x * 2, lambda: jnp.ones_like(x)),
    "switch": lambda x: lax.switch(
        jnp.argmax(x), [jnp.sin, jnp.cos, lambda x: jnp.zeros_like(x)], jnp.tanh(x)
    ),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) + 0.1 * i, x),
    "fori with unused": lambda x: lax.fori_loop(0, 2, lambda i, c: (c[1], c[0], c[2]), (x, x * 2, x))[0],
    "scan": lambda x: lax.scan(lambda c, x: (jnp.tanh(c + x), c * x), jnp.zeros((), x.dtype), x.reshape(-1))[1],
    "scan backwards": lambda x: lax.scan(
        lambda c, x: (jnp.tanh(c - x), None), jnp.ones((), x.dtype), x.reshape(-1), reverse=True
    )[0],
    "scan of nothing": lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0],
    "while": lambda x: lax.while_loop(
        lambda x: jnp.max(jnp.abs(x)) > 0.2345, lambda x: 0.7 * x, lax.stop_gradient(x)
    ),
    "map": lambda x: lax.map(lambda x: jnp.sin(x) * 2, x.reshape(-1)),
    "vmap": lambda x: jax.vmap(lambda x: jnp.sin(x) + x[..., None].sum())(x.reshape(-1)),
    "associative": lambda x: lax.associative_scan(lambda a, b: jnp.tanh(a + b), x.reshape(-1)),
    "interp": lambda x: jnp.interp(x, jnp.array([0.0, 0.5, 1.0], x.dtype), jnp.array([0.0, 1.0, 0.5], x.dtype)),
    "inner gradient": lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(x) * x))(x),
    "inner jacobian": lambda x: jax.jacfwd(lambda x: jnp.tanh(jnp.cumsum(x)))(x.reshape(-1)[:3]),
    "inner trace": lambda x: jnp.trace(jax.jacrev(lambda x: jnp.tanh(jnp.roll(x, 1) * x))(x.reshape(-1)[:3])),
    "random": lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape, x.dtype),
    "callback": lambda x: x
    + jax.pure_callback(
        lambda x: np.cos(x), jax.ShapeDtypeStruct(x.shape, x.dtype), lax.stop_gradient(x),
        vmap_method="expand_dims",
    ),
}  # fmt: skip
# Of one array too, but only among operations of which some are in no call.
MORE = {
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "leaky relu": jax.nn.leaky_relu,
    "hard tanh": jax.nn.hard_tanh,
    "log softmax": lambda x: jnp.tanh(jax.nn.log_softmax(x.reshape(-1))),
    "standardize": lambda x: jax.nn.standardize(fit(x, (4,)) + jnp.arange(4, dtype=x.dtype)),
    "one hot": lambda x: jax.nn.one_hot(jnp.argmax(x), 3, dtype=x.dtype) * x.reshape(-1)[0],
    "digamma": lambda x: jnp.tanh(jax.scipy.special.digamma(2 + x * x)),
    "bessel": lambda x: jax.scipy.special.i0e(x) - jax.scipy.special.i1e(x),
    "erfinv": lambda x: jax.scipy.special.erfinv(jnp.tanh(x) / 2),
    "ndtri": lambda x: jax.scipy.special.ndtri(0.1 + 0.8 * jax.nn.sigmoid(x)),
    "betainc": lambda x: jax.scipy.special.betainc(1.5, 2.5, jax.nn.sigmoid(x)).astype(x.dtype),
    "gammainc": lambda x: jax.scipy.special.gammainc(2.5, 1 + x * x).astype(x.dtype),
    "xlogy": lambda x: jax.scipy.special.xlogy(x, 1 + x * x),
    "sinc": lambda x: jnp.sinc(x),
    "segment sum": lambda x: jnp.tanh(
        jax.ops.segment_sum(x.reshape(-1), jnp.arange(x.size) % 2, 2)
    ),
    "triangular": lambda x: jax.scipy.linalg.solve_triangular(
        square(jnp.tanh(x), 3) + 3 * jnp.eye(3, dtype=x.dtype), fit(x, (3,)), lower=True
    ),
    "log of determinant": lambda x: jnp.linalg.slogdet(
        square(jnp.tanh(x), 2) + 3 * jnp.eye(2, dtype=x.dtype)
    )[1],
    "exponential": lambda x: jnp.tanh(jax.scipy.linalg.expm(square(jnp.tanh(x), 2) / 4)),
    "kron": lambda x: jnp.kron(fit(x, (2, 2)), jnp.ones((1, 2), x.dtype)),
    "channels": lambda x: jnp.tanh(
        lax.conv_general_dilated(fit(x, (1, 2, 6)), fit(jnp.cos(x), (3, 2, 3)), (1,), "SAME")
    ),
    "average pool": lambda x: lax.reduce_window(
        fit(x, (6,)), np.zeros((), x.dtype), lax.add, (2,), (2,), "VALID"
    ),
    "max pool": lambda x: lax.reduce_window(
        fit(x, (6,)), np.asarray(-np.inf, x.dtype), lax.max, (3,), (1,), "SAME"
    ),
    "there and back": lambda x: jnp.fft.irfft(jnp.fft.rfft(fit(x, (6,))) ** 2, 6).astype(x.dtype) / 6,
    "spectrum": lambda x: jnp.tanh(jnp.abs(jnp.fft.fft(x.reshape(-1))) ** 2).astype(x.dtype),
    "complex product": lambda x: jnp.tanh(jnp.abs(square(x + 1j, 2) @ square(1 - 1j * x, 2)) ** 2).astype(
        x.dtype
    ),
    "angle": lambda x: jnp.angle(2 + jnp.tanh(x) + 1j * x).astype(x.dtype),
    "searched": lambda x: (
        jnp.searchsorted(jnp.array([-0.4321, 0.1234, 0.6543], x.dtype), x.reshape(-1)) * 0.1 * x.reshape(-1)
    ),
    "order": lambda x: x.reshape(-1)[jnp.argsort(x.reshape(-1))],
    "take along": lambda x: jnp.take_along_axis(fit(x, (2, 3)), jnp.array([[0, 2], [1, 1]]), 1),
    "outside": lambda x: x.reshape(-1).at[jnp.array([0, 99])].get(mode="fill", fill_value=0.5),
    "dropped": lambda x: x.reshape(-1).at[jnp.array([0, 99])].add(0.5, mode="drop"),
    "repeat": lambda x: jnp.repeat(x.reshape(-1), 2),
    "median": lambda x: jnp.median(x),
    "diff": lambda x: jnp.diff(fit(x, (5,))),
    "slopes": lambda x: jnp.gradient(fit(x, (5,))),
    "trapezoid": lambda x: jnp.trapezoid(fit(x, (5,))),
    "variance": lambda x: jnp.tanh(jnp.var(x)),
    "select": lambda x: jnp.select([x > 0.4321, x > -0.2345], [x, 2 * x], 0.1),
    "polynomial": lambda x: jnp.polyval(jnp.array([0.1, -0.3, 0.2], x.dtype), jnp.tanh(x)),
    "cumulative log sum": lambda x: lax.cumlogsumexp(x.reshape(-1)),
    "random bits": lambda x: x * (jax.random.bits(jax.random.key(5), (), jnp.uint8) % 7).astype(x.dtype) / 7,
    "coin": lambda x: x * jax.random.bernoulli(jax.random.key(3), 0.5, x.shape).astype(x.dtype),
    "noise of its own": lambda x: x
    + 0.1 * jax.random.uniform(
        jax.random.fold_in(jax.random.key(1), jnp.floor(4 * jnp.sum(x) + 0.1234).astype(jnp.int32)), (), x.dtype
    ),
    "scan in a cond": lambda x: lax.cond(
        jnp.sum(x) > 0.3456,
        lambda x: lax.scan(lambda c, x: (jnp.tanh(c + x), None), x[0], x)[0],
        lambda x: lax.fori_loop(0, 2, lambda _, c: jnp.sin(c), x[-1]),
        x.reshape(-1),
    ),
    "remat in a scan": lambda x: lax.scan(
        jax.checkpoint(lambda c, x: (jnp.sin(c * x) + x, c)), jnp.ones((), x.dtype), x.reshape(-1)
    )[1],
}  # fmt: skip
TWO = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: jnp.tanh(x) * y,
    "divide": lambda x, y: x / (2 + y * y),
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "where": lambda x, y: jnp.where(x > y + 0.01234, x, y),
    "arctan2": lambda x, y: jnp.arctan2(x, 2 + y * y),
    "power": lambda x, y: (1 + x * x) ** jnp.tanh(y),
    "logaddexp": jnp.logaddexp,
    "hypot": lambda x, y: jnp.sqrt(1 + x * x + y * y),
    "clamp": lambda x, y: jnp.clip(x, y - 0.1234, y + 0.2345),
    "unequal": lambda x, y: ((x > 0.1234) != (y > 0.2345)).astype(x.dtype) * y,
    "concatenate": lambda x, y: jnp.concatenate([x.reshape(-1), y.reshape(-1)]),
    "stack": lambda x, y: jnp.stack([x, y]),
    "outer": lambda x, y: jnp.tanh(jnp.outer(x.reshape(-1)[:4], y.reshape(-1)[:4])),
    "dot": lambda x, y: jnp.tanh(jnp.dot(x.reshape(-1), y.reshape(-1))),
    "matrix and vector": lambda x, y: jnp.tanh(square(x, 3) @ fit(y, (3,))),
    "matrices": lambda x, y: jnp.tanh(square(x, 3) @ square(y, 3)),
    "larger matrices": lambda x, y: jnp.tanh(square(x, 9) @ square(y, 9) / 9),
    "batches": lambda x, y: jnp.tanh(jnp.einsum("bij,bj->bi", fit(x, (2, 2, 3)), fit(y, (2, 3)))),
    "all products": lambda x, y: jnp.tanh(jnp.einsum("ij,kj->ik", fit(x, (9, 2)), fit(y, (8, 2)))),
    "convolution": lambda x, y: jnp.tanh(jnp.convolve(x.reshape(-1), y.reshape(-1)[:3])),
    "write at": lambda x, y: lax.dynamic_update_slice(
        x.reshape(-1), y.reshape(-1)[:1], (jnp.argmax(y) // 2,)
    ),
    "read at": lambda x, y: lax.dynamic_slice(x.reshape(-1), (jnp.argmax(y),), (1,)),
    "cond": lambda x, y: lax.cond(jnp.sum(x) > 0.3456, lambda x, y: x, lambda x, y: x * 2, x, y),
    "sorted by": lambda x, y: lax.sort((fit(x, (4,)), fit(y, (4,))), num_keys=1)[1],
    "average": lambda x, y: jnp.average(fit(x, (4,)), weights=1 + fit(y, (4,)) ** 2),
}


# What no call holds, forwards or backwards.
OUTSIDE = (
    set(
        """argsort cholesky determinant fourier inverse sort top_k gather set random callback checkpoint
    popcount interp average""".split()
    )
    | {"sorted by", *MORE}
    | {
        "add at",
        "gather at",
        "read at",
        "write at",
        "larger matrices",
        "all products",
        "convolution",
    }
)


def random_field(seed, length, outside):
    """A field of so many operations, of one call or of any; y, t and args as they come."""
    kinds = [
        {name: fn for name, fn in table.items() if outside or name not in OUTSIDE}
        for table in (ONE | MORE, TWO)
    ]

    def func(y, t, *args):
        rng = np.random.default_rng([seed, 1])
        leaves = jax.tree.leaves(y)
        dtype = max((jnp.finfo(x.dtype).dtype for x in leaves), key=lambda d: d.itemsize)
        parts = [
            part for x in leaves for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))
        ]
        pool = [x.astype(dtype) for x in parts]
        if rng.random() < 0.7:
            pool.append(jnp.asarray(t, dtype))
        for x in jax.tree.leaves(args):
            if isinstance(x, str) or rng.random() < 0.3:
                continue  # unused
            if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
                pool.append(jax.random.uniform(x, (2,), dtype))
            else:
                pool.append(jnp.asarray(x).real.astype(dtype))
        constant = jnp.asarray(rng.normal(size=rng.choice([1, 3, 6])), dtype)
        pool.append(constant)
        pool = [x for x in pool if x.size] or [constant]
        for _ in range(length):
            x = pick(rng, pool)
            if rng.random() < 0.6:
                new = any_of(rng, kinds[0])(x)
            else:
                new = any_of(rng, kinds[1])(x, fit(pick(rng, pool), x.shape))
            new = jnp.asarray(new, dtype)
            pool.append(fit(new, (LONG,)) if new.size > LONG else new)
        result = [derivative(x, pick(rng, pool), pick(rng, pool)) for x in leaves]
        return jax.tree.unflatten(jax.tree.structure(y), result)

    return func


def any_of(rng, table):
    return list(table.values())[rng.integers(len(table))]


def pick(rng, pool):
    """One of the pool; the last ones more often."""
    n = len(pool)
    return pool[min(n - 1, int(n * rng.random() ** 0.5))]


def derivative(y, a, b):
    """A bounded derivative of a part of the state, made of two arrays."""
    if jnp.iscomplexobj(y):
        k = jnp.tanh(fit(a, y.shape)) + 1j * jnp.tanh(fit(b, y.shape))
        return k.astype(y.dtype) / 2 - 0.3 * y
    k = jnp.tanh(fit(a, y.shape)) + 0.5 * jnp.tanh(fit(b, y.shape))
    return k.astype(y.dtype) / 2 - 0.3 * y


def random_state(rng, dtype):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    pair = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return [
        lambda: draw(3),
        lambda: draw(),
        lambda: draw(2, 3),
        lambda: draw(1),
        lambda: (draw(), draw(2)),
        lambda: {"a": draw(2), "b": draw(0), "c": draw(1, 2)},
        lambda: draw(2).astype(pair),
        lambda: (draw(2), draw(1).astype(pair)),
        lambda: (draw(2), jnp.asarray(rng.normal(size=2), jnp.float32)),
        lambda: draw(40),
    ][rng.integers(10)]()


def random_args(rng, dtype):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    kinds = [
        lambda: draw(),
        lambda: draw(3),
        lambda: draw(0),
        lambda: draw(2, 0),
        lambda: float(rng.normal()),
        lambda: int(rng.integers(5)),
        lambda: bool(rng.integers(2)),
        lambda: jnp.asarray(rng.integers(5, size=3)),
        lambda: jnp.asarray(rng.integers(5, size=()), jnp.int8),
        lambda: jnp.asarray(rng.integers(2, size=2), bool),
        lambda: np.asarray(rng.normal(size=2)),
        lambda: draw(600),
        lambda: draw(2).astype(jnp.complex64),
        lambda: {"w": draw(3, 3), "b": (draw(3), None)},
        lambda: jax.random.key(3),
        lambda: "a string",
    ]
    return tuple(kinds[rng.integers(len(kinds))]() for _ in range(rng.integers(4)))


def random_case(seed):
    """A solve: the field, its arguments and options, and what is to be done with it."""
    rng = np.random.default_rng([seed, 0])
    dtype = jnp.float64 if rng.random() < 0.7 else jnp.float32
    y0, args = random_state(rng, dtype), random_args(rng, dtype)
    count = int(rng.choice([2, 2, 3, 6]))
    t = np.sort(rng.uniform(-1, 1, count))
    if count == 6 and rng.random() < 0.5:
        t[2] = t[1]
    adjoint = str(rng.choice(["replay", "replay", "replay", "backsolve", "direct"]))
    options = dict(
        method=str(rng.choice(["euler", "heun", "bosh3", "rk4", "tsit5"])), adjoint=adjoint
    )
    adaptive = rng.random() < 0.25 and options["method"] not in ("euler", "rk4")
    if not adaptive:
        options["dt"] = float(rng.choice([0.21, 0.43]))
    elif rng.random() < 0.3:
        options["mxstep"] = 500
    return dict(
        func=random_field(seed, int(rng.integers(1, 9)), bool(rng.random() < 0.3)),
        y0=y0,
        args=args,
        t=jnp.asarray(t if rng.random() < 0.8 else t[::-1], dtype),
        options=options,
        gradient=bool(rng.random() < 0.65),
        lanes=int(rng.choice([0, 0, 0, 3, 20])),
        shared=bool(rng.random() < 0.5),
        loss=str(rng.choice(["all", "last", "one leaf", "nothing"], p=[0.5, 0.2, 0.2, 0.1])),
        of=str(rng.choice(["y0", "y0 t", "y0 args", "y0 t args", "args"])),
    )
