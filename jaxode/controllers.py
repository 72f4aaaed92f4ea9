"""From the error of a step to the size of the next one; and the first step.

A controller is a value: `solve(..., controller=pid(integral=0.4, proportional=0.3))`.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxode import tree
from jaxode.words import CONTROLLER_WORDS, answers


@answers(CONTROLLER_WORDS)
@dataclasses.dataclass(frozen=True)
class Controller:
    """Proportional-integral-derivative control of the step size.

    With r_n the error ratio of step n (error over tolerance; 1 is just acceptable) and q one more
    than the order of the error estimate, the next step is the last one times

        safety r_n^(-(I + P + D) / q)  r_(n-1)^((P + 2 D) / q)  r_(n-2)^(-D / q),

    kept between `min_factor` and `max_factor` (Soederlind 2003, Digital filters in adaptive
    time-stepping; Hairer, Norsett, Wanner, eq. II.4.13 and IV.2.43a). The factor may be below 1
    after an accepted step too: shrinking early is cheaper than being rejected.
    """

    integral: float = 1.0
    proportional: float = 0.0
    derivative: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self):
        if not 0 < self.min_factor < 1 < self.max_factor:
            raise ValueError(
                "A controller needs 0 < min_factor < 1 < max_factor, "
                f"got {self.min_factor} and {self.max_factor}."
            )
        if not 0 < self.safety <= 1:
            raise ValueError(f"`safety` must be in (0, 1], got {self.safety}.")
        if not self.integral > 0:
            raise ValueError(f"`integral` must be positive, got {self.integral}.")

    def start(self, dtype):
        """What the controller remembers: the last error ratios that its gains use."""
        remembered = 2 if self.derivative else 1 if self.proportional else 0
        return (jnp.ones((), dtype),) * remembered

    def __call__(self, ratio, history, order):
        """The factor for the next step, and the history if this one is accepted."""
        p, i, d = self.proportional, self.integral, self.derivative
        exponents = (-(i + p + d) / order, (p + 2 * d) / order, -d / order)
        factor = self.safety
        for r, exponent in zip((ratio, *history), exponents):
            log = lax.log(lax.max(r, number(1e-10, r)))  # vectorises; a power does not
            factor = tree.scale(factor, lax.exp(tree.scale(exponent, log)))
        least, most = number(self.min_factor, ratio), number(self.max_factor, ratio)
        factor = lax.clamp(least, factor, most)
        # An error that is not a number says nothing but that the step was too long.
        factor = lax.select(lax.is_finite(ratio), factor, least)
        return factor, (ratio, *history)[: len(history)]


def number(x: float, like):
    """A constant, in the dtype of another number."""
    return lax.full_like(like, x)


def pid(*, proportional=0.0, integral=1.0, derivative=0.0, **limits) -> Controller:
    """A PID controller; `limits` are safety, min_factor, max_factor.

    >>> pid(integral=0.4, proportional=0.3)
    Controller(integral=0.4, proportional=0.3, derivative=0.0, safety=0.9, min_factor=0.2, max_factor=10.0)
    """
    return Controller(integral, proportional, derivative, **limits)


def first_step(f, y, k, order, scale, hmax, measured):
    """A first step on [0, 1] from the size of y, y' and y'' (Hairer, Norsett, Wanner, sec. II.4).

    One evaluation of f. Its point is kept inside the interval and inside `hmax`, and a derivative
    that is not finite there only makes the step small.
    """
    d0, d1 = tree.norm(measured(y), scale), tree.norm(measured(k), scale)
    dtype = hmax.dtype
    d0, d1 = lax.convert_element_type(d0, dtype), lax.convert_element_type(d1, dtype)
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = jnp.where(tiny, 1e-6, 0.01 * d0 / jnp.where(tiny, 1.0, d1))
    h0 = jnp.minimum(h0, hmax)
    k1 = f(tree.combine(y, h0, [1.0], [k]), h0)
    difference = tree.combine(k1, 1.0, [-1.0], [k])
    d2 = lax.convert_element_type(tree.norm(measured(difference), scale), dtype) / h0
    steepest = jnp.maximum(d1, d2)
    flat = steepest <= 1e-15
    h1 = (0.01 / jnp.where(flat, 1.0, steepest)) ** (1 / order)
    h1 = jnp.where(flat, jnp.maximum(1e-6, 1e-3 * h0), h1)
    h = jnp.minimum(100 * h0, h1)
    return jnp.minimum(jnp.where(jnp.isfinite(h), h, 1e-3 * h0), hmax)
