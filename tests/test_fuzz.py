"""Random solves against exact answers, symmetries and promises: a few hundred cases of `python -m bench.soak`.

What is compiled is in the tables below; the numbers of each are drawn by hypothesis, many cases a call.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_options import attempt
from random_problems import PROBLEMS, TIMES, draw_numbers, exponential
from random_programs import Program, Structure
from random_stacks import Stack
from random_symmetries import Breaks, Symmetries

randoms = st.randoms(use_true_random=False)


def batches(count):
    """So many examples, the same in every run; each is a batch of cases."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        phases=[Phase.explicit, Phase.generate],  # what is wrong with a batch is said case by case
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip


PROGRAMS = {
    "a gradient of a sum over a batch": Structure(stack=Stack("grad", summed=True)),
    "a gradient under vmap, in few numbers": Structure(
        "kepler", which=("rate",), stack=Stack("grad", ("checkpoint",)), batch=40
    ),
    "weights that a batch shares": Structure(
        "manufactured", form="tree", stack=Stack("grad", summed=True), shared=True, which=("u0", "q")
    ),
    "backsolve in a scan over cases": Structure(
        "kepler", "complex", method="dopri5", adjoint="backsolve", stack=Stack("grad", over="scan")
    ),
    "a Hessian in a branch": Structure(
        "logistic", method="bosh3", which=("u0", "rate"), stack=Stack("hessian", ("cond",))
    ),
    "tangents of dense output": Structure(
        "quadrature", "pair", "float32", "bosh3", "direct", "dense", stack=Stack("jvp", over="map")
    ),
    "every step, in forward mode": Structure(
        "rotation", "complex", method="tsit5", adjoint="forward", kept="save_steps",
        stack=Stack("jacfwd", ("scan",), over="shard_map"),
    ),
    "a stiff problem": Structure(
        "stiff", "tree", method="rodas5p", which=("u0", "q"), stack=Stack("jacrev")
    ),
    "an event whose time moves": Structure(
        "impulse", "pair", method="bosh3", adjoint="forward", stack=Stack("jvp", over="map")
    ),
    "a pair of functions": Structure(
        "linear", "mixed", method="kencarp3", kept="fold", pair=True, stack=Stack("grad", ("custom_vjp",))
    ),
    "a symplectic method": Structure(
        "rotation", "pair", method="leapfrog", which=("u0", "t"), stack=Stack("grad", over="map of batches")
    ),
    "half precision": Structure("manufactured", "tree", "float16", "heun", kept="save"),
    "a solve that goes on": Structure("logistic", "matrix", "float32", "tsit5", kept="resumed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_solves_and_their_derivatives_are_right_under_any_transformations(name):
    program = Program(PROGRAMS[name])

    @batches(8)
    @given(rng=randoms)
    def check(rng):
        assert not program.failures(program.draw(rng))

    check()


SYMMETRIC = {
    "explicit": Structure("linear", "complex", which=()),
    "implicit": Structure("logistic", "tree", "float32", "rodas4", which=()),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_other_units_directions_orders_and_parts_change_no_bit(name):
    program = Symmetries(SYMMETRIC[name])

    @batches(2)
    @given(rng=randoms, power=st.integers(-50, 50))
    def check(rng, power):
        assert not program.failures(program.draw(rng), power)

    check()


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_a_solve_that_breaks_off_says_so_and_leaves_the_others_alone(adjoint):
    program = Breaks(Structure("quadrature", "scalars", adjoint=adjoint))

    @batches(3)
    @given(rng=randoms)
    def check(rng):
        assert not program.failures(program.draw(rng))

    check()


def test_any_options_are_a_program_or_a_documented_error():
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # to see who raised an error

    @batches(40)
    @given(rng=randoms)
    def check(rng):
        tried, wrong = attempt(rng)
        assert wrong is None, tried

    try:
        check()
    finally:
        jax.config.update("jax_traceback_filtering", filtering)


@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_solutions_start_where_they_should_and_obey_their_equations(name):
    problem = PROBLEMS[name]
    case = draw_numbers(random.Random(name), name, Structure(name).ranges)
    u0, q, xs = case["u0"], case["q"], np.linspace(0.1, 0.9, TIMES)
    later = np.where(xs > 0.1, 1.0, 0.0)
    rows, slopes = jax.jvp(lambda x: problem.exact(u0, xs + x * later, q), (0.0,), (1.0,))
    np.testing.assert_allclose(rows[0], u0, atol=1e-12)
    fields = jnp.stack([problem.field(u, x, q) for u, x in zip(rows, xs)])
    scale = np.max(np.exp(q["log_rate"])) if problem.stiff else 1.0
    np.testing.assert_allclose(slopes[1:], fields[1:], atol=1e-9 * scale)


def test_the_series_of_an_exponential_is_the_exponential():
    a = np.array([[0.3, -1.2, 0.4], [0.8, 0.1, -0.7], [0.2, 0.5, -0.9]])
    u = np.array([1.0, -0.5, 2.0])
    np.testing.assert_allclose(exponential(a, 0.9, u), scipy.linalg.expm(0.9 * a) @ u, rtol=1e-13)
