"""Adapters and outputs of Hugging Face PEFT, for tests/peft.rs.

    python peft_golden.py            writes peft/: a small model, adapters that PEFT saved, and the model's outputs
    python peft_golden.py flylora    reads flylora/*: adapters that flylora saved; writes the outputs that PEFT gives

The adapters in flylora/ are written by `cargo test -p flylora --test peft -- --ignored`.
Made with peft 0.21.2, transformers 5.24.0, torch 2.15.0.
"""

import json
import pathlib
import shutil
import sys

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = pathlib.Path(__file__).parent
IDS = torch.tensor([[0, 3, 10, 3], [7, 1, 2, 9]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.c_attn = Conv1D(8, 6)  # weight (in, out) = (6, 8)
        self.up_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.up_proj(torch.tanh(self.c_attn(torch.tanh(self.q_proj(x)))))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def base():
    model = Tiny()
    path = HERE / "peft" / "base.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        path.parent.mkdir(exist_ok=True)
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        save_file(model.state_dict(), path, metadata={"format": "pt"})
    return model


def output(model):
    with torch.no_grad():
        return model.double()(IDS).tolist()


def wake(model, seed):
    """Values for all that is trained, so that an adapter that does nothing is noticed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                if "magnitude" in name:
                    p.mul_(1.0 + 0.3 * torch.randn_like(p))
                else:
                    p.copy_(0.4 * torch.randn_like(p))


def allocate(model):
    """A short run of AdaLoRA, so that the ranks differ."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    target = torch.randn(2, 4, 8)
    for step in range(1, 9):
        loss = (model(IDS) - target).square().mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


CASES = {
    "lora": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "c_attn", "up_proj"],
        rank_pattern={r"layers\.1\..*_proj": 2, "q_proj": 3},
        alpha_pattern={"^layers.0.up_proj": 5},
        fan_in_fan_out=True,
    ),
    "rslora": LoraConfig(r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=6, target_modules=r".*\.(q_proj|up_proj)", use_dora=True),
    "embedding": LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "layers.1.up_proj"]),
    "adalora": AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=8, tinit=1, tfinal=2, target_modules=["q_proj", "up_proj"]
    ),
    "adalora_full": AdaLoraConfig(init_r=4, lora_alpha=6, total_step=8, target_modules=["q_proj", "up_proj"]),
    "dora_embedding": LoraConfig(r=3, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], use_dora=True),
    # More ranks than the layers have rows or columns.
    "wide": LoraConfig(r=12, lora_alpha=9, target_modules=["embed_tokens", "q_proj", "c_attn"], fan_in_fan_out=True),
    "saved": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["layers.1.up_proj", "score"]),
    "bias": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], bias="all"),
    # PEFT gives every layer of AdaLoRA the same alpha, whatever the pattern says.
    "adalora_alpha": AdaLoraConfig(
        init_r=9, lora_alpha=6, total_step=8, target_modules=["q_proj"], alpha_pattern={"q_proj": 2}
    ),
    "lora_bias": LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "c_attn"], fan_in_fan_out=True, lora_bias=True
    ),
}


def from_peft():
    outputs = {"base": output(base())}
    for seed, (name, config) in enumerate(CASES.items()):
        model = get_peft_model(base(), config)
        wake(model, seed + 1)
        if name == "adalora":
            allocate(model)
        folder = HERE / "peft" / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        again = PeftModel.from_pretrained(base(), folder)
        outputs[name] = output(again)
        assert torch.allclose(torch.tensor(outputs[name]), torch.tensor(output(model)), atol=1e-6), name
    (HERE / "peft" / "outputs.json").write_text(json.dumps(outputs) + "\n")


# Combinations of adapters with scales of their own; dropping values at random is left out by a density of 1.
COMBINATIONS = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {"svd_rank": 2}),
    *(
        (f"{name}{over}", {"density": density, **sign, **rank})
        for name, densities, signs in [
            ("magnitude_prune", [0.3, 0.7], [{}]),
            ("ties", [0.3, 0.7, 1.0], [{"majority_sign_method": s} for s in ("total", "frequency")]),
            ("dare_linear", [1.0], [{}]),
            ("dare_ties", [1.0], [{"majority_sign_method": s} for s in ("total", "frequency")]),
        ]
        for over, rank in [("", {}), ("_svd", {"svd_rank": 3})]
        for density in densities
        for sign in signs
    ),
]


def combined(make, file):
    torch.manual_seed(0)
    configs = [LoraConfig(r=2, lora_alpha=alpha, target_modules=["layer"]) for alpha in (2, 9, 3)]
    configs[2].use_rslora = True
    names, weights = ["a", "b", "c"], [0.8, -0.5, 1.3]
    model = get_peft_model(nn.ModuleDict({"layer": make()}), configs[0], adapter_name="a")
    for name, config in zip(names[1:], configs[1:]):
        model.add_adapter(name, config)
    layer = model.base_model.model["layer"]
    adapters = []
    for name, weight in zip(names, weights):
        if isinstance(layer.base_layer, nn.Embedding):
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.no_grad():
            a.normal_(), b.normal_()
        adapters.append({"a": a.tolist(), "b": b.tolist(), "scale": layer.scaling[name], "weight": weight})
    cases = []
    for how, options in COMBINATIONS:
        model.add_weighted_adapter(names, weights, "combined", combination_type=how, **options)
        cases.append({"how": how, **options, "delta": layer.get_delta_weight("combined").tolist()})
        model.delete_adapter("combined")
    (HERE / "peft" / file).write_text(json.dumps({"adapters": adapters, "cases": cases}) + "\n")


def adalora_run():
    """A run of AdaLoRA over two layers: which singular values each step leaves."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()
    run = {"weights": {n: p.tolist() for n, p in layers.named_parameters()}}
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=3, tfinal=2, deltaT=3, lora_alpha=6, beta1=0.8, beta2=0.7,
        target_modules=["0", "2"],
    )
    model = get_peft_model(layers, config).double()
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for p in trained.values():
            p.copy_(0.5 * torch.randn_like(p))
    run["start"] = {n.split("model.")[-1].replace(".default", ""): p.tolist() for n, p in trained.items()}
    x, target = torch.randn(16, 6).double(), torch.randn(16, 4).double()
    run |= {"x": x.tolist(), "target": target.tolist(), "steps": []}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for step in range(1, config.total_step + 1):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        run["steps"].append([model.base_model.model[i].lora_E["default"].flatten().tolist() for i in (0, 2)])
    (HERE / "peft" / "adalora_run.json").write_text(json.dumps(run) + "\n")


def from_flylora():
    outputs = {}
    for folder in sorted(p for p in (HERE / "flylora").iterdir() if p.is_dir()):
        model = PeftModel.from_pretrained(base(), folder)
        loaded = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)
        stored = sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
        assert loaded == stored, (folder, loaded, stored)
        outputs[folder.name] = output(model)
    (HERE / "flylora" / "outputs.json").write_text(json.dumps(outputs) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["flylora"]:
        from_flylora()
    else:
        from_peft()
        combined(lambda: nn.Linear(5, 4, bias=False), "combine.json")
        combined(lambda: nn.Embedding(7, 4), "combine_embedding.json")
        adalora_run()
