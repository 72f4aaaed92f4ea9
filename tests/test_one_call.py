"""A solve as one native call, against the same steps by a table, one operation at a time.

What one call cannot hold ends the process (`kernels/one_call.py`): so every case is solved in a child
process, which prints the name of each before it starts. It compiles as users do, with all optimisations.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import one_call_cases as cases
import pytest
from jax import lax
from jax.extend import core

from jaxode.kernels import one_call

CHILD = Path(__file__).parent / "one_call_cases.py"
GROUP = 16  # operations of a field: compiling takes longer than linearly many would
# Their vjps are no call: polygamma, and a scatter.
NOT_BACKWARDS = {"digamma", "gather"}


def solved(names, folder):
    """The results of these cases, from a child process; an error that names the one that ended it."""
    file = folder / "results"
    program = [sys.executable, str(CHILD), str(file), *names]
    root = str(CHILD.parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    child = subprocess.run(program, capture_output=True, text=True, env=env, timeout=600)
    started = [line for line in child.stdout.splitlines() if line in names]
    assert child.returncode == 0, (
        f"the process ended with {child.returncode} in {(started or ['no case'])[-1]}: "
        f"{child.stderr[-2000:]}"
    )
    return pickle.loads(file.read_bytes())


def compare(name, result, tolerance=1e-9):
    """What a case found, and what it should have found."""
    assert not isinstance(result, str), f"{name}: {result}"
    found, _, wanted, narrow = result
    assert len(found) == len(wanted), name
    near = 1e-4 if narrow else tolerance
    for x, y in zip(found, wanted):
        assert x.dtype == y.dtype, name
        np.testing.assert_allclose(x, y, rtol=near, atol=near, err_msg=name)


def groups(names):
    """Names, some at a time; those without a vjp in one call by themselves."""
    both = [name for name in names if name not in NOT_BACKWARDS]
    return [both[i : i + GROUP] for i in range(0, len(both), GROUP)]


def check_rules(groups, kinds, folder):
    """Solve fields of these operations. If a child ends, each operation is tried alone, to name it."""
    try:
        found = solved([f"{kind}:{','.join(group)}" for group in groups for kind in kinds], folder)
    except AssertionError:
        for name in [name for group in groups for name in group]:
            solved([f"{kind}:{name}" for kind in kinds], folder)
        raise
    for name, result in found.items():
        compare(name, result, 1e-6)  # half of a field is in float32
        calls = 2 if name.startswith("rules'") else 1  # a gradient is a forward and a backward pass
        assert result[1] == calls, f"{name} is {result[1]} calls"


def test_there_is_a_field_for_every_rule_and_it_has_the_operation():
    # "reduce" is that of `kernels/numbers.py`, which has tests of its own.
    given = set(one_call.RULES) - set(cases.NAMES) - {"reduce"}
    assert given == {name.split()[0] for name in cases.RULES}

    def operations(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in core.jaxprs_in_params(eqn.params):
                yield from operations(inner)

    case = cases.case_of_rules(list(cases.RULES))
    found = set(operations(cases.jax.make_jaxpr(case["func"])(case["y0"], 0.5).jaxpr))
    # Operations that an older JAX does not have yet, and since when they are there.
    since = {"stack": (0, 10, 1), "unstack": (0, 10, 1), "empty2": (0, 10, 1)}
    since |= {"one_minus_square": (0, 12), "polynomial": (0, 12)}  # of tanh' and erf'
    newer = {name for name, first in since.items() if cases.jax.__version_info__ < first}
    assert {name.split()[0] for name in cases.RULES} - newer <= found


@pytest.mark.parametrize("part", range(2))
def test_every_operation_that_has_a_rule_is_solved_and_differentiated_in_one_call(part, tmp_path):
    check_rules(groups([*cases.RULES, *cases.EDGES])[part::2], ["rules'"], tmp_path)


def test_what_has_no_vjp_in_one_call_is_solved_in_one(tmp_path):
    check_rules([sorted(NOT_BACKWARDS)], ["rules"], tmp_path)


def test_what_nothing_uses_and_what_is_constant_does_no_harm(tmp_path):
    names = [f"unused':{name}" for name in cases.UNUSED]
    for name, result in solved(names, tmp_path).items():
        compare(name, result)


def test_random_fields_are_solved_and_differentiated_as_step_by_step(tmp_path):
    """`python tests/one_call_cases.py FILE seed:10 seed:11 ...` tries more of them."""
    # The XLA of JAX 0.10.0 forgets what kind of call LAPACK's is beside a native call: an error, of seed 0.
    first = 1 if cases.jax.__version_info__ < (0, 10, 2) else 0
    names = [f"seed:{seed}" for seed in range(first, 5)]
    for name, result in solved(names, tmp_path).items():
        compare(name, result)


@pytest.mark.parametrize(
    "a, b, sums, fits",
    [
        ((2, 2), (2, 7), ((1,), (0,)), True),
        ((2, 2), (2, 2, 3), ((1,), (1,)), True),
        ((2, 2), (6, 2, 3), ((1,), (1,)), False),  # to XLA (2, 2) by (2, 18)
        ((2, 7, 7), (7, 7, 2), ((1, 2), (0, 1)), False),  # (2, 49) by (49, 2)
        ((7, 7, 2), (2,), ((2,), (0,)), True),  # of a vector
    ],
)
def test_the_axes_of_a_tiny_matrix_count_together(a, b, sums, fits):
    product = lambda a, b: lax.dot_general(a, b, (sums, ((), ())))
    jaxpr = cases.jax.make_jaxpr(product)(jnp.ones(a), jnp.ones(b)).jaxpr
    assert one_call.able(jaxpr) == fits
