"""PyTorch's scaled_dot_product_attention at the shapes of the bench `model -- ops`, forward and backward, by back end.

    python3 benches/peers/attention.py >> peers.txt     # then VESPER_BENCH_PEERS=$PWD/peers.txt

32 rows of 1024 tokens, bf16, causal: 12 heads of 64 and 6 of 128. Queries, keys and values are contiguous, and nothing is
rotated, which is less than what `causal_attention` does from a packed projection. One line a figure.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def clock(f, runs=21, warm=5):
    """Median milliseconds of f, by the device's events."""
    for _ in range(warm):
        f()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[runs // 2]


for heads, dim in [(12, 64), (6, 128)]:
    q, k, v = (torch.randn(32, heads, 1024, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"torch {torch.__version__} sdpa {backend.name} B32 H{heads} T1024 D{dim} bf16"
        try:
            with sdpa_kernel(backend):
                forward = clock(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
                dout = torch.randn_like(out)
                backward = clock(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            print(f"{name}: forward {forward:.3f} ms, backward {backward:.3f} ms", flush=True)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
