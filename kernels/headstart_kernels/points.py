"""Winograd's minimal filtering F(4x4, 3x3) as numbers: the points of interpolation, the matrices.

    y = A^T [(G g G^T) * (B^T d B)] A + bias      Lavin and Gray, arXiv:1509.09308, equation (8)

g [3, 3] is a filter, d [6, 6] a tile of the image, y [4, 4] its outputs, `*` is element by element:
36 products where the definition has 144. Along one side the points are 0, +-P, +-Q and infinity:

    A^T = [1, 1,  1, 1,  1, 0]        G = rows [1, a, a^2]/N(a) for each point a, and [0, 0, 1],
          [0, P, -P, Q, -Q, 0]            N(0) = P^2 Q^2, N(+-P) = 2P^2(P^2 - Q^2),
          [0, P^2, P^2, Q^2, Q^2, 0]      N(+-Q) = 2Q^2(Q^2 - P^2)
          [0, P^3, -P^3, Q^3, -Q^3, 1]

    B^T d = [P^2 Q^2 d0 - (P^2 + Q^2) d2 + d4,
             (d4 - Q^2 d2) +- P (d3 - Q^2 d1),   (d4 - P^2 d2) +- Q (d3 - P^2 d1),
             P^2 Q^2 d1 - (P^2 + Q^2) d3 + d5]

The points decide the rounding error (Barabasz et al., arXiv:1803.10986). Relative to float64, for
normal filters and the silu of normal images, 320 and 1280 inputs, float32 products of MKL: 0, +-1,
+-2 (the usual ones) 2.5e-6 and 2.8e-6; 0, +-1, 1/2, -2 1.7e-6; 0, +-3/4, +-3/2 1.2e-6 and 1.3e-6;
these 1.1e-6 and 1.2e-6, where oneDNN's direct convolution has 9.4e-7. P, Q and what follows from
them are exact in float32. A whole UNet of SD1.5's size (32x32 latents, all its 3x3 convolutions of
stride 1 in C): 2.4e-6, with oneDNN's 2.2e-6; a VAE's decoder (128x128 pixels): 5.2e-6 and 5.9e-6.
"""

P, Q = 0.625, 1.5

TILE = 4
"""Outputs of a tile, each way."""
POINTS = TILE + 2
"""Inputs of a tile, each way."""
PLACES = POINTS * POINTS
"""Products of a tile, input and output."""
PANEL, SLICE = 64, 16
"""Outputs that a product of matrices takes at a time, and those whose weights lie together."""


def output_matrix() -> list[list[float]]:
    """A^T [4, 6]."""
    rows = [[a**power for a in (0.0, P, -P, Q, -Q)] for power in range(TILE)]
    return [[*row, float(power == TILE - 1)] for power, row in enumerate(rows)]


def filter_matrix() -> list[list[float]]:
    """G [6, 3]."""
    p, q = P * P, Q * Q
    below = {0.0: p * q, P: 2 * p * (p - q), Q: 2 * q * (q - p)}
    rows = [[a**power / below[abs(a)] for power in range(3)] for a in (0.0, P, -P, Q, -Q)]
    return [*rows, [0.0, 0.0, 1.0]]


def input_matrix() -> list[list[float]]:
    """B^T [6, 6]."""
    p, q = P * P, Q * Q
    return [
        [p * q, 0.0, -(p + q), 0.0, 1.0, 0.0],
        *([0.0, -a * q, -q, a, 1.0, 0.0] for a in (P, -P)),
        *([0.0, -a * p, -p, a, 1.0, 0.0] for a in (Q, -Q)),
        [0.0, p * q, 0.0, -(p + q), 0.0, 1.0],
    ]
