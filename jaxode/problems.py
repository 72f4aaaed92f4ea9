"""Initial-value problems with known answers; tests, bench and notebooks share them.

`problems` maps names to values; each says where its answer comes from. A problem is used as

>>> from jaxode import odeint
>>> from jaxode.problems import problems
>>> p = problems["kepler"]
>>> ys = odeint(p.f, p.y0, (p.t0, p.t1), *p.args, rtol=1e-5, atol=1e-5)
>>> bool(abs(ys[-1] - p.exact(p.t1)).max() < 1e-2)
True
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """dy/dt = f(y, t, *args), y(t0) = y0, solved until t1.

    Either `exact(t)` is the solution at any time, or `end` is its value at t1, to the digits given.
    `invariants(y)` are numbers that the solution keeps. `stiff` says that explicit methods take
    steps for stability and not for accuracy.
    """

    f: Callable
    y0: npt.ArrayLike
    t1: float
    t0: float = 0.0
    args: tuple = ()
    exact: Callable | None = None
    end: npt.ArrayLike | None = None
    invariants: Callable | None = None
    stiff: bool = False

    def __post_init__(self):
        for name in ("y0", "end"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.array(value, float))

    def answer(self) -> np.ndarray:
        """y(t1)."""
        return np.asarray(self.exact(self.t1) if self.exact else self.end)


def decay(y, t, rate):
    return -rate * jnp.asarray(y)


def oscillator(y, t, frequency):
    position, velocity = y
    return jnp.stack([velocity, -(frequency**2) * position])


def logistic(y, t, rate):
    return rate * jnp.asarray(y) * (1 - jnp.asarray(y))


def forced(y, t, rate):
    """Prothero and Robinson (1974): follows cos t, however large the rate."""
    return -rate * (jnp.asarray(y) - jnp.cos(t)) - jnp.sin(t)


def product(y, t):
    """Fehlberg's (1968) test problem, with an exact solution that is not a polynomial in time."""
    a, b = y
    return jnp.stack([2 * t * a * jnp.log(b), -2 * t * b * jnp.log(a)])


def kepler(y, t):
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
    prey, predators = y
    return jnp.stack([a * prey - b * prey * predators, d * prey * predators - c * predators])


def lotka_volterra_invariant(y, a=1.5, b=1.0, c=3.0, d=1.0):
    prey, predators = y
    return np.array([d * prey - c * np.log(prey) + b * predators - a * np.log(predators)])


def pendulum(y, t, gravity):
    angle, velocity = y
    return jnp.stack([velocity, -gravity * jnp.sin(angle)])


def pendulum_invariant(y, gravity=9.8):
    return np.array([y[1] ** 2 / 2 - gravity * np.cos(y[0])])


def lorenz(y, t, sigma, rho, beta):
    x, y, z = y
    return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])


def van_der_pol(y, t, mu):
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def brusselator(y, t):
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


def robertson(y, t):
    a, b, c = y
    one, two, three = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return jnp.stack([two - one, one - two - three, three])


def hires(y, t):
    """Schaefer (1975), high irradiance responses of photomorphogenesis (HW eq. IV.10.4)."""
    a, b, c, d, e, f, g, h = y
    bound = 280 * f * h
    return jnp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -bound + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            bound - 1.81 * g,
            1.81 * g - bound,
        ]
    )


def oregonator(y, t):
    """Field and Noyes (1974), the Belousov-Zhabotinsky reaction (HW eq. IV.10.3)."""
    a, b, c = y
    return jnp.stack(
        [77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)]
    )


def van_der_pol_scaled(y, t, mu):
    """van der Pol's equation in units of its slow time (HW eq. IV.10.2, with 1 / epsilon = mu)."""
    x, v = y
    return jnp.stack([v, mu * ((1 - x**2) * v - x)])


def kaps(y, t, stiffness):
    """Kaps (1981): in the limit of great stiffness a differential-algebraic equation."""
    a, b = y
    return jnp.stack([-(stiffness + 2) * a + stiffness * b**2, a - b - b**2])


def brusselator_line(y, t, diffusion):
    """The Brusselator with diffusion on a line (HW eq. IV.10.6): u and v in turn, df/dy has a band of 2."""
    u, v = jnp.asarray(y).reshape(-1, 2).T
    rate = diffusion * (len(u) + 1) ** 2
    spread = lambda x, end: rate * jnp.diff(jnp.pad(x, 1, constant_values=end), n=2)
    du = 1 + u**2 * v - 4 * u + spread(u, 1)
    dv = 3 * u - u**2 * v + spread(v, 3)
    return jnp.stack([du, dv], 1).reshape(-1)


def brusselator_start(points):
    x = np.arange(1, points + 1) / (points + 1)
    return np.stack([1 + np.sin(2 * np.pi * x), np.full(points, 3.0)], 1).reshape(-1)


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
    "robertson": Problem(
        robertson,
        (1.0, 0.0, 0.0),
        40.0,
        stiff=True,
        end=(0.715827068719456, 9.1855347645598e-06, 0.284163745745778),
    ),
    # References: Mazzia and Magherini, Test set for IVP solvers, release 2.4; or SciPy's Radau at 1e-12.
    "robertson_long": Problem(
        robertson,
        (1.0, 0.0, 0.0),
        1e11,
        stiff=True,
        end=(0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050),  # test set
    ),
    "hires": Problem(
        hires,
        (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057),
        321.8122,
        stiff=True,
        end=(  # test set
            0.7371312573325668e-3,
            0.1442485726316185e-3,
            0.5888729740967575e-4,
            0.1175651343283149e-2,
            0.2386356198831331e-2,
            0.6238968252742796e-2,
            0.2849998395185769e-2,
            0.2850001604814231e-2,
        ),
    ),
    "oregonator": Problem(
        oregonator,
        (1.0, 2.0, 3.0),
        360.0,
        stiff=True,
        end=(0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3),  # test set
    ),
    "van_der_pol_1e3": Problem(
        van_der_pol_scaled,
        (2.0, 0.0),
        2.0,
        args=(1e3,),
        stiff=True,
        end=(1.763234540203, -0.8356886816777),  # SciPy
    ),
    "van_der_pol_1e6": Problem(
        van_der_pol_scaled,
        (2.0, 0.0),
        2.0,
        args=(1e6,),
        stiff=True,
        end=(0.1706167732170483e1, -0.8928097010247975),  # test set
    ),
    "kaps": Problem(
        kaps,
        (1.0, 1.0),
        5.0,
        args=(1e6,),
        stiff=True,
        exact=lambda t: np.array([np.exp(-2 * t), np.exp(-t)]),
    ),
    "prothero_robinson": Problem(
        forced, (1.0,), 10.0, args=(1e6,), stiff=True, exact=lambda t: np.array([np.cos(t)])
    ),
    "brusselator_line": Problem(
        brusselator_line,
        brusselator_start(20),
        10.0,
        args=(1 / 50,),
        stiff=True,
        end=(
            0.8776530097283,
            3.15470390906,
            0.7658928273838,
            3.295548820091,
            0.6712478470947,
            3.413643265487,
            0.5958550017513,
            3.505830090093,
            0.538646967714,
            3.573451166363,
            0.496938601873,
            3.620405791384,
            0.4676720876727,
            3.651446867542,
            0.44813203482,
            3.67104542309,
            0.4362471260013,
            3.682770846862,
            0.4306606757477,
            3.689013042768,
            0.4307112500402,
            3.690887551249,
            0.4364053271659,
            3.688219383002,
            0.4484169183818,
            3.679556662845,
            0.4681131789868,
            3.662214785968,
            0.4975692041709,
            3.632401031451,
            0.5394886457357,
            3.585523548819,
            0.5968897247447,
            3.516839975568,
            0.6723805302574,
            3.422609112103,
            0.7669226841237,
            3.301778439248,
            0.8782943216043,
            3.157853117242,
        ),  # SciPy
    ),
}
