"""Golden values for tests/schedule.rs from torch.optim.lr_scheduler: the learning rate of every step, base 1.

    python schedule.py > schedule.json

    cases: a list of {"name", "total", "schedule" (as serde reads velvet_optim::Schedule), "lr": [step 0, 1, ...]}

A case may list a step or more past the end, where torch has one.
"""
import json

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR


def rates(make, steps):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, out = make(opt), []
    for _ in range(steps):
        out.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return out


def linear(start, end, steps):
    return lambda opt: LinearLR(opt, start_factor=start, end_factor=end, total_iters=steps)


def warm(steps):
    """(t + 1) / steps, which is 1 at its last step."""
    return lambda opt: LinearLR(opt, start_factor=1 / steps, end_factor=1.0, total_iters=steps - 1)


def sequence(parts, milestones):
    return lambda opt: SequentialLR(opt, [part(opt) for part in parts], milestones=milestones)


def one_cycle(total, **options):
    return lambda opt: OneCycleLR(opt, max_lr=1.0, total_steps=total, cycle_momentum=False, **options)


def cosine(steps, end):
    return lambda opt: CosineAnnealingLR(opt, T_max=steps, eta_min=end)


def case(name, total, schedule, make, steps=None):
    return {"name": name, "total": total, "schedule": schedule, "lr": rates(make, steps or total)}


cases = [
    case("linear to zero", 40, {"linear": {}}, linear(1.0, 0.0, 40), 45),
    case("linear to a tenth", 37, {"linear": {"end": 0.1}}, linear(1.0, 0.1, 37), 50),
    case("linear after a warm-up", 50, {"linear": {"warm_up": {"steps": 10}, "end": 0.05}},
         sequence([warm(10), linear(1.0, 0.05, 40)], [10])),
    case("linear over the last half", 60, {"linear": {"warm_up": {"fraction": 0.1}, "decay": {"fraction": 0.5}}},
         sequence([warm(6), linear(1.0, 1.0, 1), linear(1.0, 0.0, 30)], [6, 30])),
    case("warm-up alone", 30, {"constant": {"warm_up": {"steps": 12}}}, warm(12), 40),
    case("cosine to zero", 33, {"cosine": {}}, cosine(33, 0.0), 34),
    case("cosine to a tenth", 64, {"cosine": {"end": 0.1}}, cosine(64, 0.1), 65),
    case("cosine after a warm-up", 64, {"cosine": {"warm_up": {"steps": 4}, "end": 0.1}},
         sequence([warm(4), cosine(60, 0.1)], [4])),
    case("wsd with cosine decay", 50,
         {"wsd": {"warm_up": {"steps": 5}, "decay": {"steps": 20}, "shape": "cosine", "end": 0.2}},
         sequence([warm(5), linear(1.0, 1.0, 1), cosine(20, 0.2)], [5, 30])),
    case("one cycle", 100, {"one_cycle": {}}, one_cycle(100)),
    case("one cycle whose peak falls between steps", 97, {"one_cycle": {}}, one_cycle(97)),
    case("one cycle, linear", 53,
         {"one_cycle": {"rise": {"fraction": 0.4}, "start": 0.1, "end": 0.001, "shape": "linear"}},
         one_cycle(53, pct_start=0.4, div_factor=10, final_div_factor=100, anneal_strategy="linear")),
]
lines = ",\n".join(json.dumps(c) for c in cases)
print(f'{{"torch": "{torch.__version__}", "cases": [\n{lines}\n]}}')
