"""A step of training in PyTorch: the peer of the bench `model`.

    python3 benches/peers/torch_train.py --size small --batch 4 --dtype f32
    python3 benches/peers/torch_train.py --device cuda --size medium --batch 32 --seq 1024 --dtype bf16 --mode compile

The model of VesperLM's presets with random weights (pre-norm RMSNorm, rotary positions, gated feed-forward with ERA, tied
embedding, no biases), parameters in f32, activations in f32 or by autocast in bf16. A step is forward, cross-entropy in f32,
backward, clipping at norm 1 and fused AdamW, over rows of random tokens. The device is idle before and after a step that is
timed; the figure is the median of those after the warm-up. Memory is the peak of allocated tensors, the warm-up's
among them. Products in f32 use TF32 where the GPU has it. Prints one line, which VESPER_BENCH_PEERS takes into the bench's
record. One model a process, so that none is compiled for the shapes of another.
"""
import argparse
import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

# layers, heads, hidden, feed-forward
SIZES = {
    'small': (6, 6, 384, 1024),
    'medium': (12, 12, 768, 2048),
    'large': (24, 16, 1024, 2816),
}
VOCABULARY = 32064
ALLOCATOR = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_')


def era(x):
    gate = torch.sigmoid(x)
    return x * gate * (1 + 0.1 * (F.softplus(x) - x * gate))


def rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class Block(nn.Module):
    def __init__(self, heads, d, ffn):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(d), Norm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, h, cos, sin):
        b, t, d = h.shape
        # (batch, t, 3 d) to three of (batch, heads, t, d / heads)
        q, k, v = self.qkv(self.norm1(h)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        h = h + self.out(y.transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.norm2(h)).chunk(2, -1)
        return h + self.down(era(gate) * up)


class Model(nn.Module):
    def __init__(self, size, t, dtype):
        super().__init__()
        layers, heads, d, ffn = SIZES[size]
        self.dtype = dtype
        self.embed = nn.Embedding(VOCABULARY, d)
        self.blocks = nn.ModuleList(Block(heads, d, ffn) for _ in range(layers))
        self.norm = Norm(d)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        inverse = 1e4 ** (-torch.arange(0, d // heads, 2).float() / (d // heads))
        angles = torch.outer(torch.arange(t).float(), inverse)  # (t, d / heads / 2)
        self.register_buffer('cos', angles.cos().to(dtype))
        self.register_buffer('sin', angles.sin().to(dtype))

    def forward(self, ids, targets):
        """ids and targets (batch, t); the mean loss."""
        h = self.embed(ids).to(self.dtype)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        logits = F.linear(self.norm(h), self.embed.weight)
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))


def clock(device, runs, warm, f):
    """Median seconds of f, after a warm-up."""
    samples = []
    for _ in range(warm + runs):
        if device == 'cuda':
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == 'cuda':
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return sorted(samples[warm:])[runs // 2]


def measure(a):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if a.dtype == 'bf16' else torch.float32
    model = Model(a.size, a.seq, dtype).to(a.device)
    parameters = sum(p.numel() for p in model.parameters())
    forward = torch.compile(model) if a.mode == 'compile' else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, targets = torch.randint(VOCABULARY, (2, a.batch, a.seq)).to(a.device)
    loss = None

    def step():
        nonlocal loss
        with torch.autocast(a.device, dtype=torch.bfloat16, enabled=a.dtype == 'bf16'):
            loss = forward(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if a.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(a.device, a.runs, a.warm, step)
    if not math.isfinite(loss.item()):
        raise SystemExit(f'the loss is {loss.item()}')
    tokens = a.batch * a.seq
    line = (f'torch train {a.size} {a.device} {a.dtype} {a.mode} B{a.batch} T{a.seq} params {parameters / 1e6:.1f}M '
            f'step {seconds * 1e3:.2f} ms {tokens / seconds:.0f} tok/s')
    if a.device == 'cuda':
        line += f' mem {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB'
    settings = [name for name in ALLOCATOR if name in os.environ]
    if a.device == 'cpu' and settings:
        line += f' (freed memory kept: {" and ".join(settings)})'
    print(line, flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--size', default='small', choices=SIZES)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--seq', type=int, default=128)
    parser.add_argument('--dtype', default='f32', choices=['f32', 'bf16'])
    parser.add_argument('--mode', default='eager', choices=['eager', 'compile'])
    parser.add_argument('--warm', type=int, default=5)
    parser.add_argument('--runs', type=int, default=15)
    torch.set_float32_matmul_precision('high')
    measure(parser.parse_args())
