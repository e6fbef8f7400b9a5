"""Golden values of every update rule, from PyTorch where it has the rule and from its formula where it has not.

    python rules.py > rules.json

Parameters and gradients follow from formulas that both sides compute exactly: every number is an integer over a
power of two. With k the position in `shapes`, i the element in row-major order and step = 1, 2, ..., `steps`:

    parameter(k)[i]      = (+1 if (i + k) is even, else -1) * (0.5 + ((37 i + 11 k) mod 512) / 512)
    gradient(k, step)[i] = ((h mod 2001) - 1000) / 1024 * 0.5^(step mod 5), h of 32 unsigned bits that wrap:
                           h = 2654435761 i + 2246822519 step + 3266489917 k;  h ^= h >> 15
                           h = 2246822519 h;  h ^= h >> 13

Gradients without the hash, as adamw.py has them, are matrices of low rank, and what an orthogonalisation makes of the
missing directions is rounding. Layout of the file:

    torch        the version that made it
    shapes       [[7, 5], [4, 9], [11], []]: a tall matrix, a wide one, a vector, a scalar
    steps        50
    checkpoints  [1, 10, 50]: the steps after which parameters are listed
    cases        a list of
      name       unique
      rule       "sgd", "lion", "adamw" or "orthogonal"
      source     "torch" (its own optimizer) or "formula" (written out below)
      which      the positions in `shapes` that the case trains; [0, 1] for orthogonal, all four for the others
      config     the hyper-parameters; all of a rule's keys are in every case of that rule:
        sgd         lr, weight_decay, momentum, nesterov
        lion        lr, weight_decay, beta1, beta2
        adamw       lr, weight_decay, beta1, beta2, eps, nesterov, cautious_update, cautious_decay
        orthogonal  lr, weight_decay, momentum, nesterov, ns_steps, coefficients, eps, cautious_decay,
                    row_beta2 (null: no second moment of rows), row_eps
      tolerance  null, or a list over `checkpoints` of a list over `which`: the error of parameters that rounding to
                 bf16 explains, as |got - expected|_2 / |expected - start|_2
      float64, float32   each a list over `checkpoints` of a list over `which` of flat row-major values

The formulas, with weight decay first, decoupled, and on all parameters, vectors and the scalar too:

    decay       p = p * (1 - lr * weight_decay)                                     unless cautious
                p = p - lr * weight_decay * p * [u * p > 0], u the update, p before it     cautious
    sgd         m = momentum * m + g  (m starts at 0, so m = g in step 1, as torch has it)
                u = g + momentum * m (Nesterov) or m;  p = p - lr * u
    lion        u = sign(beta1 * m + (1 - beta1) * g), sign(0) = 0;  p = p - lr * u;  m = beta2 * m + (1 - beta2) * g
                (Chen et al., arXiv 2302.06675)
    adamw       m, v as ever;  n = m / (1 - beta1^t)
                Nesterov:        n = beta1 * m / (1 - beta1^(t+1)) + (1 - beta1) * g / (1 - beta1^t)
                u = n / (sqrt(v / (1 - beta2^t)) + eps)
                cautious update: u = u * mask / max(mean(mask), 1e-3), mask = [u * g > 0]   (arXiv 2411.16085)
                p = p - lr * u
    orthogonal  m = m + (1 - momentum) * (g - m)
                x = g + momentum * (m - g) (Nesterov) or m
                O = NS(x): transpose if rows > columns; X = x / (|x|_F + eps); ns_steps times
                    A = X X^T,  X = a X + (b A + c A A) X;  transpose back
                u = 0.2 * sqrt(max(rows, columns)) * O
                with row_beta2 (NorMuon, arXiv 2510.05491):
                    s = s + (1 - row_beta2) * (mean over columns of O^2 - s), one number a row, s starts at 0
                    O = O / (sqrt(s / (1 - row_beta2^t)) + row_eps)
                    u = 0.2 * sqrt(rows * columns) * O / (|O|_F + row_eps)
                p = p - lr * u

torch.optim.Muon rounds x to bf16, divides by max(|x|_F, eps) and iterates in bf16. The orthogonal cases of source
"formula" iterate in the type of the parameters, and this script checks that torch's own Muon gives the same values once
its iteration is replaced by this one. The case of source "torch" is torch's own result; its tolerance is twice the error measured here
against the float64 formula.
"""
import json
import math
import sys

import torch
import torch.optim._muon as torch_muon

SHAPES = [[7, 5], [4, 9], [11], []]
STEPS = 50
CHECKPOINTS = [1, 10, 50]
# Signs and masks must not hang on the last bit: everything compared with 0 is exactly 0 or at least this large,
# relative to the terms it is a sum of.
MARGIN = 2e-5
smallest = math.inf


def parameter(k, dtype):
    n = torch.Size(SHAPES[k]).numel()
    values = [(1.0 if (i + k) % 2 == 0 else -1.0) * (0.5 + ((i * 37 + k * 11) % 512) / 512) for i in range(n)]
    return torch.tensor(values, dtype=dtype).reshape(SHAPES[k])


def gradient(k, step, dtype):
    n = torch.Size(SHAPES[k]).numel()
    scale = 0.5 ** (step % 5)
    values = [((mixed(i, step, k) % 2001) - 1000) / 1024 * scale for i in range(n)]
    return torch.tensor(values, dtype=dtype).reshape(SHAPES[k])


def mixed(i, step, k):
    h = (2654435761 * i + 2246822519 * step + 3266489917 * k) % 2**32
    h ^= h >> 15
    h = 2246822519 * h % 2**32
    return h ^ h >> 13


def clear_of_zero(x, *terms):
    """Notes how close to 0 a compared value comes, and returns it."""
    global smallest
    size = sum(t.abs() for t in terms)
    ratios = (x.abs() / size)[(size > 0) & (x != 0)]
    if ratios.numel():
        smallest = min(smallest, float(ratios.min()))
    return x


def decay(p, u, c):
    if c.get("cautious_decay"):
        p -= c["lr"] * c["weight_decay"] * p * (u * clear_of_zero(p, torch.ones_like(p)) > 0)
    else:
        p *= 1 - c["lr"] * c["weight_decay"]


def lion(p, g, s, t, c):
    m = s.setdefault("m", torch.zeros_like(p))
    a, b = c["beta1"] * m, (1 - c["beta1"]) * g
    u = torch.sign(clear_of_zero(a + b, a, b))
    decay(p, u, c)
    p -= c["lr"] * u
    m.copy_(c["beta2"] * m + (1 - c["beta2"]) * g)


def adamw(p, g, s, t, c):
    m, v = s.setdefault("m", torch.zeros_like(p)), s.setdefault("v", torch.zeros_like(p))
    b1, b2 = c["beta1"], c["beta2"]
    m += (1 - b1) * (g - m)
    v.copy_(b2 * v + (1 - b2) * g * g)
    if c["nesterov"]:
        terms = b1 * m / (1 - b1 ** (t + 1)), (1 - b1) * g / (1 - b1**t)
    else:
        terms = (m / (1 - b1**t),)
    # m itself is a sum of gradients of both signs
    n = clear_of_zero(sum(terms), *terms, torch.full_like(p, float(v.sqrt().mean())))
    u = n / ((v / (1 - b2**t)).sqrt() + c["eps"])
    if c["cautious_update"]:
        mask = (u * g > 0).to(p.dtype)
        u = u * mask / mask.mean().clamp(min=1e-3)
    decay(p, u, c)
    p -= c["lr"] * u


def newton_schulz(x, coefficients, steps, eps):
    a, b, c = coefficients
    tall = x.size(0) > x.size(1)
    X = x.mT if tall else x
    X = X / (X.norm() + eps)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


def orthogonal(p, g, s, t, c):
    rows, columns = p.shape
    m = s.setdefault("m", torch.zeros_like(p))
    m += (1 - c["momentum"]) * (g - m)
    x = g + c["momentum"] * (m - g) if c["nesterov"] else m
    O = newton_schulz(x, c["coefficients"], c["ns_steps"], c["eps"])
    if c["row_beta2"] is None:
        u = O * (0.2 * math.sqrt(max(rows, columns)))
    else:
        r = s.setdefault("rows", torch.zeros_like(p[:, :1]))
        r += (1 - c["row_beta2"]) * (O.square().mean(-1, keepdim=True) - r)
        O = O / ((r / (1 - c["row_beta2"] ** t)).sqrt() + c["row_eps"])
        u = O * (0.2 * math.sqrt(rows * columns) / (O.norm() + c["row_eps"]))
    if c["cautious_decay"]:
        clear_of_zero(u, torch.full_like(u, float(u.abs().mean())))
    decay(p, u, c)
    p -= c["lr"] * u


def by_formula(update, which, c, dtype):
    ps, states, out = [parameter(k, dtype) for k in which], [{} for _ in which], []
    for t in range(1, STEPS + 1):
        for k, p, s in zip(which, ps, states):
            update(p, gradient(k, t, dtype), s, t, c)
        if t in CHECKPOINTS:
            out.append([p.clone() for p in ps])
    return out


def by_torch(make, which, c, dtype, decay_by_hand=False):
    ps, out = [parameter(k, dtype).requires_grad_() for k in which], []
    opt = make(ps, c)
    for t in range(1, STEPS + 1):
        for k, p in zip(which, ps):
            p.grad = gradient(k, t, dtype)
            if decay_by_hand:
                p.data.mul_(1 - c["lr"] * c["weight_decay"])
        opt.step()
        if t in CHECKPOINTS:
            out.append([p.detach().clone() for p in ps])
    return out


def sgd(ps, c):
    return torch.optim.SGD(ps, lr=c["lr"], momentum=c["momentum"], nesterov=c["nesterov"], foreach=False)


def torch_adamw(ps, c):
    betas = (c["beta1"], c["beta2"])
    return torch.optim.AdamW(ps, lr=c["lr"], betas=betas, eps=c["eps"], weight_decay=c["weight_decay"], foreach=False)


def muon(ps, c):
    return torch.optim.Muon(
        ps, lr=c["lr"], weight_decay=c["weight_decay"], momentum=c["momentum"], nesterov=c["nesterov"],
        ns_coefficients=tuple(c["coefficients"]), eps=c["eps"], ns_steps=c["ns_steps"], adjust_lr_fn="match_rms_adamw",
    )


def change_error(got, expected, k):
    """Relative root-mean-square error of the change since the start."""
    start = parameter(k, torch.float64)
    return float((got.double() - expected).norm() / (expected - start).norm())


ALL, MATRICES = [0, 1, 2, 3], [0, 1]
F64, F32 = torch.float64, torch.float32
cases = []


def case(name, rule, source, which, c, run, tolerance=None):
    flat = lambda out: [[[float(x) for x in p.flatten()] for p in ps] for ps in out]
    out = {"float64": run(F64), "float32": run(F32)}
    if source == "formula" or rule != "orthogonal":
        for wide, narrow in zip(out["float64"], out["float32"]):
            for a, b in zip(wide, narrow):
                assert float((a - b).abs().max()) < 2e-4 * c["lr"] / 1e-3, (name, float((a - b).abs().max()))
    cases.append({"name": name, "rule": rule, "source": source, "which": which, "config": c, "tolerance": tolerance}
                 | {dtype: flat(values) for dtype, values in out.items()})
    return out


def config(base, **changes):
    return base | changes


base = {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
for name, c in [
    ("sgd", base),
    ("sgd with momentum", config(base, momentum=0.9)),
    ("sgd with Nesterov momentum", config(base, momentum=0.9, nesterov=True)),
    ("sgd with weight decay", config(base, weight_decay=0.1)),
    ("sgd with Nesterov momentum and weight decay", config(base, momentum=0.9, nesterov=True, weight_decay=0.1)),
]:
    case(name, "sgd", "torch", ALL, c, lambda d: by_torch(sgd, ALL, c, d, decay_by_hand=True))

base = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
for name, c in [("lion", base), ("lion without weight decay", config(base, weight_decay=0.0))]:
    case(name, "lion", "formula", ALL, c, lambda d: by_formula(lion, ALL, c, d))

base = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
        "nesterov": False, "cautious_update": False, "cautious_decay": False}
plain = case("adamw", "adamw", "torch", ALL, base, lambda d: by_torch(torch_adamw, ALL, base, d))
for a, b in zip(plain["float64"], by_formula(adamw, ALL, base, F64)):
    for x, y in zip(a, b):
        assert float((x - y).abs().max()) < 1e-12, "the formula of AdamW is not torch's"
for name, c in [
    ("adamw with Nesterov momentum", config(base, nesterov=True)),
    ("adamw with cautious update", config(base, cautious_update=True)),
    ("adamw with cautious decay", config(base, cautious_decay=True)),
    ("adamw with all of it", config(base, nesterov=True, cautious_update=True, cautious_decay=True)),
]:
    case(name, "adamw", "formula", ALL, c, lambda d: by_formula(adamw, ALL, c, d))

base = {"lr": 2e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
        "coefficients": [3.4445, -4.7750, 2.0315], "eps": 1e-7, "cautious_decay": False,
        "row_beta2": None, "row_eps": 1e-8}
exact = case("orthogonal", "orthogonal", "formula", MATRICES, base, lambda d: by_formula(orthogonal, MATRICES, base, d))
in_bf16 = torch_muon._zeropower_via_newtonschulz
torch_muon._zeropower_via_newtonschulz = lambda x, coefficients, steps, eps: newton_schulz(x, coefficients, steps, eps)
for a, b in zip(exact["float64"], by_torch(muon, MATRICES, base, F64)):
    for x, y in zip(a, b):
        assert float((x - y).abs().max()) < 1e-12, "the formula of Muon is not torch's"
torch_muon._zeropower_via_newtonschulz = in_bf16
rounded = by_torch(muon, MATRICES, base, F32)
tolerance = [[2 * change_error(r[k], e[k], k) for k in MATRICES] for r, e in zip(rounded, exact["float64"])]
# 2^-9 a rounding, of which Newton-Schulz magnifies those along small singular values up to 3.4445^5 times
assert max(map(max, tolerance)) < 0.1, tolerance
case("orthogonal in bf16", "orthogonal", "torch", MATRICES, base, lambda d: by_torch(muon, MATRICES, base, d), tolerance)
for name, c in [
    ("orthogonal without Nesterov momentum", config(base, nesterov=False)),
    ("orthogonal with cautious decay", config(base, cautious_decay=True)),
    ("orthogonal with second moment of rows", config(base, row_beta2=0.95)),
    ("orthogonal with second moment of rows and cautious decay", config(base, row_beta2=0.95, cautious_decay=True)),
]:
    case(name, "orthogonal", "formula", MATRICES, c, lambda d: by_formula(orthogonal, MATRICES, c, d))

assert smallest > MARGIN, f"a sign hangs on rounding: {smallest}"
lines = ",\n".join(json.dumps(c) for c in cases)
head = f'"torch": "{torch.__version__}", "shapes": {SHAPES}, "steps": {STEPS}, "checkpoints": {CHECKPOINTS}'
print(f'{{{head}, "cases": [\n{lines}\n]}}')
print(f"tolerance {tolerance}, smallest margin {smallest:.2e}", file=sys.stderr)
