"""A function is traced once for all calls in which it reads the same, and again as soon as it does not."""

import functools
import random
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve, traced_once
from jaxode.kernels import traces

Y0, TS = np.array([1.0, 2.0]), np.array([0.0, 1.0])
RATE = 1.0
TABLE = np.array([1.0])
LARGE = np.ones(2**14)
WEIGHT = jnp.array(1.0)
HELD = {"rate": 1.0}
MODULE = types.ModuleType("of_the_user")
MODULE.rate = 1.0


class Rates:
    rate = 1.0


def helper(y):
    return -RATE * y


@jax.jit
def jitted(y):
    return -WEIGHT * y


def reads_by_attribute(y, t):
    return -reads_by_attribute.rate * y


def has_default(y, t, *, rate=1.0):
    return -rate * y


def from_outside():
    """A function with a number in a cell, and how that is changed."""
    rate = 1.0

    def func(y, t):
        return -rate * y

    def change(to):
        nonlocal rate
        rate = to

    return func, change


class Named:
    """An object that calls itself a function of JAX."""

    def __init__(self):
        functools.update_wrapper(self, jnp.sin)
        self.rate = 1.0

    def __call__(self, y):
        return self.rate * y


class Raises:
    """An object that cannot be looked at."""

    __slots__ = ()

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __call__(self, y):
        return RATE * y


class Masked(np.ndarray):
    rate = 1.0


NAMED, MASKED = Named(), np.ones(1).view(Masked)
FROM_PYTHON = np.frompyfunc(lambda x: -RATE * x, 1, 1)
FIELDS = np.array([(1.0, 2.0)], [("a", float), ("b", float)])


@functools.wraps(jnp.sin)
def as_sin(y):
    return RATE * y


def calls(function):
    """Of an object in a cell, at which pytest does not look."""
    return lambda y, t: -function(y)


def set_rate_of(thing):
    return lambda to: setattr(thing, "rate", to)


def rename(to):
    FIELDS.dtype.names = ("a", "b") if to == 1 else ("b", "a")


def set_global(name):
    return lambda to: globals().__setitem__(name, to)


def set_default(to):
    has_default.__kwdefaults__["rate"] = to


reads_by_attribute.rate = 1.0
EIGEN, change_cell = from_outside()
# What a function reads, and how it is made another number.
READS = {
    "a global": (lambda y, t: -RATE * y, set_global("RATE")),
    "a global of a function that it calls": (lambda y, t: helper(y), set_global("RATE")),
    "a global of a function inside of it": (lambda y, t: (lambda x: -RATE * x)(y), set_global("RATE")),
    "a cell": (EIGEN, change_cell),
    "a default": (has_default, set_default),
    "an array of NumPy": (lambda y, t: -TABLE[0] * y, lambda to: TABLE.__setitem__(0, to)),
    "a large one": (lambda y, t: -LARGE[0] * y, lambda to: LARGE.__setitem__(0, to)),
    "an array of JAX": (lambda y, t: -WEIGHT * y, lambda to: set_global("WEIGHT")(jnp.array(to))),
    "a dict": (lambda y, t: -HELD["rate"] * y, lambda to: HELD.__setitem__("rate", to)),
    "a module": (lambda y, t: -MODULE.rate * y, set_rate_of(MODULE)),
    "a class": (lambda y, t: -Rates.rate * y, set_rate_of(Rates)),
    "an attribute of itself": (reads_by_attribute, set_rate_of(reads_by_attribute)),
    "a partial": (functools.partial(lambda y, t, k: -k * RATE * y, k=1.0), set_global("RATE")),
    "an object with the name of a function of JAX": (calls(NAMED), set_rate_of(NAMED)),
    "an object that raises": (calls(Raises()), set_global("RATE")),
    "a function with the name of one of JAX": (calls(as_sin), set_global("RATE")),
    "an array of a class of the user's": (lambda y, t: -MASKED.rate * y, set_rate_of(Masked)),
    "an array with fields": (lambda y, t: -FIELDS["a"][0] * y, rename),
    "a function as one of NumPy": (lambda y, t: y * float(FROM_PYTHON(1.0)), set_global("RATE")),
    "by another name": (lambda y, t: -globals()["RATE"] * y, set_global("RATE")),
    "a vmapped function": (lambda y, t: jax.vmap(helper)(y), set_global("RATE")),
}  # fmt: skip


@pytest.mark.parametrize("what", READS)
def test_what_a_function_reads_is_read_in_every_call(what):
    func, change = READS[what]
    for rate in (1.0, 2.0, 2.0, 1.0):
        change(rate)
        found = odeint(func, Y0, TS)[-1]
        np.testing.assert_allclose(found, Y0 * np.exp(-rate), rtol=1e-6, err_msg=f"{rate}")


def test_numbers_that_are_equal_and_not_the_same_are_told_apart():
    def dtype_of(number):
        func = lambda y, t: jnp.full_like(y, jnp.asarray(number).dtype == jnp.int64)
        return float(odeint(func, Y0, TS)[-1, 0])

    assert [round(dtype_of(x)) for x in (1, 1.0, True, 1)] == [2, 1, 1, 2]
    side = lambda zero: float(odeint(lambda y, t: jnp.copysign(y * 0 + 1, zero), Y0, TS)[-1, 0])
    assert [round(side(x)) for x in (0.0, -0.0, 0.0)] == [2, 0, 2]


def of_table(table):
    return lambda y, t: -table[0] * y


def of_host(rate):
    """A function on the host that reads a cell, and how that is changed."""

    def host(y):
        return np.asarray(-rate * y)

    def change(to):
        nonlocal rate
        rate = to

    return lambda y, t: jax.pure_callback(host, jax.ShapeDtypeStruct(y.shape, y.dtype), y), change


def test_two_functions_that_read_the_same_may_part():
    """What was kept of the first is not that of the second for another shape, or when it runs."""
    first, second = np.array([1.0]), np.array([1.0])
    odeint(of_table(first), Y0, TS)
    first[0] = 5.0
    end = odeint(of_table(second), np.ones(3), TS)[-1]
    np.testing.assert_allclose(end, np.exp(-1.0), rtol=1e-6)
    (one, change), (other, _) = of_host(1.0), of_host(1.0)
    odeint(one, Y0, TS)
    change(5.0)
    np.testing.assert_allclose(odeint(other, Y0, TS)[-1], Y0 * np.exp(-1.0), rtol=1e-6)


def test_a_function_that_writes_what_it_reads_writes_in_every_call():
    flag, count = True, np.zeros(1)

    def toggles(y, t):
        nonlocal flag
        rate, flag = 1.0 if flag else 2.0, not flag
        return -rate * y

    def counts(y, t):
        count[0] += 1
        return -y

    ends = [float(odeint(toggles, Y0, TS)[-1, 0]) for _ in range(4)]
    np.testing.assert_allclose(ends, 2 * [np.exp(-1.0), np.exp(-2.0)], rtol=1e-6)
    for _ in range(3):
        count[0] = 0.0
        odeint(counts, Y0, TS)
        assert count[0] == 1


def test_what_is_said_of_a_function_is_said_in_every_call():
    coarse = lambda y, t: -y.astype(jnp.float32)
    for _ in range(3):
        with pytest.warns(UserWarning, match="only as accurate as func"):
            odeint(coarse, Y0, TS)


def test_what_reads_much_is_traced_in_every_call_and_not_kept(made):
    for much in (tuple(map(float, range(2000))), b"0" * 2**17, jnp.ones(2**14)):
        for _ in range(2):
            odeint(lambda y, t, much=much: -y * float(len(much) > 0), Y0, TS)
    assert len(made) == 6 and traced_once.of_key.cache_info().currsize == 0


def test_keys_of_dicts_are_told_apart_too():
    func = lambda y, t: {k: -(2.0 if isinstance(k, float) else 1.0) * x for k, x in y.items()}
    for key, rate in ((1, 1.0), (1.0, 2.0), (1, 1.0)):
        np.testing.assert_allclose(
            odeint(func, {key: Y0}, TS)[key][-1], Y0 * np.exp(-rate), rtol=1e-6
        )


def test_a_file_is_read_in_every_call(tmp_path):
    path = tmp_path / "rate.npy"
    for rate in (1.0, 2.0):
        np.save(path, rate)
        end = odeint(lambda y, t: -float(np.load(str(path))) * y, Y0, TS)[-1]
        np.testing.assert_allclose(end, Y0 * np.exp(-rate), rtol=1e-6)


def test_a_function_that_calls_what_has_a_state_is_traced_in_every_call():
    calls = []

    def counted(y, t):
        calls.append(1)
        return -y

    drawn = {
        "numpy": lambda y, t: 0 * y + np.random.normal(),
        "python": lambda y, t: 0 * y + random.random(),
    }
    for _ in range(3):
        odeint(counted, Y0, TS)
    assert len(calls) == 3
    for func in drawn.values():
        ends = {float(odeint(func, Y0, TS)[-1, 0]) for _ in range(3)}
        assert len(ends) == 3


@pytest.fixture
def made(monkeypatch):
    """The traces that have been made."""
    found, init = [], traces.Trace.__init__

    def counted(trace, *args):
        found.append(trace)
        return init(trace, *args)

    monkeypatch.setattr(traces.Trace, "__init__", counted)
    traced_once.of_key.cache_clear()
    return found


AGAIN = {
    "a function": lambda: helper_in_time,
    "a new lambda": lambda: lambda y, t: -RATE * y,
    "one that closes over a number": lambda: closing_over(3.0),
    "one that closes over an array": lambda: closing_over(WEIGHT),
    "relu and a matrix": lambda: lambda y, t: jax.nn.relu(jnp.eye(2, dtype=y.dtype) @ y) - y,
    "in jit": lambda: jit_in_time,
    "a partial": lambda: functools.partial(closing_over(1.0)),
}


def helper_in_time(y, t):
    return helper(y) * jnp.cos(t).astype(y.dtype)


def closing_over(rate):
    return lambda y, t: -rate * y


@jax.jit
def jit_in_time(y, t):
    return jitted(y)


@pytest.mark.parametrize("what", AGAIN)
def test_a_function_that_reads_the_same_is_traced_once(what, made, dtype):
    y0 = Y0.astype(dtype)
    ts = TS.astype(dtype)
    for i in range(3):
        first = odeint(AGAIN[what](), y0 + i, ts, rtol=1e-4)
        assert len(made) == 1 and first.dtype == dtype
    odeint(AGAIN[what](), y0.astype("complex64" if dtype == "float32" else "complex128"), ts)
    assert len(made) == 2


def test_what_a_solve_keeps_is_traced_once_too(made):
    for _ in range(3):
        sol = solve(lambda y, t: -y, Y0, TS, save=lambda y, t: jnp.sum(y))
    assert len(made) == 2 + 3  # of func, of `save`, and in each call of what `save` needs
    np.testing.assert_allclose(sol.ys[-1], Y0.sum() * np.exp(-1), rtol=1e-6)


def test_promotion_and_precision_that_are_set_for_a_while_count():
    func = lambda y, t: -y * jnp.ones(2, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        odeint(func, Y0, TS)
    with pytest.raises(ValueError, match="promotion"):
        odeint(func, Y0, TS)
    matrix = lambda y, t: -jnp.eye(2) @ y
    text = lambda: jax.jit(lambda y: odeint(matrix, y, TS)).lower(Y0).as_text()
    plain = text()
    with jax.default_matmul_precision("highest"):
        precise = text()
    assert plain != precise


def test_values_under_a_transformation_are_no_constants():
    scaled = lambda a: odeint(lambda y, t: -a * y, Y0, TS)[-1, 0]
    for _ in range(2):
        np.testing.assert_allclose(jax.grad(scaled)(1.0), -np.exp(-1.0), rtol=1e-6)
        np.testing.assert_allclose(
            jax.vmap(scaled)(np.arange(3.0)), np.exp(-np.arange(3.0)), rtol=1e-6
        )


def test_methods_of_a_state_and_modules_may_read_anything():
    class Scaled(eqx.Module):
        x: jax.Array

        def slope(self):
            return Scaled(-RATE * self.x)

    class Field(eqx.Module):
        def __call__(self, y, t):
            return -RATE * y

    for rate in (1.0, 2.0):
        set_global("RATE")(rate)
        for func, y0 in ((lambda y, t: y.slope(), Scaled(Y0)), (Field(), Y0)):
            end = jax.tree.leaves(odeint(func, y0, TS))[0][-1]
            np.testing.assert_allclose(end, Y0 * np.exp(-rate), rtol=1e-6)
    set_global("RATE")(1.0)


def test_keys_of_random_numbers_and_recursion_are_read():
    key = jax.random.key(0)
    noise = lambda y, t: -y + jax.random.uniform(key)
    assert np.all(odeint(noise, Y0, TS)[-1] == odeint(noise, Y0, TS)[-1])

    def power(y, n):
        return y if n == 0 else 0.5 * power(y, n - 1)

    func = lambda y, t: -power(y, 2)
    for _ in range(2):
        np.testing.assert_allclose(odeint(func, Y0, TS)[-1], Y0 * np.exp(-0.25), rtol=1e-6)


def test_functions_that_all_know_each_other_are_gone_through_once():
    """Every way from one to another would be more than there are atoms."""
    code = "def f{i}(y, n):\n    return " + " + ".join(f"f{i}(y, n - 1)" for i in range(50))
    known = {}
    for i in range(50):
        exec(code.format(i=i) + " if n else y", known)
    known["rate"] = 1.0
    func = eval("lambda y, t: -rate * f0(y, 0)", known)
    for rate in (1.0, 2.0):
        known["rate"] = rate
        np.testing.assert_allclose(odeint(func, Y0, TS)[-1], Y0 * np.exp(-rate), rtol=1e-6)
