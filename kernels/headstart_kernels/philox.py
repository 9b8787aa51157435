"""Counter-based unit normals as numbers: the constants of Philox 4x32-10 and of our Box-Muller.

    words  = philox4x32_10(counter, key)          Salmon et al., SC'11, "Parallel random numbers:
    key     = (seed mod 2^32, seed div 2^32)       as easy as 1, 2, 3"
    counter = (element div 4, row + 1, sample, 0)  row + 1 = 0 is the initial draw

    radius  r = sqrt(-2 ln v),  v = (w + 1/2)*2^-32      from words 0 and 2
    angle   a = (pi/2)*(q + t), w = 2^30*(q + t), |t| <= 1/2, q integer      from words 1 and 3
    normals = (r01*cos a01, r01*sin a01, r23*cos a23, r23*sin a23)           elements 4i .. 4i+3

Library log, sine and cosine differ from device to device, so each is a polynomial made of float32
`+`, `-`, `*` in a fixed order, the square root is correctly rounded, words become floats by the
correctly rounded conversion, and exponents are taken with integer operations. Every one of these is
exact under IEEE 754, so the bits agree wherever the compiler is told not to contract `a*b + c`.

    -2 ln v     = f*(-2 + f*(1 + f*LOG(f))) + e*MINUS_2_LN_2,   v = 2^e*(1 + f), |f| <= 1/3
    sin(pi/2 t) = t*SIN(t*t)          cos(pi/2 t) = 1 + (t*t)*COS(t*t)

From w = UPPER on, where v >= 2/3, e is 0 and f = -((2^32 - 1 - w)*2^-32 + 2^-33), not v - 1: the
float32 nearest to v would lose the small radii, of which v near 1 has all.

The coefficients (lowest order first) are the float32 rounding of the polynomial that interpolates
each function at Chebyshev points; `tests/kernels/test_philox.py` derives them again. Approximation
error with these rounded coefficients, evaluated exactly: 1.5e-8 in -2 ln v, 2.4e-8 in sin, 9.2e-9
in cos. The smallest v is 2^-33, so no normal exceeds sqrt(66 ln 2) = 6.76371 (P = 1.3e-11).
"""

INITIAL = -1
"""The `step` of the draw that starts a run; rows of the table are 0, 1, 2, ..."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

LOG = (
    -0.6666663885116577,
    0.4999997615814209,
    -0.40007561445236206,
    0.3334028124809265,
    -0.28236618638038635,
    0.2469238042831421,
    -0.2685149908065796,
    0.24251161515712738,
)
MINUS_2_LN_2 = -1.3862943649291992
SIN = (1.5707963705062866, -0.6459634900093079, 0.07968021929264069, -0.004602149128913879)
COS = (-1.2337005138397217, 0.253669410943985, -0.02086152881383896, 0.0009067399078048766)

TWO_THIRDS_BITS = 0x3F2AAAAB
"""The float32 bit pattern of 2/3: 1 + f lies in [2/3, 4/3)."""

UPPER = 0xAAAAAAAB
"""Words from here on have v >= 2/3."""

LARGEST_NORMAL = 6.7638
"""No |normal| exceeds this: sqrt(66 ln 2), rounded up in the fourth decimal."""
