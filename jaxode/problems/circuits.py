"""Electric circuits, stiff: a ring modulator, and an amplifier that is a differential-algebraic equation.

Reference: Mazzia and Magherini (2008), Test set for initial value problem solvers (the test set).
"""

import jax.numpy as jnp
import numpy as np

from jaxode.problems.problem import Problem
from jaxode.problems.stiff import entry


def ring_modulator(y, t):
    """Horneck, mixes a signal of 1 kHz with one of 10 kHz by four diodes (the test set, II.12).

    Seven voltages and eight currents, in volts, amperes and seconds. Its small capacities oscillate:
    rodas5p takes 40,000 trial steps at rtol 1e-4. Their errors are as small as their estimates say (a
    twentieth as a rule), but add up: at the end they are 41, 28, 18 and 11 times rtol at 1e-4, 1e-5, 1e-6 and
    1e-7. So for ten times a tolerance ask for a quarter of it.
    """
    *u, i8, i9, i10, i11, i12, i13, i14, i15 = y
    u1, u2, u3, u4, u5, u6, u7 = u
    low, high = 0.5 * jnp.sin(2e3 * np.pi * t), 2 * jnp.sin(2e4 * np.pi * t)
    diode = lambda u: 40.67286402e-9 * (jnp.exp(17.7493332 * u) - 1)
    q1, q2 = diode(u3 - u5 - u7 - high), diode(-u4 + u6 - u7 - high)
    q3, q4 = diode(u4 + u5 + u7 + high), diode(-u3 - u6 + u7 + high)
    return jnp.stack(
        [
            (i8 - 0.5 * i10 + 0.5 * i11 + i14 - u1 / 25000) / 1.6e-8,
            (i9 - 0.5 * i12 + 0.5 * i13 + i15 - u2 / 25000) / 1.6e-8,
            (i10 - q1 + q4) / 2e-12,
            (-i11 + q2 - q3) / 2e-12,
            (i12 + q1 - q3) / 2e-12,
            (-i13 - q2 + q4) / 2e-12,
            (-u7 / 50 + q1 + q2 - q3 - q4) / 1e-8,
            -u1 / 4.45,
            -u2 / 4.45,
            (0.5 * u1 - u3 - 17.3 * i10) / 5e-4,
            (-0.5 * u1 + u4 - 17.3 * i11) / 5e-4,
            (0.5 * u2 - u5 - 17.3 * i12) / 5e-4,
            (-0.5 * u2 + u6 - 17.3 * i13) / 5e-4,
            (-u1 + low - (50 + 36.3) * i14) / 2e-3,
            (-u2 - (600 + 36.3) * i15) / 2e-3,
        ]
    )


def transistor_amplifier(y, t):
    """Eight voltages of an amplifier with two transistors (HW sec. VI.1; the test set, II.13).

    mass dy/dt = f, where the mass matrix holds the capacities and has rank 5.
    """
    u1, u2, u3, u4, u5, u6, u7, u8 = y
    resistance, supply, alpha = 9000.0, 6.0, 0.99
    current = lambda u: 1e-6 * (jnp.exp(u / 0.026) - 1)
    first, second = current(u2 - u3), current(u5 - u6)
    return jnp.stack(
        [
            (u1 - 0.1 * jnp.sin(200 * np.pi * t)) / 1000,
            (2 * u2 - supply) / resistance + (1 - alpha) * first,
            u3 / resistance - first,
            (u4 - supply) / resistance + alpha * first,
            (2 * u5 - supply) / resistance + (1 - alpha) * second,
            u6 / resistance - second,
            (u7 - supply) / resistance + alpha * second,
            u8 / resistance,
        ]
    )


def capacities():
    """The mass matrix of the amplifier: five capacities, three of them between two nodes."""
    mass = np.zeros((8, 8))
    for i, j, k in ((0, 1, 1), (3, 4, 3), (6, 7, 5)):
        mass[i : j + 1, i : j + 1] = k * 1e-6 * np.array([[-1, 1], [1, -1]])
    mass[2, 2], mass[5, 5] = -2e-6, -4e-6
    return mass


AMPLIFIER = (0.0, 3.0, 3.0, 6.0, 3.0, 3.0, 6.0, 0.0)

problems: dict[str, Problem] = {
    **entry("ring_modulator", ring_modulator, np.zeros(15), 1e-3, scale=1e-2),
    **entry("transistor_amplifier", transistor_amplifier, AMPLIFIER, 0.2, mass=capacities()),
}
