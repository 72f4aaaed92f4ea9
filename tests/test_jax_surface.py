"""What jaxode takes for granted of JAX beyond its ordinary functions, one small test each.

There is no upper bound on JAX in pyproject.toml. When a release breaks one of these, the test that
fails says which assumption it was, and `EXTENDS` in test_layout.py which file makes it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import ad, batching, mlir

X = jnp.array([1.0, 2.0])


def test_a_primitive_has_an_evaluation_a_shape_a_lowering_a_jvp_a_transpose_and_a_batch_rule():
    double = core.Primitive("double")
    double.def_impl(lambda x: 2 * x)
    double.def_abstract_eval(lambda x: x)
    mlir.register_lowering(double, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
    ad.primitive_jvps[double] = lambda xs, xs_dot: (double.bind(*xs), double.bind(*xs_dot))
    ad.primitive_transposes[double] = lambda bar, x: [double.bind(bar)]
    batching.primitive_batchers[double] = lambda xs, axes: (double.bind(*xs), axes[0])
    assert double.bind(3.0) == 6
    np.testing.assert_array_equal(jax.jit(double.bind)(X), 2 * X)
    np.testing.assert_array_equal(jax.vmap(double.bind)(X), 2 * X)
    np.testing.assert_array_equal(jax.grad(lambda x: double.bind(x).sum())(X), [2, 2])


def test_a_primitive_of_many_results_may_say_its_effects_with_its_shapes():
    pair = core.Primitive("pair")
    pair.multiple_results = True
    pair.def_effectful_abstract_eval(lambda x: ([x, x], frozenset()))
    jaxpr = jax.make_jaxpr(lambda x: pair.bind(x))(X)
    assert len(jaxpr.out_avals) == 2 and not jaxpr.effects


def test_a_lowering_of_a_platform_goes_before_the_general_one():
    where = core.Primitive("where_am_i")
    where.def_abstract_eval(lambda x: x)
    for platform, add in (None, 1), ("cpu", 2):
        lower = mlir.lower_fun(lambda x, add=add: x + add, multiple_results=False)
        mlir.register_lowering(where, lower, platform=platform)
    exported = jax.jit(where.bind).trace(X).lower(lowering_platforms=("tpu",)).as_text()
    assert "dense<1.0" in exported
    assert "dense<2.0" in jax.jit(where.bind).trace(X).lower(lowering_platforms=("cpu",)).as_text()


def test_the_tangent_of_what_does_not_move_is_a_symbolic_zero():
    seen, probe = [], core.Primitive("probe")
    probe.def_impl(lambda x, y: x)
    probe.def_abstract_eval(lambda x, y: x)

    def jvp(xs, xs_dot):
        seen.extend(isinstance(x_dot, ad.Zero) for x_dot in xs_dot)
        return probe.bind(*xs), xs_dot[0]

    ad.primitive_jvps[probe] = jvp
    jax.jvp(lambda x: probe.bind(x, X), (X,), (X,))
    assert seen == [False, True]
    assert ad.Zero(jax.typeof(X).to_tangent_aval()).aval.shape == (2,)


def test_a_custom_vjp_says_which_arguments_are_differentiated_and_which_cotangents_are_zero():
    seen = []
    pair = jax.custom_vjp(lambda x, y: (x, y))

    def forwards(x, y):
        assert isinstance(x, CustomVJPPrimal)
        seen.append((x.perturbed, y.perturbed))
        return custom_vjp_primal_tree_values((x, y)), None

    def backwards(_, bars):
        seen.append(tuple(isinstance(bar, SymbolicZero) for bar in bars))
        return bars[0], jnp.zeros(2)

    pair.defvjp(forwards, backwards, symbolic_zeros=True)
    jax.grad(lambda x: pair(x, X)[0].sum())(X)
    assert seen == [(True, False), (False, True)]


def test_a_call_that_is_marked_carries_the_mark_to_its_lowered_text():
    def fn(x):
        out = jax.jit(jnp.sin, inline=False)(x)
        return set_xla_metadata(out, xla_cpu_small_call="true", inlineable="false")

    text = jax.jit(fn).lower(X).as_text()
    assert 'xla_cpu_small_call = "true"' in text and 'inlineable = "false"' in text
    np.testing.assert_allclose(jax.jit(fn)(X), np.sin(X), rtol=1e-6)


def test_a_jaxpr_is_made_of_equations_with_a_primitive_variables_parameters_and_effects():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) * 2.0)(X)
    jaxpr = closed.jaxpr
    sine, product = jaxpr.eqns
    assert (sine.primitive.name, product.primitive.name) == ("sin", "mul")
    assert sine.invars == jaxpr.invars and product.outvars == jaxpr.outvars
    assert any(isinstance(x, core.Literal) and x.val == 2 for x in product.invars)
    assert sine.outvars[0].aval.shape == (2,) and not sine.effects and not jaxpr.constvars
    shorter = jaxpr.replace(eqns=jaxpr.eqns[:1], outvars=sine.outvars)
    again = core.jaxpr_as_fun(core.ClosedJaxpr(shorter, ()))
    np.testing.assert_allclose(again(X)[0], np.sin(X), rtol=1e-6)


def test_the_jaxprs_inside_of_an_equation_are_found_in_its_parameters():
    inside = lambda fn: [
        [inner.eqns[0].primitive.name for inner in core.jaxprs_in_params(eqn.params)]
        for eqn in jax.make_jaxpr(fn)(X).eqns
    ]
    assert inside(jax.jit(jnp.sin)) == [["sin"]]
    loop = lambda x: lax.while_loop(lambda x: x[0] > 0, lambda x: x - 1, x)
    assert len(inside(loop)[-1]) == 2
    assert ["cos"] in inside(lambda x: lax.scan(lambda c, _: (jnp.cos(c), None), x, None, 3)[0])


@pytest.mark.parametrize(
    "fn, primitive, parameters",
    [
        (lambda x: x @ x, "dot_general", {"dimension_numbers": (((0,), (0,)), ((), ()))}),
        (lambda x: x[1:], "slice", {"start_indices": (1,), "limit_indices": (2,)}),
    ],
)
def test_the_parameters_that_are_read_have_these_names(fn, primitive, parameters):
    eqns = [e for e in jax.make_jaxpr(fn)(X).eqns if e.primitive.name == primitive]
    for name, value in parameters.items():
        assert eqns[0].params[name] == value


def test_an_array_that_is_taken_apart_says_along_which_axis():
    """An operation of its own; in JAX 0.10.0 a call of `split`."""
    (eqn,) = jax.make_jaxpr(jnp.unstack)(X).eqns
    inner = [eqn for jaxpr in core.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns[:1]]
    (eqn,) = inner or [eqn]
    assert eqn.primitive.name in ("unstack", "split") and eqn.params["axis"] == 0


def test_a_custom_rule_is_an_equation_of_its_name():
    rule = jax.custom_jvp(jnp.sin)
    rule.defjvp(lambda xs, xs_dot: (rule(*xs), xs_dot[0]))
    vjp = jax.custom_vjp(jnp.sin)
    vjp.defvjp(lambda x: (vjp(x), x), lambda x, bar: (bar,))
    names = [jax.make_jaxpr(fn)(X).eqns[0].primitive.name for fn in (rule, vjp)]
    assert names == ["custom_jvp_call", "custom_vjp_call"]


def test_forward_mode_of_a_custom_vjp_raises_an_error_that_says_so():
    vjp = jax.custom_vjp(jnp.sin)
    vjp.defvjp(lambda x: (vjp(x), x), lambda x, bar: (bar,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(vjp, (X,), (X,))
