"""What transformers makes of a VesperLM's folder: run by tests/hf/python.rs, with an interpreter that has torch.

    python vesper_in_python.py FOLDER COPY ID...

prints as JSON the logits of the ids in f32 and in bf16, what follows them greedily with the cache and without, and what
follows the last three of them beside a longer row, padded; and saves the model as COPY.
"""
import json
import os
import sys
import tempfile

# transformers copies the code of a model into a cache: one that nobody else uses.
cache = tempfile.TemporaryDirectory()
os.environ |= {"HF_HOME": cache.name, "HF_MODULES_CACHE": cache.name, "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, logging  # noqa: E402

logging.disable_progress_bar()
logging.set_verbosity_error()


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype).eval()


def main(folder, copy, ids):
    ids = torch.tensor([ids])
    model = load(folder, torch.float32)
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    short = torch.cat([torch.zeros(1, ids.shape[1] - 3, dtype=torch.long), ids[:, -3:]], 1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[0, :-3] = 0
    with torch.no_grad():
        result = {
            "logits": model(ids).logits[0].tolist(),
            "bf16": load(folder, torch.bfloat16)(ids).logits[0].tolist(),
            "cached": model.generate(ids, **more)[0].tolist(),
            "uncached": model.generate(ids, use_cache=False, **more)[0].tolist(),
            "padded": model.generate(torch.cat([short, ids]), attention_mask=mask, **more)[0, -8:].tolist(),
        }
    model.save_pretrained(copy)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(id) for id in sys.argv[3:]])
