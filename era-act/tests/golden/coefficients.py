"""Fits the polynomials of src/real.rs and prints them as Rust constants, with the worst relative error of each.

    exp(r)            on |r| <= ln 2 / 2          1 + r + r^2 * EXP(r)
    log1p(e)          on 0 <= e <= 1              2 s + s^3 * LOG1P(s^2), s = e / (2 + e)
    erfcx(x)          on 0 <= x                   ERFCX(t) / (1 + 2 x), t = (x - 3.75) / (x + 3.75), a Chebyshev series

Needs mpmath. Chebyshev interpolation in 40 digits is within a few percent of the best polynomial here.
"""
import mpmath as mp

mp.mp.dps = 40


def interpolate(f, lo, hi, degree):
    """Monomial coefficients, lowest power first, of the interpolant at the Chebyshev nodes of [lo, hi]."""
    n = degree + 1
    nodes = [(lo + hi) / 2 + (hi - lo) / 2 * mp.cos(mp.pi * (2 * k + 1) / (2 * n)) for k in range(n)]
    matrix = mp.matrix(n, n)
    for i, x in enumerate(nodes):
        for j in range(n):
            matrix[i, j] = x**j
    return list(mp.lu_solve(matrix, mp.matrix([f(x) for x in nodes])))


def chebyshev(f, terms):
    """Coefficients of the Chebyshev series of f on [-1, 1]; the first one is already halved."""
    n = 80
    angles = [mp.pi * (2 * k + 1) / (2 * n) for k in range(n)]
    values = [f(mp.cos(a)) for a in angles]
    c = [2 / mp.mpf(n) * sum(v * mp.cos(j * a) for v, a in zip(values, angles)) for j in range(terms)]
    c[0] /= 2
    return c


def show(name, kind, coefficients, digits):
    print(f"const {name}: [{kind}; {len(coefficients)}] = [")
    for c in coefficients:
        print(f"    {mp.nstr(c, digits, min_fixed=-5, max_fixed=5)},")
    print("];")


def horner(c, x):
    return mp.polyval(c[::-1], x)


half = mp.log(2) / 2
exp = interpolate(lambda r: (mp.exp(r) - 1 - r) / r**2 if abs(r) > mp.mpf(10) ** -12 else mp.mpf(1) / 2, -half, half, 4)
worst = max(abs((1 + r + r**2 * horner(exp, r)) / mp.exp(r) - 1) for r in mp.linspace(-half, half, 501))
show("EXP", "f32", exp, 10)
print(f"// worst relative error {mp.nstr(worst, 3)}\n")

ninth = mp.mpf(1) / 9


def tail(w):
    s = mp.sqrt(w)
    return (2 * mp.atanh(s) - 2 * s) / s**3 if w > mp.mpf(10) ** -20 else mp.mpf(2) / 3


log1p = interpolate(tail, mp.mpf(0), ninth, 4)
worst = 0
for e in mp.linspace(mp.mpf(1) / 1000, 1, 501):
    s = e / (2 + e)
    worst = max(worst, abs((2 * s + s**3 * horner(log1p, s * s)) / mp.log1p(e) - 1))
show("LOG1P", "f32", log1p, 10)
print(f"// worst relative error {mp.nstr(worst, 3)}\n")


def erfcx(x):
    return mp.exp(x * x) * mp.erfc(x) if x < 60 else mp.nsum(
        lambda k: (-1) ** int(k) * mp.fac2(2 * int(k) - 1) / (2 * x * x) ** int(k), [0, 12]) / (x * mp.sqrt(mp.pi))


def scaled(t):
    if t > 1 - mp.mpf(10) ** -18:
        return 2 / mp.sqrt(mp.pi)
    x = mp.mpf(3.75) * (1 + t) / (1 - t)
    return (1 + 2 * x) * erfcx(x)


for kind, terms, digits in (("f32", 12, 10), ("f64", 25, 20)):
    c = chebyshev(scaled, terms)
    worst = max(
        abs(sum(v * mp.chebyt(j, t) for j, v in enumerate(c)) / scaled(t) - 1) for t in mp.linspace(-1, mp.mpf("0.999"), 401))
    show(f"ERFCX_{kind.upper()}", kind, c, digits)
    print(f"// worst relative error {mp.nstr(worst, 3)}\n")
