"""Problems for explicit methods, smooth and not stiff."""

import jax.numpy as jnp
import numpy as np

from jaxode.problems.problem import Problem


def decay(y, t, rate):
    """dy/dt = -rate y, for a y of any shape: y0 exp(-rate t)."""
    return -rate * jnp.asarray(y)


def oscillator(y, t, frequency):
    """A harmonic oscillator, y = (x, dx/dt): d2x/dt2 = -frequency^2 x."""
    position, velocity = y
    return jnp.stack([velocity, -(frequency**2) * position])


def logistic(y, t, rate):
    """Growth that saturates, for a y of any shape: dy/dt = rate y (1 - y)."""
    return rate * jnp.asarray(y) * (1 - jnp.asarray(y))


def forced(y, t, rate):
    """Prothero and Robinson (1974): follows cos t, however large the rate."""
    return -rate * (jnp.asarray(y) - jnp.cos(t)) - jnp.sin(t)


def product(y, t):
    """Fehlberg's (1968) test problem, with an exact solution that is not a polynomial in time."""
    a, b = y
    return jnp.stack([2 * t * a * jnp.log(b), -2 * t * b * jnp.log(a)])


def kepler(y, t):
    """A planet in the plane around a sun of mass 1, y = (q1, q2, p1, p2): dq/dt = p, dp/dt = -q / |q|^3."""
    q, p = jnp.asarray(y[:2]), jnp.asarray(y[2:])
    return jnp.concatenate([p, -q / jnp.sum(q**2) ** 1.5])


def kepler_exact(t, eccentricity=0.5):
    """The ellipse, by Newton's method for Kepler's equation u - e sin u = t."""
    e, u = eccentricity, np.asarray(t, float)
    for _ in range(50):
        u = u - (u - e * np.sin(u) - t) / (1 - e * np.cos(u))
    root, speed = np.sqrt(1 - e**2), 1 / (1 - e * np.cos(u))
    return np.stack([np.cos(u) - e, root * np.sin(u), -speed * np.sin(u), speed * root * np.cos(u)])


def kepler_invariants(y):
    """Energy and angular momentum."""
    x, y, u, v = y
    return np.array([(u**2 + v**2) / 2 - 1 / np.hypot(x, y), x * v - y * u])


def lotka_volterra(y, t, a, b, c, d):
    """Prey x and predators z, y = (x, z): dx/dt = a x - b x z, dz/dt = d x z - c z."""
    prey, predators = y
    return jnp.stack([a * prey - b * prey * predators, d * prey * predators - c * predators])


def lotka_volterra_invariant(y, a=1.5, b=1.0, c=3.0, d=1.0):
    """What prey and predators keep: d x - c log x + b z - a log z."""
    prey, predators = y
    return np.array([d * prey - c * np.log(prey) + b * predators - a * np.log(predators)])


def pendulum(y, t, gravity):
    """A pendulum of length 1, y = (angle, velocity): d2x/dt2 = -gravity sin x."""
    angle, velocity = y
    return jnp.stack([velocity, -gravity * jnp.sin(angle)])


def pendulum_invariant(y, gravity=9.8):
    """The energy of a pendulum of length and mass 1."""
    return np.array([y[1] ** 2 / 2 - gravity * np.cos(y[0])])


def lorenz(y, t, sigma, rho, beta):
    """Lorenz's (1963) system, y = (x, y, z), chaotic at sigma = 10, rho = 28, beta = 8 / 3."""
    x, y, z = y
    return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])


def van_der_pol(y, t, mu):
    """Van der Pol's oscillator, y = (x, dx/dt): d2x/dt2 = mu (1 - x^2) dx/dt - x; stiff at large mu."""
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def brusselator(y, t):
    """The Brusselator (HNW eq. I.16.12), y = (u, v): du/dt = 1 + u^2 v - 4 u, dv/dt = 3 u - u^2 v."""
    u, v = y
    return jnp.stack([1 + u**2 * v - 4 * u, 3 * u - u**2 * v])


def arenstorf(y, t):
    """A satellite of the earth and the moon in rotating coordinates, on a closed orbit."""
    mu = 0.012277471
    x, y, u, v = y
    earth, moon = ((x + mu) ** 2 + y**2) ** 1.5, ((x - 1 + mu) ** 2 + y**2) ** 1.5
    return jnp.stack(
        [
            u,
            v,
            x + 2 * v - (1 - mu) * (x + mu) / earth - mu * (x - 1 + mu) / moon,
            y - 2 * u - (1 - mu) * y / earth - mu * y / moon,
        ]
    )


def pleiades(y, t):
    """Seven stars in the plane with masses 1 to 7: positions x, y, then velocities."""
    x, y, velocity = jnp.asarray(y[:7]), jnp.asarray(y[7:14]), jnp.asarray(y[14:])
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    square = dx * dx + dy * dy + jnp.eye(7, dtype=x.dtype)  # a power takes ten times a root
    pull = jnp.arange(1, 8, dtype=x.dtype).reshape(1, 7) / (square * jnp.sqrt(square))
    return jnp.concatenate([velocity, jnp.sum(pull * dx, 1), jnp.sum(pull * dy, 1)])


ARENSTORF = (0.994, 0.0, 0.0, -2.00158510637908252240537862224)
PLEIADES = (
    *(3.0, 3.0, -1.0, -3.0, 2.0, -2.0, 2.0),
    *(3.0, -3.0, 2.0, 0.0, 0.0, -4.0, 4.0),
    *(0.0, 0.0, 0.0, 0.0, 0.0, 1.75, -1.5),
    *(0.0, 0.0, 0.0, -1.25, 1.0, 0.0, 0.0),
)

problems: dict[str, Problem] = {
    "decay": Problem(
        decay, (1.0, -2.0), 2.0, args=(1.5,), exact=lambda t: np.exp(-1.5 * t) * np.array([1, -2])
    ),
    "oscillator": Problem(
        oscillator,
        (1.0, 0.0),
        2 * np.pi,
        args=(2.0,),
        exact=lambda t: np.array([np.cos(2 * t), -2 * np.sin(2 * t)]),
        invariants=lambda y: np.array([4 * y[0] ** 2 + y[1] ** 2]),
    ),
    "logistic": Problem(
        logistic, (0.1,), 5.0, args=(1.0,), exact=lambda t: np.array([1 / (1 + 9 * np.exp(-t))])
    ),
    "forced": Problem(forced, (1.0,), 10.0, args=(20.0,), exact=lambda t: np.array([np.cos(t)])),
    "product": Problem(
        product,
        (1.0, np.e),
        5.0,
        exact=lambda t: np.exp(np.array([np.sin(t**2), np.cos(t**2)])),
    ),
    "kepler": Problem(
        kepler, (0.5, 0.0, 0.0, 3**0.5), 20.0, exact=kepler_exact, invariants=kepler_invariants
    ),
    "lotka_volterra": Problem(
        lotka_volterra,
        (1.0, 1.0),
        10.0,
        args=(1.5, 1.0, 3.0, 1.0),
        end=(1.02634476757509, 0.90969107813604),
        invariants=lotka_volterra_invariant,
    ),
    "pendulum": Problem(
        pendulum,
        (np.pi / 2, 0.0),
        4.0,
        args=(9.8,),
        end=(-0.623890496610256, 3.9884321528144),
        invariants=pendulum_invariant,
    ),
    "lorenz": Problem(
        lorenz,
        (1.0, 1.0, 1.0),
        10.0,
        args=(10.0, 28.0, 8 / 3),
        end=(-4.90268754113464, -3.74387292180293, 24.6908581027905),
    ),
    "van_der_pol": Problem(
        van_der_pol, (2.0, 0.0), 20.0, args=(5.0,), end=(-1.60129687954285, 0.198326676338662)
    ),
    "brusselator": Problem(
        brusselator, (1.5, 3.0), 20.0, end=(0.498637071268348, 4.59678034945201)
    ),
    "arenstorf": Problem(arenstorf, ARENSTORF, 17.0652165601579625588917206249, end=ARENSTORF),
    "pleiades": Problem(
        pleiades,
        PLEIADES,
        3.0,
        end=(
            0.370613914397101,
            3.23728409205723,
            -3.22255903241832,
            0.659709145577528,
            0.342558170715658,
            1.56217210140063,
            -0.700309292221253,
            -3.94343758551737,
            -3.27138097397255,
            5.22508184345654,
            -2.59061243497747,
            1.19821369339227,
            -0.242968234493582,
            1.09144924042898,
            3.41700380631443,
            1.3545845016255,
            -2.59006559781078,
            2.02505373471422,
            -1.15581510016044,
            -0.807298817022305,
            0.595239635420862,
            -3.74124496123395,
            0.377345968575064,
            0.938685886955107,
            0.366792222720052,
            -0.34740463538085,
            2.34491544818094,
            -1.9470204342633,
        ),
    ),
}
