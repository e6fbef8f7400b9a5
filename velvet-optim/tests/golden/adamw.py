"""Golden values for tests/golden.rs: torch.optim.AdamW on parameters and gradients that both sides compute exactly.

    python adamw.py > adamw.json

Every number below is an integer over a power of two, so f32 and f64 hold it exactly.
"""
import json
import torch

SHAPES = [[7, 13], [1], [33], [3, 5, 2]]
STEPS = 50


def parameter(k, shape, dtype):
    n = torch.Size(shape).numel()
    values = [(1.0 if (i + k) % 2 == 0 else -1.0) * (0.5 + ((i * 37 + k * 11) % 512) / 512) for i in range(n)]
    return torch.tensor(values, dtype=dtype).reshape(shape).requires_grad_()


def gradient(k, shape, step, dtype):
    n = torch.Size(shape).numel()
    scale = 0.5 ** (step % 5)
    values = [(((i * 7919 + step * 104729 + k * 31) % 2001) - 1000) / 1024 * scale for i in range(n)]
    return torch.tensor(values, dtype=dtype).reshape(shape)


def run(name, dtype, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=None, schedule=False, missing=False):
    params = [parameter(k, s, dtype) for k, s in enumerate(SHAPES)]
    opt = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    norms = []
    for step in range(1, STEPS + 1):
        if schedule:
            for group in opt.param_groups:
                group["lr"] = lr * step / STEPS
        for k, (p, s) in enumerate(zip(params, SHAPES)):
            p.grad = None if missing and k == step % 7 else gradient(k, s, step, dtype)
        if clip is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip)))
        opt.step()
    flat = lambda t: [float(x) for x in t.detach().flatten()]
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay,
        "clip": clip, "schedule": schedule, "missing": missing, "norms": norms,
        "parameters": [flat(p) for p in params],
        "exp_avg": [flat(opt.state[p]["exp_avg"]) for p in params],
        "exp_avg_sq": [flat(opt.state[p]["exp_avg_sq"]) for p in params],
    }


f32, f64 = torch.float32, torch.float64
cases = [
    run("defaults", f32),
    run("without weight decay", f32, weight_decay=0.0),
    run("clipped", f32, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    run("schedule and missing gradients", f32, lr=3e-3, schedule=True, missing=True),
    run("defaults in f64", f64),
    run("clipped in f64", f64, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip=1.0, missing=True),
]
lines = ",\n".join(json.dumps(c) for c in cases)
print(f'{{"torch": "{torch.__version__}", "shapes": {SHAPES}, "steps": {STEPS}, "cases": [\n{lines}\n]}}')
