"""VesperLM for transformers: a Llama whose feed-forward has one of Vesper's activations.

Written by vesper-model beside the weights; https://docs.rs/vesper-model. MIT or Apache-2.0.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from .configuration_vesper import VesperConfig


def gate_entropy(x, temperature=1.0, strength=0.1):
    """ERA: x g (1 + strength H(g)), g = sigmoid(x / temperature), H the entropy of g and 1 - g in nats."""
    z = x / temperature
    g = z.sigmoid()
    return x * g * (1 + strength * (F.softplus(z) - z * g))


def gelu_softplus(x, gamma=0.1):
    """ERA: GELU(x) + gamma softplus(x)."""
    return F.gelu(x, approximate="tanh") + gamma * F.softplus(x)


ERA = {"gate_entropy": gate_entropy, "gelu_softplus": gelu_softplus}

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


class Activation(nn.Module):
    """The activation that `hidden_act` in config.json names, computed in f32 whatever the dtype of its input."""

    def __init__(self, hidden_act):
        super().__init__()
        if isinstance(hidden_act, str) and hidden_act in PLAIN:
            self.function, self.parameters_of_era = PLAIN[hidden_act], {}
            return
        era = hidden_act.get("era") if isinstance(hidden_act, dict) else None
        if not isinstance(era, dict) or len(era) != 1 or next(iter(era)) not in ERA:
            known = ", ".join([*PLAIN, *(f"era with {form}" for form in ERA)])
            raise ValueError(f"config.json: hidden_act is {hidden_act!r}, expected one of {known}")
        form, self.parameters_of_era = next(iter(era.items()))
        self.function = ERA[form]

    def forward(self, x):
        return self.function(x.float(), **self.parameters_of_era).to(x.dtype)


class VesperForCausalLM(LlamaForCausalLM):
    config_class = VesperConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = Activation(config.activation)
