"""The additive Runge-Kutta methods of Kennedy and Carpenter: an implicit table and an explicit one.

Given one function they are ESDIRK methods; given a pair (stiff, nonstiff) they are implicit in the first
and explicit in the second (IMEX), with the same stages, nodes, and weights b.

What drives a fast mode belongs with it, into the first function. The two tables agree on what a stage is
only to low order in the step. Where large terms of the second function balance large ones of the first,
their difference is what is left (reduction of order), and steps become about as short as an explicit
method would need. Accepted steps of kencarp4 to t = 10 for dy/dt = -l y + l cos(t), y(0) = 1, at
rtol = atol = 1e-4, with an error below 1e-5 in all (November 2026):

| l | both terms first | l cos(t) second |
|---|---|---|
| 10 | 45 | 195 |
| 100 | 60 | 1,010 |
| 10,000 | 64 | 23,661 |

So boundary values and sources of a diffusion go into the first function, with it. A second function whose
terms stay of the size of the slope itself (advection, a slow reaction) costs no steps.

Reference: Kennedy and Carpenter (2003), Additive Runge-Kutta schemes for convection-diffusion-reaction
equations, Applied Numerical Mathematics 44, 139-181, appendix C.
"""

from jaxode.methods.esdirk import Esdirk, esdirk
from jaxode.methods.method import Method


def kencarp(order, *, gamma, c, a, b, b_low, explicit, dense_order, caution) -> Esdirk:
    """A method as it is printed: rows of both tables after the first, without the diagonal."""
    return esdirk(
        order,
        gamma=gamma,
        c=c,
        a=[[], *a, b[:-1]],
        e=[x - y for x, y in zip(b, b_low, strict=True)],
        guess=straight(c),
        explicit=[[], *explicit],
        dense_order=dense_order,
        caution=caution,
    )


def straight(c) -> list[list[float]]:
    """First guesses of slopes: on the line through that at the start and that of the nearest node before."""
    rows: list[list[float]] = [[], [1.0]]
    for i in range(2, len(c)):
        near = min(range(1, i), key=lambda j: abs(c[j] - c[i]))
        row = [0.0] * i
        row[0], row[near] = 1 - c[i] / c[near], c[i] / c[near]
        rows.append(row)
    return rows


_gamma = 1767732205903 / 4055673282236
kencarp3 = kencarp(
    3,
    gamma=_gamma,
    c=[0, 2 * _gamma, 3 / 5, 1],
    a=[[_gamma], [2746238789719 / 10658868560708, -640167445237 / 6845629431997]],
    b=[
        1471266399579 / 7840856788654,
        -4482444167858 / 7529755066697,
        11266239266428 / 11593286722821,
        _gamma,
    ],
    b_low=[
        2756255671327 / 12835298489170,
        -10771552573575 / 22201958757719,
        9247589265047 / 10645013368117,
        2193209047091 / 5459859503100,
    ],
    explicit=[
        [2 * _gamma],
        [5535828885825 / 10492691773637, 788022342437 / 10882634858940],
        [
            6485989280629 / 16251701735622,
            -4246266847089 / 9704473918619,
            10755448449292 / 10357097424841,
        ],
    ],
    dense_order=3,
    caution=25,
)
"""ARK3(2)4L[2]SA: order 3(2), four stages."""

kencarp4 = kencarp(
    4,
    gamma=1 / 4,
    c=[0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1],
    a=[
        [1 / 4],
        [8611 / 62500, -1743 / 31250],
        [5012029 / 34652500, -654441 / 2922500, 174375 / 388108],
        [
            15267082809 / 155376265600,
            -71443401 / 120774400,
            730878875 / 902184768,
            2285395 / 8070912,
        ],
    ],
    b=[82889 / 524892, 0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4],
    b_low=[
        4586570599 / 29645900160,
        0,
        178811875 / 945068544,
        814220225 / 1159782912,
        -3700637 / 11593932,
        61727 / 225920,
    ],
    explicit=[
        [1 / 2],
        [13861 / 62500, 6889 / 62500],
        [
            -116923316275 / 2393684061468,
            -2731218467317 / 15368042101831,
            9408046702089 / 11113171139209,
        ],
        [
            -451086348788 / 2902428689909,
            -2682348792572 / 7519795681897,
            12662868775082 / 11960479115383,
            3355817975965 / 11060851509271,
        ],
        [
            647845179188 / 3216320057751,
            73281519250 / 8382639484533,
            552539513391 / 3454668386233,
            3354512671639 / 8306763924573,
            4040 / 17871,
        ],
    ],
    dense_order=4,
    caution=14,
)
"""ARK4(3)6L[2]SA: order 4(3), six stages."""

kencarp5 = kencarp(
    5,
    gamma=41 / 200,
    c=[
        0,
        41 / 100,
        2935347310677 / 11292855782101,
        1426016391358 / 7196633302097,
        92 / 100,
        24 / 100,
        3 / 5,
        1,
    ],
    a=[
        [41 / 200],
        [41 / 400, -567603406766 / 11931857230679],
        [683785636431 / 9252920307686, 0, -110385047103 / 1367015193373],
        [
            3016520224154 / 10081342136671,
            0,
            30586259806659 / 12414158314087,
            -22760509404356 / 11113319521817,
        ],
        [
            218866479029 / 1489978393911,
            0,
            638256894668 / 5436446318841,
            -1179710474555 / 5321154724896,
            -60928119172 / 8023461067671,
        ],
        [
            1020004230633 / 5715676835656,
            0,
            25762820946817 / 25263940353407,
            -2161375909145 / 9755907335909,
            -211217309593 / 5846859502534,
            -0.5455337742238872,  # in print 2e-12 more: no condition of order holds then
        ],
    ],
    b=[
        -872700587467 / 9133579230613,
        0,
        0,
        22348218063261 / 9555858737531,
        -1143369518992 / 8141816002931,
        -39379526789629 / 19018526304540,
        32727382324388 / 42900044865799,
        41 / 200,
    ],
    b_low=[
        -975461918565 / 9796059967033,
        0,
        0,
        78070527104295 / 32432590147079,
        -548382580838 / 3424219808633,
        -33438840321285 / 15594753105479,
        3629800801594 / 4656183773603,
        4035322873751 / 18575991585200,
    ],
    explicit=[
        [41 / 100],
        [367902744464 / 2072280473677, 677623207551 / 8224143866563],
        [1268023523408 / 10340822734521, 0, 1029933939417 / 13636558850479],
        [
            14463281900351 / 6315353703477,
            0,
            66114435211212 / 5879490589093,
            -54053170152839 / 4284798021562,
        ],
        [
            14090043504691 / 34967701212078,
            0,
            15191511035443 / 11219624916014,
            -18461159152457 / 12425892160975,
            -281667163811 / 9011619295870,
        ],
        [
            19230459214898 / 13134317526959,
            0,
            21275331358303 / 2942455364971,
            -38145345988419 / 4862620318723,
            -1 / 8,
            -1 / 8,
        ],
        [
            -19977161125411 / 11928030595625,
            0,
            -40795976796054 / 6384907823539,
            177454434618887 / 12078138498510,
            782672205425 / 8267701900261,
            -69563011059811 / 9646580694205,
            7356628210526 / 4942186776405,
        ],
    ],
    dense_order=4,
    caution=30,
)
"""ARK5(4)8L[2]SA: order 5(4), eight stages."""

methods: dict[str, Method] = {"kencarp3": kencarp3, "kencarp4": kencarp4, "kencarp5": kencarp5}
"""Every method by its name."""
