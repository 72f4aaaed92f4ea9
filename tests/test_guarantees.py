"""What is promised of many calls: what compiles again, that memory does not grow, that threads may solve at
once."""

import gc
import importlib
import pkgutil
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode import Controller, Event, Signal, SolveError, odeint, solve
from jaxode.methods import Banded, Krylov, Sparse

GUIDE = Path(__file__).parent.parent / "notebooks" / "README.md"
TS = np.linspace(0.0, 1.0, 4)
TWO = np.array([1.0, 2.0])


def decay(y, t, rate=1.0):
    return -rate * y


def power(y, t, n):
    return -(y**n)


def network(y, t, mlp):
    return mlp(y)


def closing_over(rate):
    return lambda y, t: -rate * y


def mlp(seed):
    return eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(seed))


def gradient(**options):
    """The gradient of a sum over a solution, by a lambda that is new each time."""
    return jax.grad(
        lambda y0, a: odeint(lambda y, t, a: -a * y, y0, TS, a, **options).sum(), (0, 1)
    )


def end_of(func, y0, t, *args, **options):
    """Whether a solve failed, and why."""
    try:
        return odeint(func, y0, t, *args, **options)
    except SolveError as error:
        return str(error)


# What compiles again. Each case is a call that is made twice: `new` says that it is the second time.

AGAIN = {
    "other values of y0, t, args, tolerances, `hmax`, `mxstep`, `mass`, signals and events; the "
    "direction of t": {
        "y0 and args": lambda new: partial(odeint, decay, (1 + new) * TWO, TS, 1.0 + new),
        "times": lambda new: partial(odeint, decay, TWO, (1 + new) * TS),
        "direction": lambda new: partial(odeint, decay, TWO, TS[::-1] if new else TS),
        "tolerances": lambda new: partial(odeint, decay, TWO, TS, rtol=(1 + new) * 1e-5, atol=1e-6),
        "tolerances or none": lambda new: partial(odeint, decay, TWO, TS, **({"rtol": 1e-3} if new else {})),
        "an array of tolerance": lambda new: partial(
            odeint, decay, TWO, TS, rtol=jnp.asarray(1e-4) if new else 1e-3
        ),
        "hmax or none": lambda new: partial(odeint, decay, TWO, TS, hmax=0.1 if new else np.inf),
        "mxstep": lambda new: partial(odeint, decay, TWO, TS, mxstep=500 + new),
        "mass": lambda new: partial(odeint, decay, TWO, TS, method="rodas5p", mass=(1 + new) * TWO),
        "as many steps": lambda new: partial(odeint, decay, TWO, (1 + new) * TS, dt=0.1 * (1 + new)),
        "a signal": lambda new: partial(
            odeint, lambda y, t, u: u(t) - y, TWO, TS, Signal([0.0, 0.5 + new], [0.0, 1.0 + new])
        ),
        "an event": lambda new: partial(
            solve, decay, TWO, TS, events=[Event(times=[0.3 + new / 10], values=[1.0 + new],
            change=lambda y, t, v: y + v)]
        ),
        "a batch": lambda new: partial(jax.vmap(lambda y: odeint(decay, y, TS)), np.ones((3, 2)) + new),
    },
    "arrays of NumPy for those of JAX, or lists": {
        "y0": lambda new: partial(odeint, decay, TWO if new else jnp.asarray(TWO), TS),
        "a number": lambda new: partial(odeint, decay, jnp.asarray(1.0) if new else 1.0, TS),
        "times of JAX": lambda new: partial(odeint, decay, TWO, jnp.asarray(TS) if new else TS),
        "a list of times": lambda new: partial(odeint, decay, TWO, TS.tolist() if new else TS),
    },
    "another function of the same operations, as a lambda in each call: with other arrays that it closes "
    "over, holds (a module) or has from `functools.partial`": {
        "a lambda": lambda new: partial(odeint, lambda y, t: -y * t, TWO, TS),
        "an array": lambda new: partial(odeint, closing_over(jnp.asarray(1.5 + new)), TWO, TS),
        "an array of NumPy": lambda new: partial(odeint, closing_over((1.5 + new) * TWO), TWO, TS),
        "a module": lambda new: partial(odeint, network, TWO, TS, mlp(new)),
        "a module closed over": lambda new: partial(odeint, partial(network, mlp=mlp(new)), TWO, TS),
        "partial": lambda new: partial(odeint, partial(decay, rate=(1.5 + new) * TWO), TWO, TS),
        "functions beside": lambda new: partial(
            solve, decay, TWO, TS, save=lambda y, t: y[0], events=[Event(lambda y, t: y[0] - 0.5)],
            fold=(0.0, lambda m, y, t: m + y[0]),
        ),
        "a controller": lambda new: partial(odeint, decay, TWO, TS, controller=Controller(0.3)),
        "a structure": lambda new: partial(odeint, decay, TWO, TS, method="rodas5p", linear=Banded(0, 0)),
        "a gradient": lambda new: partial(gradient(), TWO, 1.0 + new),
        "a gradient of many": lambda new: partial(
            jax.vmap(gradient(), (0, None)), np.ones((3, 2)), 1.0 + new
        ),
        "a failure": lambda new: partial(end_of, lambda y, t, a: a * y**2, TWO, 9 * TS, 1.0 + new),
        "a stiff failure": lambda new: partial(
            end_of, lambda y, t, a: -a * (y - jnp.cos(t)), TWO, TS, 1e6 + new, max_steps=100
        ),
        "a failed gradient": lambda new: partial(
            jax.grad(lambda y: odeint(lambda y, t: y**2, y, 9 * TS).sum()), TWO + new
        ),
    },
    "other shapes, dtypes or structures; another length of t": {
        "length of t": lambda new: partial(odeint, decay, TWO, TS[new:]),
        "shape": lambda new: partial(odeint, decay, np.ones(2 + new), TS),
        "dtype": lambda new: partial(odeint, decay, TWO.astype("float32") if new else TWO, TS),
        "size of a batch": lambda new: partial(
            jax.vmap(lambda y: odeint(decay, y, TS)), np.ones((3 + new, 2))
        ),
    },
    "another `method`, `adjoint`, `controller` or `max_steps`; a `dt` that makes another number of steps": {
        "method": lambda new: partial(odeint, decay, TWO, TS, method="bosh3" if new else "tsit5"),
        "adjoint": lambda new: partial(gradient(adjoint="direct" if new else "replay", max_steps=64), TWO, 1.0),
        "controller": lambda new: partial(odeint, decay, TWO, TS, controller=Controller(0.3 + new / 10)),
        "max_steps": lambda new: partial(odeint, decay, TWO, TS, max_steps=1000 + new),
        "dt": lambda new: partial(odeint, decay, TWO, TS, dt=0.1 / (1 + new)),
    },
    "another Python number that func closes over or has from `functools.partial`, another int, bool or "
    "string among the args": {
        "closed over": lambda new: partial(odeint, closing_over(1.5 + new), TWO, TS),
        "partial": lambda new: partial(odeint, partial(decay, rate=1.5 + new), TWO, TS),
        "an int": lambda new: partial(odeint, power, TWO, TS, 1 + new),
    },
    "an array, or a number of NumPy, for a Python float among the args": {
        "an array": lambda new: partial(odeint, decay, TWO, TS, jnp.ones(()) if new else 1.0),
        "NumPy": lambda new: partial(odeint, decay, TWO, TS, np.float64(1.0) if new else 1.0),
    },
}  # fmt: skip
CASES = [(row, name) for row, cases in AGAIN.items() for name in cases]
CONVERSIONS = ("convert_element_type", "stage", "broadcast_in_dim")  # of inputs to arrays
compiled: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def compilations_are_noted():
    def note(event, _, **of):
        name = of.get("fun_name", "")
        if "backend_compile" in event and not any(known in name for known in CONVERSIONS):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)


def answers():
    """What the guide says of each row of the table."""
    table = GUIDE.read_text().split("<!-- compiles -->")[1].split("<!-- /compiles -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return {what: answer for what, answer in rows}


def test_the_table_of_what_compiles_again_is_the_one_that_is_tried():
    assert list(answers()) == list(AGAIN)


@pytest.mark.parametrize("row, name", CASES, ids=[name for _, name in CASES])
def test_what_compiles_again_is_what_the_table_says(row, name):
    jax.clear_caches()
    case = AGAIN[row][name]
    jax.block_until_ready(case(0)())
    second = case(1)
    compiled.clear()
    jax.block_until_ready(second())
    assert bool(compiled) == answers()[row].startswith("yes"), compiled


# Memory.


def a_call(i):
    odeint(lambda y, t, a: -a * y, TWO, TS, 1.0 + i)


def a_module(i):
    odeint(network, TWO, TS, MLPS[i % 2])


def a_closure(i):
    odeint(closing_over(jnp.asarray(1.0 + i)), TWO, TS)


def a_gradient(i):
    jax.grad(lambda a: odeint(lambda y, t, a: -a * y, TWO, TS, a).sum())(1.0 + i)


def a_batch(i):
    jax.vmap(gradient(), (0, None))(np.ones((3, 2)), 1.0 + i)


def a_failure(i):
    with pytest.raises(SolveError, match="It looks stiff"):
        odeint(lambda y, t, a: -a * (y - jnp.cos(t)), TWO, TS, 1e6 + i, max_steps=50)


def a_refusal(i):
    with pytest.raises(TypeError, match="shape"):
        odeint(lambda y, t: y[:1], TWO + i, TS)


def a_failed_gradient(i):
    gradients = jax.grad(lambda y: odeint(lambda y, t: y**2, y, 9 * TS, max_steps=50).sum())
    assert np.all(np.isnan(gradients(TWO + i)))


def a_structure(i):
    odeint(decay, TWO, TS, 1.0 + i, method="rodas5p", linear=Banded(0, 0))


MLPS = [mlp(seed) for seed in range(2)]
CALLS = [
    a_call, a_module, a_closure, a_gradient, a_batch, a_failure, a_refusal, a_failed_gradient, a_structure,
]  # fmt: skip
# How many entries each cache of the library may have; programs that are compiled are in those of JAX.
ONE_FOR_EACH_SET_OF_ARGUMENTS = None
CACHES = {
    "adjoints.backsolve.backsolve": ONE_FOR_EACH_SET_OF_ARGUMENTS,
    "adjoints.reversible.reversible": ONE_FOR_EACH_SET_OF_ARGUMENTS,
    "methods.explicit.radius": 128,
    "methods.sparse.stages_of": 16,
    "data.shuffled": 8,
    "kernels.numbers.keeps_order": 1,
    "kernels.traces.text_of": 4096,
    "traced_once.of_key": 32,
    "traced_once.names_in": 1024,
    "words.about_class": 1000,
}


def attributes():
    """(module.name, value) of all that is at the top of a module of the library."""
    for _, name, _ in pkgutil.walk_packages(jaxode.__path__, "jaxode."):
        if not name.startswith("jaxode.experiments"):
            for key, value in vars(importlib.import_module(name)).items():
                if getattr(value, "__module__", name) == name and not key.startswith("__"):
                    yield f"{name.removeprefix('jaxode.')}.{key}", value


def sizes() -> dict[str, int]:
    """How many entries each cache has, and each collection that can change."""
    found = {}
    for name, value in attributes():
        if hasattr(value, "cache_info"):
            found[name] = value.cache_info().currsize
        elif hasattr(value, "_cache_size"):
            found[name] = value._cache_size()
        elif isinstance(value, dict | set | list):
            found[name] = len(value)
    return found


def test_each_cache_of_the_library_has_its_bound():
    found = {
        name: value.cache_parameters()["maxsize"]
        for name, value in attributes()
        if hasattr(value, "cache_info")
    }
    assert found == CACHES


@pytest.mark.parametrize("call", CALLS)
def test_many_calls_keep_no_arrays_alive_and_fill_no_cache(call):
    # Each function that is kept may hold an array that it closes over.
    for i in range(CACHES["traced_once.of_key"] + 3):
        call(i)
    gc.collect()
    alive, full = len(jax.live_arrays()), sizes()
    for i in range(50):
        call(i)
    assert len(jax.live_arrays()) <= alive
    assert sizes() == full


# Threads.


def works(rate):
    """Pieces of work by name: what is found, and what it should be."""
    end, gradient = TWO * np.exp(-rate), -3 * np.exp(-rate)
    scaled = lambda y, t, a: -a * y
    last = lambda a, y0=TWO, **options: odeint(scaled, y0, TS, a, **options)[-1]
    many = np.stack([TWO, 2 * TWO])
    return {
        "a solve": lambda: (last(rate), end),
        "in a program": lambda: (jax.jit(last)(rate), end),
        "a gradient": lambda: (jax.grad(lambda a: last(a).sum())(rate), gradient),
        "a batch": lambda: (jax.vmap(last, (None, 0))(rate, many), np.stack([end, 2 * end])),
        "a stiff solve": lambda: (last(rate, method="rodas5p", linear=Banded(0, 0)), end),
        "a number closed over": lambda: (odeint(closing_over(rate), TWO, TS)[-1], end),
    }


def test_threads_solve_at_the_same_time_equal_and_different_problems():
    jax.clear_caches()  # the first calls, too, come together
    count = 4
    barrier = threading.Barrier(count)

    def thread(place):
        """All of the work, of which each thread begins with another piece."""
        barrier.wait()
        names = list(works(1.0))
        for _ in range(2):
            for name in names[place:] + names[:place]:
                for rate in (1.0, 1.0 + place / 10):
                    found, right = works(rate)[name]()
                    np.testing.assert_allclose(found, right, rtol=1e-6, err_msg=name)
        return place

    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(thread, range(count))) == list(range(count))


# The precision of matrix products.


def multiplied_precisely(fn, *args, precision=None):
    """Each precision of a product in the program of a function for a TPU; it is lowered, and so its parts are
    traced, after the block that asks for a precision."""
    with jax.default_matmul_precision(precision):
        traced = jax.jit(fn).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r"stablehlo\.(?:dot_general|convolution).*?precision = \[(\w+), ", text)
    assert len(found) == text.count("stablehlo.dot_general") + text.count("stablehlo.convolution")
    return set(found)


@jax.custom_vjp
def times(a, y):
    return jnp.sin(a @ y)


def times_back(given, k_bar):
    a, y = given
    x_bar = k_bar * jnp.cos(a @ y)
    return jnp.outer(x_bar, y), a.T @ x_bar


times.defvjp(lambda a, y: (times(a, y), (a, y)), times_back)


@jax.custom_jvp
def pushed_times(a, y):
    return jnp.sin(a @ y)


@pushed_times.defjvp
def pushed_times_jvp(primals, tangents):
    (a, y), (a_dot, y_dot) = primals, tangents
    return pushed_times(a, y), jnp.cos(a @ y) * (a_dot @ y + a @ y_dot)


ADJOINTS = ("replay", "backsolve", "reversible", "direct", "forward")
METHODS = {
    **{f"tsit5, {adjoint}": dict(adjoint=adjoint) for adjoint in ADJOINTS},
    "rodas5p": dict(method="rodas5p"),
    "kvaerno3": dict(method="kvaerno3"),
    "kvaerno3, Krylov": dict(method="kvaerno3", linear=Krylov()),
    "rodas4, blocks": dict(method="rodas4", linear=Sparse(np.tri(70, 70, 9) - np.tri(70, 70, -9) > 0)),
    "gauss4": dict(method="gauss4", dt=0.1),
}  # fmt: skip


def gradient_of(func, adjoint="replay", batched=False, **options):
    """The gradient in y0 and a, of one solve or of three."""
    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    given = dict(adjoint=adjoint, max_steps=16, **options)
    of_one = derivative(lambda y, a: odeint(func, y, [0.0, 0.5, 1.0], a, **given)[1:].sum(), (0, 1))
    return jax.vmap(of_one, (0, None)) if batched else of_one


@pytest.mark.parametrize("name", METHODS)
def test_products_of_the_library_are_exact_whatever_the_precision_of_products_is(name):
    for batched in (False, True) if "replay" in name or "blocks" in name else (False,):
        gradients = gradient_of(lambda y, t, a: -a * y, batched=batched, **METHODS[name])
        y0 = np.ones((3, 70) if batched else 70, "float32")
        assert multiplied_precisely(gradients, y0, np.float32(1)) <= {"HIGHEST"}


@pytest.mark.parametrize(
    "name, function",
    [
        *((f"tsit5, {adjoint}", times) for adjoint in ADJOINTS[:4]),
        ("tsit5, forward", pushed_times),
        ("rodas5p", pushed_times),
        ("tsit5, replay", jnp.matmul),
    ],
)
def test_products_of_func_have_the_precision_that_is_asked_for_where_solve_is_called(
    name, function
):
    gradients = gradient_of(lambda y, t, a: -function(a, y), **METHODS[name])
    given = np.ones(70, "float32"), np.eye(70, dtype="float32")
    found = multiplied_precisely(gradients, *given, precision="high")
    assert "HIGH" in found
    assert found <= {"HIGH", "HIGHEST"}


def test_products_of_func_are_those_of_jax_by_default():
    gradients = gradient_of(lambda y, t, a: -times(a, y))
    given = np.ones(70, "float32"), np.eye(70, dtype="float32")
    assert "DEFAULT" in multiplied_precisely(gradients, *given)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve", "reversible"])
def test_a_backward_pass_has_the_precision_of_its_forward_pass(adjoint):
    def gradients(y0, a):
        options = dict(adjoint=adjoint, max_steps=16)
        with jax.default_matmul_precision("high"):
            ys, pull = jax.vjp(
                lambda *x: odeint(lambda y, t, a: -times(a, y), x[0], TS, x[1], **options), y0, a
            )
        return pull(ys)

    given = np.ones(70, "float32"), np.eye(70, dtype="float32")
    assert multiplied_precisely(gradients, *given) <= {"HIGH", "HIGHEST"}
