"""The optimizer's step in PyTorch: the peer of the benches `optimizer` and `optimizer_cuda`.

    python3 benches/peers/torch_optimizer.py
    python3 benches/peers/torch_optimizer.py --device cuda

AdamW, fused, foreach and as a loop, over the tensors of a preset and over 2000 tiny ones, with gradients that stay; alone and
behind clip_grad_norm_, and clip_grad_norm_ alone. The state has the dtype of the parameters. A figure is the median
of calls with the device idle before and after each, by events on a GPU and by the clock on a CPU. The rate counts what a step
must move: parameter and moments read and written, gradient read. Prints one line a figure, for the bench's
record: VESPER_BENCH_PEER names this command for `optimizer`, VESPER_BENCH_PEERS a file of its output for `optimizer_cuda`.
"""
import argparse
import time

import torch
from torch.nn.utils import clip_grad_norm_

VOCABULARY = 32064
KINDS = ({'fused': True}, {'foreach': True}, {'foreach': False})


def preset(layers, d, ffn):
    """The shapes of VesperLM's tensors: norms, packed projections, the tied embedding."""
    layer = [(d,), (3 * d, d), (d, d), (d,), (2 * ffn, d), (d, ffn)]
    return [(VOCABULARY, d), *(layer * layers), (d,)]


TENSORS = {
    'small': preset(6, 384, 1024),
    'medium': preset(12, 768, 2048),
    'tiny': [(100 + i % 13 * 300,) for i in range(2000)],
}


def clock(device, runs, warm, f):
    """Median milliseconds of f, after a warm-up."""
    samples = []
    for _ in range(warm + runs):
        if device == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            f()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            f()
            samples.append((time.perf_counter() - start) * 1e3)
    return sorted(samples[warm:])[runs // 2]


def measure(a, name, dtype):
    torch.manual_seed(0)
    random = lambda shape, std: (torch.randn(shape, device=a.device) * std).to(dtype)
    weights = [torch.nn.Parameter(random(shape, 0.02)) for shape in TENSORS[name]]
    for weight in weights:
        weight.grad = random(weight.shape, 0.001)
    elements = sum(weight.numel() for weight in weights)
    size = f'{elements / 1e6:.1f}M'
    bytes_moved = 7 * dtype.itemsize * elements
    clip = lambda: clip_grad_norm_(weights, 1.0)
    for kind in KINDS:
        optimizer = torch.optim.AdamW(weights, lr=1e-6, **kind)
        where = f'torch adamw {name} {a.device} {dtype} {kind}'
        ms = clock(a.device, a.runs, a.warm, optimizer.step)
        print(f'{where} {size} {ms:.3f} ms {bytes_moved / ms / 1e9:.3f} TB/s', flush=True)
        ms = clock(a.device, a.runs, a.warm, lambda: (clip(), optimizer.step()))
        print(f'{where} and clip_grad_norm_ {size} {ms:.3f} ms', flush=True)
    ms = clock(a.device, a.runs, a.warm, clip)
    print(f'torch clip_grad_norm {name} {a.device} {dtype} {size} {ms:.3f} ms', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--tensors', nargs='+', choices=TENSORS, help='small and tiny on a CPU, medium and tiny on a GPU')
    parser.add_argument('--dtype', nargs='+', default=['f32', 'bf16'], choices=['f32', 'bf16'])
    parser.add_argument('--warm', type=int, default=5)
    parser.add_argument('--runs', type=int, default=21)
    arguments = parser.parse_args()
    for name in arguments.tensors or ['medium' if arguments.device == 'cuda' else 'small', 'tiny']:
        for dtype in arguments.dtype:
            measure(arguments, name, torch.bfloat16 if dtype == 'bf16' else torch.float32)
