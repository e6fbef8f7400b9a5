"""What Hugging Face's beam search finds: python3 beams.py > beams.json

Needs torch and transformers. The model is a table: the logits after ... a, b are last[b] + before[a], so that both
languages compute the same. Each case: the settings as generation_config.json has them, the prompt, and the sequences
that were found (what is generated, the end of text included) with their scores.
"""

import json
import random
import warnings

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB = 24


class TableConfig(PretrainedConfig):
    model_type = "table"

    def __init__(self, vocab_size=VOCAB, **rest):
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**rest)


class Table(PreTrainedModel, GenerationMixin):
    config_class = TableConfig
    _supports_cache_class = False

    def __init__(self, config, last, before):
        super().__init__(config)
        self.last = torch.nn.Parameter(torch.tensor(last, dtype=torch.float32))
        self.before = torch.nn.Parameter(torch.tensor(before, dtype=torch.float32))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **rest):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **rest):
        logits = self.last[input_ids].clone()
        logits[:, 1:] += self.before[input_ids[:, :-1]]
        return CausalLMOutput(logits=logits)


def table(rng, scale):
    return [[round(rng.gauss(0.0, scale), 3) for _ in range(VOCAB)] for _ in range(VOCAB)]


def cases():
    prompts = [[5], [3, 9, 4], [1, 1, 7, 12]]
    eos = {"eos_token_id": 2}
    several = {"eos_token_id": [2, 6, 11]}
    settings = [
        {"num_beams": 2, "max_new_tokens": 6, **eos},
        {"num_beams": 3, "max_new_tokens": 10, "num_return_sequences": 3, **eos},
        {"num_beams": 4, "max_new_tokens": 12, "num_return_sequences": 4},
        {"num_beams": 4, "max_new_tokens": 12, "num_return_sequences": 2, **several},
        {"num_beams": 3, "max_new_tokens": 12, "length_penalty": 0.0, "num_return_sequences": 3, **several},
        {"num_beams": 3, "max_new_tokens": 12, "length_penalty": 2.0, "num_return_sequences": 3, **several},
        {"num_beams": 3, "max_new_tokens": 12, "length_penalty": -1.0, "num_return_sequences": 3, **several},
        {"num_beams": 3, "max_new_tokens": 15, "early_stopping": True, "num_return_sequences": 3, **several},
        {"num_beams": 3, "max_new_tokens": 15, "early_stopping": "never", "num_return_sequences": 3, **several},
        {"num_beams": 5, "max_new_tokens": 15, "early_stopping": "never", "length_penalty": 0.0, **several},
        {"num_beams": 4, "max_new_tokens": 15, "early_stopping": True, "length_penalty": 1.7, **eos},
        {"num_beams": 3, "max_new_tokens": 9, "min_new_tokens": 5, "num_return_sequences": 3, **several},
        {"num_beams": 3, "max_new_tokens": 12, "repetition_penalty": 1.5, "num_return_sequences": 2, **eos},
        {"num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 2, "num_return_sequences": 2, **eos},
        {"num_beams": 3, "max_new_tokens": 8, "bad_words_ids": [[5], [9, 4], [3, 9, 7]], "num_return_sequences": 3,
         **several},
        {"num_beams": 6, "max_new_tokens": 8, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
         "min_new_tokens": 3, "length_penalty": 0.6, "num_return_sequences": 6, **several},
        {"num_beams": 2, "max_new_tokens": 1, "num_return_sequences": 2, **eos},
        {"num_beams": 3, "max_length": 9, "num_return_sequences": 3, **several},
        # What every sequence begins with counts as it does elsewhere, so that longer ones gain by it or lose.
        {"num_beams": 3, "max_new_tokens": 10, "forced_prefix": [4], "num_return_sequences": 3, **several},
        {"num_beams": 4, "max_new_tokens": 9, "forced_prefix": [20, 13, 7], "length_penalty": 2.0,
         "num_return_sequences": 4, **several},
        {"num_beams": 4, "max_new_tokens": 9, "forced_prefix": [20, 13, 7], "length_penalty": 0.5,
         "early_stopping": "never", "num_return_sequences": 4, **several},
    ]
    return [(setting, prompt) for setting in settings for prompt in prompts]


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rng = random.Random(11)
    last, before = table(rng, 1.5), table(rng, 1.0)
    # Ends are likely enough to be met.
    for row in last:
        for end in (2, 6, 11):
            row[end] = round(row[end] + 1.0, 3)
    model = Table(TableConfig(), last, before).eval()
    out = []
    for case, prompt in cases():
        setting = dict(case)
        prefix, start = setting.pop("forced_prefix", None), len(prompt)
        # Nothing but what the case names: the defaults of both are other ones.
        config = GenerationConfig(do_sample=False, use_cache=False, pad_token_id=0, return_dict_in_generate=True,
                                  output_scores=True, **setting)
        found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                               generation_config=config, prefix_allowed_tokens_fn=prefix and (
                                   lambda _, ids: prefix[len(ids) - start:][:1] or list(range(VOCAB))))
        # One beam index a token, -1 where a sequence has ended before.
        lengths = (found.beam_indices >= 0).sum(-1).tolist()
        out.append({
            "config": case, "prompt": prompt,
            "found": [{"ids": row[len(prompt):len(prompt) + length].tolist(), "score": round(score, 6)}
                      for row, length, score in zip(found.sequences, lengths, found.sequences_scores.tolist())],
        })
    lines = ",\n".join(json.dumps(case) for case in out)
    print(f'{{"transformers": "{transformers.__version__}", "last": {json.dumps(last)},\n"before": '
          f'{json.dumps(before)},\n"cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
