"""Programs for platforms that are not here: what is in them, and that the one for a CPU is the plain call.

A choice of `python -m bench.exports`, which does this for every method with every adjoint.
"""

import jax
import numpy as np
import pytest
from export_cases import PLATFORMS, Case, foreign, program, wrong
from jax import export

from jaxode import odeint

CASES = [
    Case("tsit5", "replay", True),
    Case("dopri5", "backsolve", True),
    Case("heun", "reversible"),
    Case("leapfrog", "direct", True, "float64"),
    Case("rodas5p", "none", True),
    Case("kvaerno3", "forward"),
    Case("auto", "none"),
    Case("tsit5", "replay", True, extra="few numbers"),
    Case("tsit5", "none", extra="events"),
    Case("tsit5", "replay", extra="dense"),
    Case("tsit5", "replay", extra="save_steps"),
    Case("tsit5", "replay", True, extra="signal"),
    Case("rodas5p", "none", extra="mass"),
    Case("rodas5p", "none", extra="a matrix of 300"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_program_for_another_platform_has_nothing_that_a_cpu_alone_knows(case):
    with jax.enable_x64(case.dtype == "float64"):
        assert not wrong(case)


def test_what_a_cpu_alone_knows_is_in_its_program_and_is_found_in_others():
    fn, args = program(Case("tsit5", "replay"))
    text = export.export(fn, platforms=["cpu"])(*args).mlir_module()
    assert not foreign(text, "cpu")
    assert foreign(text, "tpu") == ["xla_cpu", "inlineable"]
    fn, args = program(Case("rodas5p", extra="a matrix of 300"))
    text = export.export(fn, platforms=["cpu"])(*args).mlir_module()
    assert any("lapack" in name for name in foreign(text, "cuda"))


def test_one_program_for_all_platforms_is_called_on_this_one():
    fn, args = program(Case("bosh3", "replay", True))
    exported = export.export(fn, platforms=PLATFORMS)(*args)
    found = export.deserialize(exported.serialize()).call(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(fn(*args)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def of_any_number(adjoint: str, method: str = "tsit5"):
    """The gradient of a solve in its state and rates, of any number of them."""
    one, (y0, rates) = program(Case(method, adjoint))
    return jax.jit(jax.vmap(one, (0, None))), y0, rates


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_a_batch_is_exported_for_any_number_of_solves(adjoint):
    fn, y0, rates = of_any_number(adjoint)
    shape = export.symbolic_shape("b, 3")
    like = jax.ShapeDtypeStruct(shape, y0.dtype), jax.ShapeDtypeStruct(rates.shape, rates.dtype)
    bytes_ = export.export(fn, platforms=["cpu"])(*like).serialize()
    call = export.deserialize(bytes_).call
    for count in (1, 12):
        many = np.linspace(0.5, 1.5, count, dtype=y0.dtype)[:, None] * np.asarray(y0)[None]
        for x, y in zip(jax.tree.leaves(call(many, rates)), jax.tree.leaves(fn(many, rates))):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_state_of_any_size_is_refused_with_the_remedy():
    (n,) = export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct((n,), np.float32)
    ends = lambda y: odeint(lambda y, t: -y, y, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"y0 has the symbolic shape \(n,\).*fixed ones"):
        export.export(jax.jit(ends))(like)
    at_times = lambda t: odeint(lambda y, t: -y, 1.0, t)
    with pytest.raises(ValueError, match="`t` has the symbolic shape"):
        export.export(jax.jit(at_times))(like)
