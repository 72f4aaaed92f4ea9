import dataclasses
@dataclasses.dataclass(frozen=True)
class Tableau:
    order: int
    c: tuple
    a: tuple
    b: tuple
    e: tuple
    error_order: int
    dense: tuple
    dense_order: int
    extra_c: tuple = ()
    extra_a: tuple = ()
import numpy as np
from scipy.integrate._ivp.rk import RK45
def _t(x): return tuple(map(float,x))
_a=[_t(RK45.A[i][:i]) for i in range(6)]+[_t(RK45.B)]
_b=_t(RK45.B)+(0.,)
dopri5=Tableau(5,_t(RK45.C)+(1.,),tuple(_a),_b,_t(-RK45.E),4,tuple(_t(r) for r in RK45.P.T),5)
rk4=Tableau(4,(0.,.5,.5,1.,1.),((),(.5,),(0.,.5),(0.,0.,1.),(1/6,1/3,1/3,1/6)),(1/6,1/3,1/3,1/6,0.),None,None,((0.,0.,0.,0.,0.),)*3,4)
methods={"dopri5":dopri5,"tsit5":dopri5,"rk4":rk4}
def named(m): return methods[m] if isinstance(m,str) else m
