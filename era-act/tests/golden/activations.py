"""Writes activations.json: every activation, its derivative and the gated form, in float64, by PyTorch.

Numbers are the bit patterns of float64 as unsigned integers, so that nothing is lost on the way.
"""
import json
import math
import pathlib
import struct

import torch
import torch.nn.functional as F


def softplus(x):
    """torch's own turns linear above 20, which is 2e-9 off; from 40 on the difference is below one ulp."""
    return F.softplus(x, threshold=40)


def era(x, temperature=1.0, strength=0.1):
    """x * g * (1 + strength * H(g)), g = sigmoid(x / temperature), H the binary entropy of the gate in nats."""
    z = x / temperature
    g = torch.sigmoid(z)
    return x * g * (1 + strength * (softplus(z) - z * g))


ACTIVATIONS = {
    "era": (era, {"era": {"gate_entropy": {}}}),
    "era_hot": (lambda x: era(x, 2.5, 0.4), {"era": {"gate_entropy": {"temperature": 2.5, "strength": 0.4}}}),
    "era_cold": (lambda x: era(x, 0.125, -0.3), {"era": {"gate_entropy": {"temperature": 0.125, "strength": -0.3}}}),
    "gelu_softplus": (lambda x: F.gelu(x, approximate="tanh") + 0.1 * softplus(x), {"era": {"gelu_softplus": {}}}),
    "silu": (F.silu, "silu"),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "gelu": (F.gelu, "gelu"),
    "relu": (F.relu, "relu"),
    "relu_squared": (lambda x: F.relu(x) ** 2, "relu_squared"),
}


def bits(t):
    return [struct.unpack("<Q", struct.pack("<d", v))[0] for v in t.reshape(-1).tolist()]


torch.manual_seed(0)
points = [0.0, 1e-8, 0.5, 1.0, 2.0, 3.3, 5.0, 8.0, 12.0, 17.0, 20.0, 40.0, 88.0, 100.0, 1e3, 1e4]
x = torch.tensor(sorted({-p for p in points} | set(points)), dtype=torch.float64)
x = torch.cat([x, 3 * torch.randn(64, dtype=torch.float64)])
packed = 2 * torch.randn(5, 14, dtype=torch.float64)
seed = torch.randn(5, 7, dtype=torch.float64)

cases = []
for name, (f, config) in ACTIVATIONS.items():
    a = x.clone().requires_grad_()
    y = f(a)
    y.sum().backward()
    p = packed.clone().requires_grad_()
    gate, up = p.chunk(2, -1)
    h = f(gate) * up
    (h * seed).sum().backward()
    assert all(math.isfinite(v) for t in (y, a.grad, h, p.grad) for v in t.reshape(-1).tolist()), name
    cases.append({"name": name, "activation": config, "y": bits(y.detach()), "dx": bits(a.grad),
                  "gated": bits(h.detach()), "dpacked": bits(p.grad)})

out = {"torch": torch.__version__, "x": bits(x), "rows": 5, "packed": bits(packed), "seed": bits(seed), "cases": cases}
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=None, separators=(",", ":")) + "\n")
