"""Llamas with scaled rotary positions as GGUF files: each frequency's factor in a tensor `rope_freqs.weight`.

    pip install gguf numpy
    python llama3.py

Writes beside this file llama3.gguf, the model of tests/hf/golden/llamas/wide_heads_llama3 (its logits.json holds the
logits of transformers) with the names, keys, order of rows and factors that llama.cpp's converter gives it; and
llama3.1.gguf and llama3.2.gguf, which have the rotary keys and factors of Meta's models of 8 and 1 billion parameters
and no weights but an embedding of two tokens. Made with gguf 0.19.0.
"""

import json
import math
import pathlib

import gguf
import numpy as np

here = pathlib.Path(__file__).parent
BF16 = gguf.GGMLQuantizationType.BF16


def factors(head_dim, theta, factor, original, low=1.0, high=4.0):
    """Llama 3's formula, each step in f32."""
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    result = []
    for frequency in frequencies:
        length = np.float32(2 * math.pi) / frequency
        if length < original / high:
            result.append(1)
        elif length > original / low:
            result.append(factor)
        else:
            smooth = (np.float32(original) / length - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, dtype=np.float32)


def file(name, config, scaling, tensors):
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(str(here / name), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(scaling["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    original = scaling["original_max_position_embeddings"]
    writer.add_tensor("rope_freqs.weight", factors(head_dim, scaling["rope_theta"], scaling["factor"], original))
    for key, values in tensors:
        # The two halves of a head's rotary pairs become neighbours.
        rows = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(key.split(".")[-2])
        if rows:
            values = values.reshape(rows, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        key = names.get_name(key, try_suffixes=(".weight",))
        if values.ndim == 2:
            writer.add_tensor(key, gguf.quants.quantize(np.ascontiguousarray(values), BF16), raw_dtype=BF16)
        else:
            writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors(path):
    """The tensors of a file in bf16, in f32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for key, info in json.loads(data[8:start]).items():
        if key != "__metadata__":
            first, last = info["data_offsets"]
            values = np.frombuffer(data[start + first:start + last], dtype="<u2").astype(np.uint32) << 16
            yield key, values.view(np.float32).reshape(info["shape"])


folder = here / "../../hf/golden/llamas/wide_heads_llama3"
config = json.loads((folder / "config.json").read_text())
file("llama3.gguf", config, config["rope_parameters"], safetensors(folder / "model.safetensors"))

for name, sizes, heads, head_dim, factor in [("llama3.1", (4096, 14336, 32), 32, 128, 8.0), ("llama3.2", (2048, 8192, 16), 32, 64, 32.0)]:
    hidden, feed_forward, layers = sizes
    config = {"vocab_size": 2, "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
              "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 131072}
    scaling = {"rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}
    embedding = np.zeros((2, hidden), dtype=np.float32)
    file(f"{name}.gguf", config, scaling, [("model.embed_tokens.weight", embedding)])
