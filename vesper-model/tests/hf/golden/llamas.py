"""The checkpoints of tests/hf/llamas.rs: small random models as transformers writes them, and their logits.

    python llamas.py

Made with transformers 5.24.0 and torch 2.15.0. Logits are computed in f32 from the weights as they are stored.
"""
import json
import pathlib
import shutil

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

HERE = pathlib.Path(__file__).parent / "llamas"
LENGTH, ROWS = 40, [0, 7, 20, 39]  # the positions whose logits are kept
SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def write(name, config, dtype, shards="1GB"):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config)
    for key, weight in model.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(config.vocab_size, (1, LENGTH))
    with torch.no_grad():
        logits = model(ids).logits[0, ROWS]
    golden = {"ids": ids[0].tolist(), "rows": ROWS, "logits": logits.tolist()}
    (folder / "logits.json").write_text(json.dumps(golden, separators=(",", ":")))
    return folder


write("tied", LlamaConfig(**SIZES, tie_word_embeddings=True), torch.float32)
write("grouped_sharded", LlamaConfig(**SIZES, num_key_value_heads=2), torch.float32, shards="20KB")
write("wide_heads_llama3", LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=10, rope_parameters=LLAMA3), torch.bfloat16)
write("mistral", MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None, hidden_act="gelu_pytorch_tanh"),
      torch.bfloat16)
folder = write("linear", LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LINEAR),
               torch.float16)
# As the versions before 5 describe the same model.
config = json.loads((folder / "config.json").read_text())
del config["rope_parameters"]
config |= {"rope_theta": LINEAR["rope_theta"], "rope_scaling": {"type": "linear", "factor": LINEAR["factor"]},
           "torch_dtype": config.pop("dtype"), "transformers_version": "4.40.0"}
(folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
