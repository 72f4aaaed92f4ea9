"""`explain` says in words why a solve is slow, or fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import explain


def sir(y, t):
    new = 2 * y["s"] * y["i"]
    return {"s": -new, "i": new - y["i"]}


SIR = {"s": jnp.full(3, 0.9), "i": jnp.full(3, 0.1)}


def test_of_a_well_behaved_problem_nothing_is_wrong():
    found = explain(sir, SIR, [0.0, 20.0])
    assert found.verdict == "fine" and "Nothing is wrong" in str(found)
    assert found.solution.status == 0 and found.tried > 5 and found.component == ""
    assert found.shortest[0] < found.longest[0]


def test_a_stiff_problem_is_told_the_component_and_a_method():
    def func(y, t):  # stiff from 3.2 on
        rate = jnp.where(t > 3.2, 2e4, 1.0)
        return {
            **sir(y, t),
            "fast": jnp.stack([-y["fast"][0], -rate * (y["fast"][1] - jnp.cos(t))]),
        }

    y0 = {**SIR, "fast": jnp.ones(2)}
    found = explain(func, y0, [0.0, 4.0], rtol=1e-4, atol=1e-4)
    assert found.verdict == "stiff" and found.component == "y['fast'][1]"
    assert "because of y['fast'][1]" in str(found) and "method='rodas5p'" in str(found)
    assert "The problem is stiff from 3." in str(found)
    np.testing.assert_allclose(found.cluster, (3.6, 3.6), atol=0.41)
    assert explain(func, y0, [0.0, 3.1], rtol=1e-4, atol=1e-4).verdict == "fine"


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_a_jump_of_func_is_a_discontinuity_at_its_time(method):
    jumps = lambda y, t: {"a": -y["a"], "b": jnp.where(t > 0.7, 5.0, -y["b"])}
    found = explain(jumps, {"a": 1.0, "b": 0.0}, [0.0, 2.0], method=method)
    assert found.verdict == "discontinuity" and found.component == "y['b']"
    assert "crossed t = 0.7" in str(found).replace("0.69999", "0.7") and "Event" in str(found)
    np.testing.assert_allclose(found.cluster, (0.7, 0.7), atol=0.3)


def test_a_pole_is_one_with_its_time_and_a_domain_that_is_left_too():
    grows = lambda y, t: {"u": y["u"] ** 2, "v": -y["v"]}
    found = explain(grows, {"u": jnp.array([0.2, 1.0]), "v": 1.0}, [0.0, 2.0])
    assert found.verdict == "pole" and found.findings[0].remedy in str(found).replace("End", "end")
    assert "y['u'][1] grows without bound towards t = 1," in str(found)
    assert explain(lambda y, t: -jnp.sqrt(y), 1.0, [0.0, 3.0]).verdict == "not finite"
    assert explain(lambda y, t: y, 1.0, [0.0, 2000.0]).verdict == "not finite"


def test_growth_where_stability_holds_steps_short_is_no_pole():
    """From t = 3 pi / 2 on y follows a cosine up from 0, and the steps run out soon after."""
    func = lambda y, t: {"infected": -1e4 * (y["infected"] - jnp.cos(t))}
    found = explain(func, {"infected": jnp.ones(8)}, [0.0, 10.0])
    assert 5.2 < float(found.solution.reached) < 5.6
    assert found.verdict == "stiff" and "because of y['infected'][0]" in str(found)
    slow = explain(
        lambda y, t: jnp.exp(y), 0.0, [0.0, 3.0], method="dop853", rtol=1e-11, atol=1e-11
    )
    assert slow.verdict == "pole"  # like a logarithm


def test_a_tolerance_too_small_for_float32_is_named():
    turns = lambda y, t: jnp.stack([y[1], -y[0]])
    y0 = jnp.array([1.0, 0.0], jnp.float32)
    found = explain(turns, y0, [0.0, 20.0], rtol=1e-9, atol=1e-9)
    assert found.verdict == "precision" and "float64" in str(found)
    assert explain(turns, y0, [0.0, 20.0]).verdict == "fine"


def test_components_of_other_scales_are_named():
    def func(y, t):
        return {
            "big": -0.1 * y["big"],
            "small": jnp.stack([50 * y["small"][1], -50 * y["small"][0]]),
        }

    y0 = {"big": 1.0, "small": jnp.array([1e-8, 0.0])}
    tight = explain(func, y0, [0.0, 10.0], rtol=1e-6, atol=1e-15)
    assert tight.verdict == "scale" and "larger atol" in str(tight) and "y['small']" in str(tight)
    loose = explain(func, y0, [0.0, 10.0], rtol=1e-6, atol=1e-6)
    assert loose.verdict == "scale" and "y['small'][0]" in str(loose) and "smaller" in str(loose)


def test_limits_and_outputs_are_named():
    y0 = {"s": 0.9, "i": 0.1}
    assert explain(sir, y0, [0.0, 20.0], hmax=0.05).verdict == "hmax"
    found = explain(sir, y0, [0.0, 200.0], max_steps=10)
    assert found.verdict == "max_steps" and "% of the way" in str(found)
    assert explain(sir, y0, [0.0, 20.0], max_evaluations=60).verdict == "budget"
    assert explain(sir, y0, np.linspace(0, 20, 3000), method="dop853").verdict == "outputs"


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda y: explain(lambda y, t: -y, y, [0.0, 1.0]).tried)(1.0)
    with pytest.raises(TypeError, match="no `log`"):
        explain(sir, SIR, [0.0, 1.0], log=3)
