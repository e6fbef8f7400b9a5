"""The models of tests/hf/python.rs: one file of random weights under many configurations, and their logits in PyTorch.

    python vespers.py

The configurations are as vesper-model writes them, and the model is what it writes beside its weights for Python
(src/hf/python), loaded by transformers. Made with transformers 5.24.0 and torch 2.15.0.
"""
import json
import pathlib
import tempfile

import torch
from safetensors.torch import save_file

from vesper_in_python import load

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parents[2] / "src/hf/python"
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV, HEAD = 40, 24, 40, 2, 4, 2, 6
IDS, ROWS = 24, [0, 5, 23]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
CONFIG = {
    "model_type": "vesper", "architectures": ["VesperForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD,
    "intermediate_size": FFN, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 500.0,
    "initializer_range": 0.02,
}
CASES = [
    {"hidden_act": {"era": {"gate_entropy": {"temperature": 1.0, "strength": 0.1}}}, "tie_word_embeddings": True},
    {"hidden_act": {"era": {"gate_entropy": {"temperature": 0.7, "strength": 0.5}}}, "tie_word_embeddings": False},
    {"hidden_act": {"era": {"gelu_softplus": {"gamma": 0.3}}}, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    {"hidden_act": "gelu_tanh", "tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"hidden_act": "gelu", "tie_word_embeddings": True},
    {"hidden_act": "relu", "tie_word_embeddings": True},
    {"hidden_act": "relu_squared", "tie_word_embeddings": True},
    {"hidden_act": "silu", "tie_word_embeddings": True},
]

torch.manual_seed(7)
shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
for i in range(LAYERS):
    for name, shape in {
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV * HEAD, HIDDEN),
        "self_attn.v_proj": (KV * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
    }.items():
        shapes[f"model.layers.{i}.{name}"] = shape
weights = {
    f"{name}.weight": torch.normal(float(len(shape) == 1), 0.3, shape).to(torch.bfloat16)
    for name, shape in shapes.items()
}
save_file(weights, HERE / "vespers.safetensors", {"format": "pt"})
ids = torch.randint(VOCAB, (1, IDS))

golden = {"ids": ids[0].tolist(), "rows": ROWS, "models": []}
for case in CASES:
    config = CONFIG | case
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for source in SOURCES.glob("*.py"):
            (folder / source.name).write_text(source.read_text())
        auto_map = {"AutoConfig": "configuration_vesper.VesperConfig",
                    "AutoModelForCausalLM": "modeling_vesper.VesperForCausalLM"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        tied = config["tie_word_embeddings"]
        stored = {name: weight for name, weight in weights.items() if not (tied and name == "lm_head.weight")}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            logits = load(folder, torch.float32)(ids).logits[0, ROWS]
    golden["models"].append({"config": config, "logits": logits.tolist()})
(HERE / "vespers.json").write_text(json.dumps(golden, separators=(",", ":")))
