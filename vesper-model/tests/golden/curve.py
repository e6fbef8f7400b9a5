"""The loss curve of tests/curve.rs: the same small model, weights, batches and AdamW in PyTorch, over 200 steps.

    python curve.py > curve.json

Weights and batches follow from an integer hash that both sides compute; every weight is a multiple of 2^-26, so that
f32 holds it exactly. The curve is computed in f64; how far PyTorch's own f32 is from it stands in "f32_off".
"""
import json
import pathlib
import torch
import torch.nn.functional as F

STEPS, BATCH, SEQ = 200, 4, 32
VOCAB, DIM, LAYERS, HEADS, KV, HEAD, FFN = 256, 32, 2, 4, 2, 8, 64
LR, WEIGHT_DECAY, CLIP, EPS, THETA = 3e-3, 0.01, 1.0, 1e-6, 1e4
MASK = 0xFFFFFFFF


def mix(k, i):
    h = (i * 2654435761 + k * 40503 + 1) & MASK
    h = ((h ^ (h >> 16)) * 0x45D9F3B) & MASK
    h = ((h ^ (h >> 16)) * 0x45D9F3B) & MASK
    return h ^ (h >> 16)


# In the order of VesperConfig::parameters.
SHAPES = [[VOCAB, DIM]]
for _ in range(LAYERS):
    SHAPES += [[DIM], [(HEADS + 2 * KV) * HEAD, DIM], [DIM, HEADS * HEAD], [DIM], [2 * FFN, DIM], [DIM, FFN]]
SHAPES += [[DIM]]


def parameter(k, shape, dtype):
    n = torch.Size(shape).numel()
    if len(shape) == 1:  # a norm
        values = [1 + ((mix(k, i) >> 24) - 128) / 2048 for i in range(n)]
    else:
        values = [((mix(k, i) >> 8) - (1 << 23)) / (1 << 26) for i in range(n)]
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape).requires_grad_()


def era(x, strength=0.1):
    g = torch.sigmoid(x)
    return x * g * (1 + strength * (F.softplus(x) - x * g))


def rms_norm(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


def loss(params, ids, targets):
    params = iter(params)
    embed = next(params)
    dtype = embed.dtype
    frequencies = (THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)).float().double()
    angles = torch.outer(torch.arange(SEQ, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().float().to(dtype), angles.sin().float().to(dtype)

    def rotate(z):
        lo, hi = z.chunk(2, -1)
        return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)

    h = embed[ids]
    for _ in range(LAYERS):
        norm, qkv, out, norm2, gate_up, down = (next(params) for _ in range(6))
        packed = rms_norm(h, norm) @ qkv.T
        split = lambda z: z.reshape(BATCH, SEQ, -1, HEAD).transpose(1, 2)
        q, k, v = packed.split([HEADS * HEAD, KV * HEAD, KV * HEAD], -1)
        q, k, v = rotate(split(q)), rotate(split(k)), split(v)
        k, v = (z.repeat_interleave(HEADS // KV, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + y.transpose(1, 2).reshape(BATCH, SEQ, -1) @ out.T
        gate, up = (rms_norm(h, norm2) @ gate_up.T).chunk(2, -1)
        h = h + (era(gate) * up) @ down.T
    logits = rms_norm(h, next(params)) @ embed.T
    return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def run(text, dtype):
    params = [parameter(k, shape, dtype) for k, shape in enumerate(SHAPES)]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        starts = [mix(1000 + step, row) % (len(text) - SEQ) for row in range(BATCH)]
        rows = torch.tensor([list(text[s : s + SEQ + 1]) for s in starts])
        value = loss(params, rows[:, :-1], rows[:, 1:])
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
    return losses


text = (pathlib.Path(__file__).parent / "fables.txt").read_bytes()
losses, f32 = run(text, torch.float64), run(text, torch.float32)
off = max(abs(a - b) for a, b in zip(losses, f32))
print(json.dumps({"torch": torch.__version__.split("+")[0], "f32_off": off, "losses": losses}, indent=1))
