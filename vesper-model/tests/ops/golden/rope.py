"""The rotary angles of tests/ops/rope.rs: cos and sin as the Llama of transformers computes them, in f32.

    python rope.py > rope.json

Made with transformers 5.24.0 and torch 2.15.0.
"""
import json

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CASES = [
    (64, 1e4, None),
    (128, 5e5, None),
    (64, 1e4, {"rope_type": "linear", "factor": 4.0}),
    # Llama 3.1 8B and Llama 3.2 1B.
    (128, 5e5, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}),
    (64, 5e5, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}),
    # Odd numbers, and most pairs between slow and fast.
    (20, 1234.5, {"rope_type": "llama3", "factor": 2.7, "low_freq_factor": 0.3, "high_freq_factor": 9.1,
                  "original_max_position_embeddings": 77}),
]
POSITIONS = [0, 1, 2, 63, 1000, 8191]

golden = []
for head_dim, theta, scaling in CASES:
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                         max_position_embeddings=131072,
                         rope_parameters={"rope_type": "default", "rope_theta": theta, **(scaling or {})})
    positions = torch.tensor([POSITIONS])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    golden.append({
        "head_dim": head_dim, "theta": theta, "scaling": scaling, "positions": POSITIONS,
        "cos": cos[0, :, :head_dim // 2].tolist(), "sin": sin[0, :, :head_dim // 2].tolist(),
    })
print(json.dumps(golden, separators=(",", ":"), default=float))
