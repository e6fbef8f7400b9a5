"""Decoding in PyTorch, eager: the peer of the bench `decode`.

    python3 benches/peers/torch_decode.py [--device cpu] [--size nano small] [--dtype f32 bf16] [--batch 1 8]

The model of VesperLM's presets with random weights (pre-norm RMSNorm, rotary positions, gated feed-forward with ERA, tied
embedding), a preallocated cache, and the work that the bench does: a prompt of 64 tokens, then 128 tokens, each the
likeliest; a step attends to the filled positions alone. Prefill is a prompt of 512 tokens with the logits of its last one.
`--compile` adds torch.compile's reduce-overhead mode, over the whole cache with a mask, since its shapes must stay. Prints
one line a figure, which VESPER_BENCH_PEERS takes into the bench's record.
"""
import argparse
import time

import torch
import torch.nn.functional as F

# layers, heads, hidden, feed-forward, vocabulary
SIZES = {
    'nano': (4, 4, 160, 448, 2560),
    'small': (6, 6, 384, 1024, 32064),
    'medium': (12, 12, 768, 2048, 32064),
}
PROMPT, TOKENS, PREFILL, CAPACITY = 64, 128, 512, 1024


def era(x):
    gate = torch.sigmoid(x)
    return x * gate * (1 + 0.1 * (F.softplus(x) - x * gate))


class Model:
    def __init__(self, size, dtype, device):
        self.layers, self.heads, self.d, self.ffn, self.vocab = SIZES[size]
        self.dim = self.d // self.heads
        torch.manual_seed(0)
        weight = lambda *shape: (torch.randn(*shape) * 0.02).to(device, dtype)
        ones = torch.ones(self.d, dtype=dtype, device=device)
        self.embed, self.norm = weight(self.vocab, self.d), ones
        self.blocks = [
            (ones, weight(3 * self.d, self.d), weight(self.d, self.d), ones,
             weight(2 * self.ffn, self.d), weight(self.d, self.ffn))
            for _ in range(self.layers)
        ]
        inverse = 1e4 ** (-torch.arange(0, self.dim, 2).float() / self.dim)
        angles = torch.outer(torch.arange(CAPACITY).float(), inverse)
        self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def cache(self, batch):
        shape = (batch, self.heads, CAPACITY, self.dim)
        zeros = lambda: torch.zeros(shape, dtype=self.embed.dtype, device=self.embed.device)
        return [(zeros(), zeros()) for _ in self.blocks]

    def rotate(self, x, cos, sin):
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def attend(self, q, k, v, keys, values, start, position):
        t = q.shape[2]
        if position is not None:  # shapes that stay: all positions, and a mask
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            mask = (torch.arange(CAPACITY, device=q.device) <= position)[None, None, None]
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        keys[:, :, start:start + t] = k
        values[:, :, start:start + t] = v
        return F.scaled_dot_product_attention(q, keys[:, :, :start + t], values[:, :, :start + t], is_causal=t > 1)

    def forward(self, ids, cache, start=0, position=None):
        """ids (batch, t) at positions from start on; the logits of the last (batch, vocab)."""
        b, t = ids.shape
        at = slice(start, start + t) if position is None else position
        cos, sin = self.cos[at], self.sin[at]
        h = F.embedding(ids, self.embed)
        for (n1, qkv, out, n2, gate_up, down), (keys, values) in zip(self.blocks, cache):
            n = F.rms_norm(h, (self.d,), n1, 1e-6)
            q, k, v = F.linear(n, qkv).view(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            y = self.attend(q, k, v, keys, values, start, position)
            h = h + F.linear(y.transpose(1, 2).reshape(b, t, self.d), out)
            gate, up = F.linear(F.rms_norm(h, (self.d,), n2, 1e-6), gate_up).chunk(2, -1)
            h = h + F.linear(era(gate) * up, down)
        return F.linear(F.rms_norm(h[:, -1], (self.d,), self.norm, 1e-6), self.embed)


def clock(device, runs, f):
    """Median, smallest and largest seconds of f, after a first run."""
    samples = []
    for i in range(runs + 1):
        if device == 'cuda':
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == 'cuda':
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    samples = sorted(samples[1:])
    return samples[len(samples) // 2], samples[0], samples[-1]


def measure(a, size, dtype, batch):
    model = Model(size, torch.bfloat16 if dtype == 'bf16' else torch.float32, a.device)
    cache = model.cache(batch)
    ids = (torch.arange(batch * PREFILL, device=a.device).view(batch, PREFILL) * 7919) % model.vocab
    where = f'torch {torch.__version__} {size} {a.device} {dtype} batch {batch}'

    def decode():
        token = ids[:, :1]
        for i in range(TOKENS):
            token = model.forward(token, cache, PROMPT + i).argmax(-1, keepdim=True)

    model.forward(ids[:, :PROMPT], cache)
    middle, least, most = clock(a.device, a.runs, decode)
    n = batch * TOKENS
    print(f'{where} eager: decode {n / middle:.1f} tok/s (from {n / most:.1f} to {n / least:.1f})', flush=True)
    if batch == 1:
        middle, least, most = clock(a.device, a.runs, lambda: model.forward(ids, cache))
        print(f'{where} eager: prefill {PREFILL / middle:.0f} tok/s (from {PREFILL / most:.0f} to {PREFILL / least:.0f})', flush=True)
    if a.compile:
        step = torch.compile(model.forward, mode='reduce-overhead')
        token = ids[:, :1].clone()

        def replay():
            nonlocal token
            for i in range(TOKENS):
                position = torch.tensor([PROMPT + i], device=a.device)
                token = step(token, cache, 0, position).argmax(-1, keepdim=True).clone()

        middle, least, most = clock(a.device, a.runs, replay)
        print(f'{where} compile: decode {n / middle:.1f} tok/s (from {n / most:.1f} to {n / least:.1f})', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--size', nargs='+', default=['nano', 'small'], choices=SIZES)
    parser.add_argument('--dtype', nargs='+', default=['f32', 'bf16'], choices=['f32', 'bf16'])
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--runs', type=int, default=7)
    parser.add_argument('--compile', action='store_true')
    arguments = parser.parse_args()
    with torch.inference_mode():
        for size in arguments.size:
            for dtype in arguments.dtype:
                for batch in arguments.batch:
                    measure(arguments, size, dtype, batch)
