"""Programs for platforms that are not here: what is in them, and that the one for a CPU is the plain call.

A choice of `python -m bench.exports`, which does this for every method with every adjoint.
"""

import jax
import numpy as np
import pytest
from export_cases import PLATFORMS, Case, foreign, program, wrong
from jax import export

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
