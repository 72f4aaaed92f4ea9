"""Every explicit Runge-Kutta table, each one value. Adding a method is adding one here.

A table is kept closed: its last stage is the derivative at the end of the step (c = 1, a = b), and
serves as the first stage of the next one. Tables printed without that stage get it.

References: Hairer, Norsett, Wanner (1993), Solving Ordinary Differential Equations I (HNW);
Bogacki, Shampine (1989); Dormand, Prince (1980); Tsitouras (2011); Shampine (1986).
"""

import dataclasses
import difflib
from fractions import Fraction as F


@dataclasses.dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method with s stages, closed.

    Attributes:
        order: that of the solution carried on, y1 = y + h sum_i b_i k_i.
        c, a, b: nodes, rows (row i has i entries) and weights (the last is 0).
        e: b minus the weights of the embedded solution; None if there is none (fixed steps only).
        error_order: the order of the embedded solution.
        e_low: a second, lower error estimate r3 that sharpens the first, r5, to
            r5^2 / sqrt(r5^2 + 0.01 r3^2) (HNW eq. II.10.17), if there is one.
        dense: row p holds the coefficients of theta^(p+1) in b_i(theta), where
            y(t + theta h) = y + h sum_i b_i(theta) k_i.
        dense_order: the order with which that converges, uniformly over the interval.
        extra_c, extra_a: further stages that only dense output uses.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None
    error_order: int | None
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    extra_c: tuple[float, ...] = ()
    extra_a: tuple[tuple[float, ...], ...] = ()
    e_low: tuple[float, ...] | None = None


def tableau(
    order,
    *,
    c,
    a,
    b,
    e=None,
    e_low=None,
    error_order=None,
    dense=None,
    dense_order=None,
    extra_c=(),
    extra_a=(),
) -> Tableau:
    """A table as the literature prints it: closed if it is not, checked, and made floats.

    `error_order` is order - 1 unless given. Without `dense`, dense output is the cubic Hermite
    interpolant of the two ends of the step (HNW eq. II.6.7), of order min(order, 4).

    Raises:
        ValueError: shapes do not fit, a row does not sum to its node, the weights do not sum to 1,
            those of the error to 0, or those of dense output at theta = 1 to b.

    >>> heun = tableau(2, c=[0, 1], a=[[], [1]], b=[1/2, 1/2], e=[-1/2, 1/2])
    >>> heun.c, heun.b
    ((0.0, 1.0, 1.0), (0.5, 0.5, 0.0))
    """
    c, a, b = list(c), [list(row) for row in a], list(b)
    closed = len(b) > 1 and c[-1] == 1 and a[-1] == b[:-1] and b[-1] == 0
    if not closed:
        c, a, b = [*c, 1], [*a, b], [*b, 0]
    stages = len(c)
    e, e_low = (None if x is None else [*x, *[0] * (stages - len(x))] for x in (e, e_low))
    dense = (
        hermite(b)
        if dense is None
        else [[*row, *[0] * (stages + len(extra_c) - len(row))] for row in dense]
    )
    check(c, a, b, e, e_low, dense, extra_c, extra_a)
    return Tableau(
        order=order,
        c=floats(c),
        a=tuple(map(floats, a)),
        b=floats(b),
        e=None if e is None else floats(e),
        error_order=None if e is None else error_order or order - 1,
        dense=tuple(map(floats, dense)),
        dense_order=dense_order or min(order, 4),
        extra_c=floats(extra_c),
        extra_a=tuple(map(floats, extra_a)),
        e_low=None if e_low is None else floats(e_low),
    )


def floats(xs) -> tuple[float, ...]:
    return tuple(map(float, xs))


def check(c, a, b, e, e_low, dense, extra_c, extra_a):
    """Raise a ValueError that names what is wrong with a table."""
    stages = len(c)
    errors = {name: x for name, x in {"e": e, "e_low": e_low}.items() if x is not None}
    if any(len(x) != stages for x in (a, b, *errors.values())):
        raise ValueError(
            f"A table with {stages} nodes c needs as many rows a and weights b (and e, e_low)."
        )
    if len(extra_c) != len(extra_a):
        raise ValueError(
            f"`extra_a` needs one row for each node of `extra_c`: "
            f"got {len(extra_a)} rows and {len(extra_c)} nodes."
        )
    if e is None and e_low is not None:
        raise ValueError("`e_low` only sharpens the estimate `e`: pass `e` as well.")
    if not near(sum(b), 1):
        raise ValueError(f"The weights `b` must sum to 1, got {float(sum(b))}.")
    for i, row in enumerate([*a, *extra_a]):
        node = [*c, *extra_c][i]
        if len(row) != i:
            raise ValueError(
                f"Row {i} of `a` must have {i} entries (the method is explicit), got {len(row)}."
            )
        if not near(sum(row), node):
            raise ValueError(f"Row {i} of `a` must sum to c[{i}] = {node}, got {float(sum(row))}.")
    for name, x in errors.items():
        if not near(sum(x), 0):
            raise ValueError(
                f"The weights `{name}` of the error must sum to 0, got {float(sum(x))}: "
                "they are b - b_hat."
            )
    columns = stages + len(extra_c)
    if any(len(row) != columns for row in dense):
        raise ValueError(f"Every row of `dense` needs an entry for each of {columns} stages.")
    for i, (column, w) in enumerate(zip(zip(*dense), [*b, *[0] * len(extra_c)])):
        if not near(sum(column), w, 1e-10):  # coefficients reach 500 in dop853
            raise ValueError(
                f"Column {i} of `dense` must sum to the weight {float(w)} of its stage, got "
                f"{float(sum(column))}: at theta = 1 dense output is the end of the step."
            )


def near(x, y, tolerance=1e-12) -> bool:
    """|x - y| <= tolerance; false where either is nan."""
    return abs(float(x) - float(y)) <= tolerance


def hermite(b):
    """The cubic through y, y', y1, y1', as weights of k (HNW eq. II.6.7)."""
    first = [int(i == 0) for i in range(len(b))]
    last = [int(i == len(b) - 1) for i in range(len(b))]
    return [
        first,
        [3 * w - 2 * i - j for w, i, j in zip(b, first, last)],
        [-2 * w + i + j for w, i, j in zip(b, first, last)],
    ]


euler = tableau(1, c=[0], a=[[]], b=[1])

midpoint = tableau(2, c=[0, F(1, 2)], a=[[], [F(1, 2)]], b=[0, 1], e=[-1, 1])

heun = tableau(2, c=[0, 1], a=[[], [1]], b=[F(1, 2), F(1, 2)], e=[-F(1, 2), F(1, 2)])

ralston = tableau(2, c=[0, F(2, 3)], a=[[], [F(2, 3)]], b=[F(1, 4), F(3, 4)], e=[-F(3, 4), F(3, 4)])

bosh3 = tableau(
    3,
    c=[0, F(1, 2), F(3, 4), 1],
    a=[[], [F(1, 2)], [0, F(3, 4)], [F(2, 9), F(1, 3), F(4, 9)]],
    b=[F(2, 9), F(1, 3), F(4, 9), 0],
    e=[F(2, 9) - F(7, 24), F(1, 3) - F(1, 4), F(4, 9) - F(1, 3), -F(1, 8)],
)

rk4 = tableau(
    4,
    c=[0, F(1, 2), F(1, 2), 1],
    a=[[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]],
    b=[F(1, 6), F(1, 3), F(1, 3), F(1, 6)],
)

rk4_38 = tableau(
    4,
    c=[0, F(1, 3), F(2, 3), 1],
    a=[[], [F(1, 3)], [-F(1, 3), 1], [1, -1, 1]],
    b=[F(1, 8), F(3, 8), F(3, 8), F(1, 8)],
)

# HNW table II.5.1; the solution of order 5 is carried on.
fehlberg45 = tableau(
    5,
    c=[0, F(1, 4), F(3, 8), F(12, 13), 1, F(1, 2)],
    a=[
        [],
        [F(1, 4)],
        [F(3, 32), F(9, 32)],
        [F(1932, 2197), -F(7200, 2197), F(7296, 2197)],
        [F(439, 216), -8, F(3680, 513), -F(845, 4104)],
        [-F(8, 27), 2, -F(3544, 2565), F(1859, 4104), -F(11, 40)],
    ],
    b=[F(16, 135), 0, F(6656, 12825), F(28561, 56430), -F(9, 50), F(2, 55)],
    e=[F(1, 360), 0, -F(128, 4275), -F(2197, 75240), F(1, 50), F(2, 55)],
)

cash_karp = tableau(
    5,
    c=[0, F(1, 5), F(3, 10), F(3, 5), 1, F(7, 8)],
    a=[
        [],
        [F(1, 5)],
        [F(3, 40), F(9, 40)],
        [F(3, 10), -F(9, 10), F(6, 5)],
        [-F(11, 54), F(5, 2), -F(70, 27), F(35, 27)],
        [F(1631, 55296), F(175, 512), F(575, 13824), F(44275, 110592), F(253, 4096)],
    ],
    b=[F(37, 378), 0, F(250, 621), F(125, 594), 0, F(512, 1771)],
    e=[
        F(37, 378) - F(2825, 27648),
        0,
        F(250, 621) - F(18575, 48384),
        F(125, 594) - F(13525, 55296),
        -F(277, 14336),
        F(512, 1771) - F(1, 4),
    ],
)

# HNW table II.5.2; dense output of Shampine (1986), HNW eq. II.6.12 f.
dopri5 = tableau(
    5,
    c=[0, F(1, 5), F(3, 10), F(4, 5), F(8, 9), 1, 1],
    a=[
        [],
        [F(1, 5)],
        [F(3, 40), F(9, 40)],
        [F(44, 45), -F(56, 15), F(32, 9)],
        [F(19372, 6561), -F(25360, 2187), F(64448, 6561), -F(212, 729)],
        [F(9017, 3168), -F(355, 33), F(46732, 5247), F(49, 176), -F(5103, 18656)],
        [F(35, 384), 0, F(500, 1113), F(125, 192), -F(2187, 6784), F(11, 84)],
    ],
    b=[F(35, 384), 0, F(500, 1113), F(125, 192), -F(2187, 6784), F(11, 84), 0],
    e=[F(71, 57600), 0, -F(71, 16695), F(71, 1920), -F(17253, 339200), F(22, 525), -F(1, 40)],
    dense=[
        [1, 0, 0, 0, 0, 0, 0],
        [
            -F(8048581381, 2820520608),
            0,
            F(131558114200, 32700410799),
            -F(1754552775, 470086768),
            F(127303824393, 49829197408),
            -F(282668133, 205662961),
            F(40617522, 29380423),
        ],
        [
            F(8663915743, 2820520608),
            0,
            -F(68118460800, 10900136933),
            F(14199869525, 1410260304),
            -F(318862633887, 49829197408),
            F(2019193451, 616988883),
            -F(110615467, 29380423),
        ],
        [
            -F(12715105075, 11282082432),
            0,
            F(87487479700, 32700410799),
            -F(10690763975, 1880347072),
            F(701980252875, 199316789632),
            -F(1453857185, 822651844),
            F(69997945, 29380423),
        ],
    ],
    dense_order=5,
)

# Tsitouras (2011), with his dense output.
tsit5 = tableau(
    5,
    c=[0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1],
    a=[
        [],
        [0.161],
        [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        [
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ],
        [
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ],
    ],
    b=[
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
        0,
    ],
    e=[
        0.0017800110522257773,
        0.0008164344596567463,
        -0.007880878010261994,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918686,
        -0.015151515151515152,
    ],
    dense=[
        [1, 0, 0, 0, 0, 0, 0],
        [
            -2.763706197274826,
            0.13169999999999998,
            3.9302962368947516,
            -12.411077166933676,
            37.50931341651104,
            -27.896526289197286,
            1.5,
        ],
        [
            2.9132554618219126,
            -0.2234,
            -5.941033872131505,
            30.33818863028232,
            -88.1789048947664,
            65.09189467479366,
            -4,
        ],
        [
            -1.0530884977290216,
            0.1017,
            2.490627285651253,
            -16.548102889244902,
            47.37952196281928,
            -34.87065786149661,
            2.5,
        ],
    ],
    dense_order=5,
)

# HNW sec. II.10 (the code DOP853): an error estimate from two embedded solutions, of orders 5 and 3;
# dense output of order 7 with three further stages.
dop853 = tableau(
    8,
    c=[
        0,
        0.05260015195876773,
        0.0789002279381516,
        0.1183503419072274,
        0.2816496580927726,
        0.3333333333333333,
        0.25,
        0.3076923076923077,
        0.6512820512820513,
        0.6,
        0.8571428571428571,
        1,
    ],
    a=[
        [],
        [0.05260015195876773],
        [0.0197250569845379, 0.0591751709536137],
        [0.02958758547680685, 0, 0.08876275643042054],
        [0.2413651341592667, 0, -0.8845494793282861, 0.924834003261792],
        [0.037037037037037035, 0, 0, 0.17082860872947386, 0.12546768756682242],
        [0.037109375, 0, 0, 0.17025221101954405, 0.06021653898045596, -0.017578125],
        [
            0.03709200011850479,
            0,
            0,
            0.17038392571223998,
            0.10726203044637328,
            -0.015319437748624402,
            0.008273789163814023,
        ],
        [
            0.6241109587160757,
            0,
            0,
            -3.3608926294469414,
            -0.868219346841726,
            27.59209969944671,
            20.154067550477894,
            -43.48988418106996,
        ],
        [
            0.47766253643826434,
            0,
            0,
            -2.4881146199716677,
            -0.590290826836843,
            21.230051448181193,
            15.279233632882423,
            -33.28821096898486,
            -0.020331201708508627,
        ],
        [
            -0.9371424300859873,
            0,
            0,
            5.186372428844064,
            1.0914373489967295,
            -8.149787010746927,
            -18.52006565999696,
            22.739487099350505,
            2.4936055526796523,
            -3.0467644718982196,
        ],
        [
            2.273310147516538,
            0,
            0,
            -10.53449546673725,
            -2.0008720582248625,
            -17.9589318631188,
            27.94888452941996,
            -2.8589982771350235,
            -8.87285693353063,
            12.360567175794303,
            0.6433927460157636,
        ],
    ],
    b=[
        0.054293734116568765,
        0,
        0,
        0,
        0,
        4.450312892752409,
        1.8915178993145003,
        -5.801203960010585,
        0.3111643669578199,
        -0.1521609496625161,
        0.20136540080403034,
        0.04471061572777259,
    ],
    e=[
        0.01312004499419488,
        0,
        0,
        0,
        0,
        -1.2251564463762044,
        -0.4957589496572502,
        1.6643771824549864,
        -0.35032884874997366,
        0.3341791187130175,
        0.08192320648511571,
        -0.022355307863886294,
        0,
    ],
    e_low=[
        -0.18980075407240762,
        0,
        0,
        0,
        0,
        4.450312892752409,
        1.8915178993145003,
        -5.801203960010585,
        -0.4226823213237919,
        -0.1521609496625161,
        0.20136540080403034,
        0.02265179219836082,
        0,
    ],
    error_order=7,
    dense=[
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [
            -10.266057073759308,
            0,
            0,
            0,
            0,
            13.917653631776606,
            2.605603751993609,
            -15.018944223519686,
            3.050527683318488,
            -1.3278744327655212,
            2.844533632672879,
            0.7657106259527865,
            -1.0889903364513334,
            18.148505520854727,
            -9.194632392478356,
            -4.436036387594894,
        ],
        [
            48.161850968566455,
            0,
            0,
            0,
            0,
            -154.78787266663718,
            -21.62282238462651,
            160.09447708973047,
            -38.54396729189063,
            16.661770430049543,
            -36.558295489910115,
            -9.906995535619368,
            14.097013042320002,
            -127.63310949253875,
            93.3567459327894,
            56.68120539776666,
        ],
        [
            -114.93304874997833,
            0,
            0,
            0,
            0,
            522.921908960822,
            2.5351820289667772,
            -474.3071826037643,
            174.47140009219885,
            -74.44027814126304,
            170.69007169147514,
            46.8029919188744,
            -66.68230591294363,
            357.3419516129657,
            -282.6272618704363,
            -261.7734290269171,
        ],
        [
            147.46446875669767,
            0,
            0,
            0,
            0,
            -456.2591884020879,
            292.25417465990404,
            135.96036916173836,
            -337.05134702387716,
            140.75210016191608,
            -345.9748485480496,
            -96.5198694669957,
            137.96299063474373,
            -500.7031507909224,
            361.14007718803333,
            520.9742236688994,
        ],
        [
            -97.06685363011368,
            0,
            0,
            0,
            0,
            -75.5319373213575,
            -505.40999933296894,
            545.1091945264187,
            291.7898750908326,
            -119.2562021040512,
            313.299553623578,
            88.74316650017616,
            -127.82216401767991,
            349.17035710882897,
            -201.85219053352347,
            -461.1727999101397,
        ],
        [
            25.69393346270375,
            0,
            0,
            0,
            0,
            154.18974869023643,
            231.5293791760455,
            -357.6391179106141,
            -93.40532418362432,
            37.45832313645163,
            -104.0996495089623,
            -29.8402934266605,
            43.53345659001114,
            -96.32455395918828,
            39.17726167561544,
            149.72683625798564,
        ],
    ],
    dense_order=8,
    extra_c=[0.1, 0.2, 0.7777777777777778],
    extra_a=[
        [
            0.056167502283047954,
            0,
            0,
            0,
            0,
            0,
            0.25350021021662483,
            -0.2462390374708025,
            -0.12419142326381637,
            0.15329179827876568,
            0.00820105229563469,
            0.007567897660545699,
            -0.008298,
        ],
        [
            0.03183464816350214,
            0,
            0,
            0,
            0,
            0.028300909672366776,
            0.053541988307438566,
            -0.05492374857139099,
            0,
            0,
            -0.00010834732869724932,
            0.0003825710908356584,
            -0.00034046500868740456,
            0.1413124436746325,
        ],
        [
            -0.42889630158379194,
            0,
            0,
            0,
            0,
            -4.697621415361164,
            7.683421196062599,
            4.06898981839711,
            0.3567271874552811,
            0,
            0,
            0,
            -0.0013990241651590145,
            2.9475147891527724,
            -9.15095847217987,
        ],
    ],
)

methods: dict[str, Tableau] = {
    name: value for name, value in list(globals().items()) if isinstance(value, Tableau)
}
methods["dopri8"] = dop853


def named(method: str | Tableau, methods=methods):
    """The table of that name in a catalogue, or the table itself."""
    if isinstance(method, Tableau):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"`method` must be a name or a Tableau (see jaxode.tableaus.tableau), got {type(method).__name__}."
        )
    if method not in methods:
        close = difflib.get_close_matches(method.lower(), methods, 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"There is no method '{method}'.{hint} Methods: {', '.join(methods)}.")
    return methods[method]
