"""Partial differential equations on grids, as stiff systems; the number of points is that of the state.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.10; the test set.
"""

import jax.numpy as jnp
import numpy as np

from jaxode.problems.problem import Problem
from jaxode.problems.stiff import entry


def brusselator_line(y, t, diffusion):
    """The Brusselator with diffusion on a line (HW eq. IV.10.6): u and v in turn, df/dy has a band of 2."""
    u, v = jnp.asarray(y).reshape(-1, 2).T
    rate = diffusion * (len(u) + 1) ** 2
    spread = lambda x, end: rate * jnp.diff(jnp.pad(x, 1, constant_values=end), n=2)
    du = 1 + u**2 * v - 4 * u + spread(u, 1)
    dv = 3 * u - u**2 * v + spread(v, 3)
    return jnp.stack([du, dv], 1).reshape(-1)


def brusselator_start(points):
    """u = 1 + sin(2 pi x) and v = 3 inside of the unit interval, in turn: a vector of 2 points numbers."""
    x = np.arange(1, points + 1) / (points + 1)
    return np.stack([1 + np.sin(2 * np.pi * x), np.full(points, 3.0)], 1).reshape(-1)


def brusselator_square(y, t, diffusion):
    """The Brusselator on a periodic square, with a source that is switched on at t = 1.1 (HW eq. IV.10.15).

    The state is u and then v, each on a grid of n x n points, as one vector of 2 n^2 numbers.
    """
    n = round((np.size(y) / 2) ** 0.5)
    u, v = jnp.asarray(y).reshape(2, n, n)
    x = np.arange(n) / n
    inside = (x[:, None] - 0.3) ** 2 + (x[None, :] - 0.6) ** 2 <= 0.1**2
    source = jnp.where(inside & (t >= 1.1), 5.0, 0.0).astype(u.dtype)

    def spread(z):
        around = sum(jnp.roll(z, by, axis) for by in (1, -1) for axis in (0, 1))
        return diffusion * n**2 * (around - 4 * z)

    du = 1 + u**2 * v - 4.4 * u + spread(u) + source
    dv = 3.4 * u - u**2 * v + spread(v)
    return jnp.concatenate([du.reshape(-1), dv.reshape(-1)])


def brusselator_square_start(n):
    """u = 22 y (1 - y)^1.5 and then v = 27 x (1 - x)^1.5 on n x n points, as one vector."""
    x, y = np.meshgrid(np.arange(n) / n, np.arange(n) / n, indexing="ij")
    u, v = 22 * y * (1 - y) ** 1.5, 27 * x * (1 - x) ** 1.5
    return np.concatenate([u.reshape(-1), v.reshape(-1)])


def cusp(y, t):
    """Threshold, cusp catastrophe and van der Pol's limit cycle on a ring (HW eq. IV.10.8): y, a, b in turn."""
    y, a, b = jnp.asarray(y).reshape(-1, 3).T
    spread = lambda x: len(x) ** 2 / 144 * (jnp.roll(x, 1) - 2 * x + jnp.roll(x, -1))
    u = (y - 0.7) * (y - 1.3)
    v = u / (u + 0.1)
    dy = -1e4 * (y**3 + a * y + b) + spread(y)
    da = b + 0.07 * v + spread(a)
    db = (1 - a**2) * b - a - 0.4 * y + 0.035 * v + spread(b)
    return jnp.stack([dy, da, db], 1).reshape(-1)


def cusp_start(points):
    """y = 0, a = -2 cos and b = 2 sin of the angle on the ring, in turn: a vector of 3 points numbers."""
    angle = 2 * np.pi * np.arange(1, points + 1) / points
    return np.stack([0 * angle, -2 * np.cos(angle), 2 * np.sin(angle)], 1).reshape(-1)


def medical_akzo(y, t):
    """Antibodies that enter tissue with a tumour (the test set, II.9): u and v in turn, a band of 2.

    What is at the surface, 2, is taken away at t = 5.
    """
    u, v = jnp.asarray(y).reshape(-1, 2).T
    n = len(u)
    depth = np.arange(1, n + 1) / n - 1
    advection, diffusion = (
        x.astype(u.dtype) for x in (2 * depth**3 / 16 * n / 2, depth**4 / 16 * n**2)
    )
    surface = jnp.where(t <= 5, 2.0, 0.0).astype(u.dtype)
    left, right = jnp.concatenate([surface[None], u[:-1]]), jnp.concatenate([u[1:], u[-1:]])
    bound = 100 * u * v
    du = advection * (right - left) + diffusion * (left - 2 * u + right) - bound
    return jnp.stack([du, -bound], 1).reshape(-1)


problems: dict[str, Problem] = {
    **entry("brusselator_line", brusselator_line, brusselator_start(20), 10.0, args=(1 / 50,), band=(2, 2)),
    **entry("brusselator_square", brusselator_square, brusselator_square_start(8), 11.5, args=(0.1,)),
    **entry("cusp", cusp, cusp_start(32), 1.1),
    **entry("medical_akzo", medical_akzo, np.tile([0.0, 1.0], 40), 20.0, band=(2, 2)),
}  # fmt: skip
