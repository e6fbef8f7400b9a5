"""What Hugging Face's logits processors, in its order, make of scores: python3 processors.py > processors.json

Needs torch and transformers. Each case: the settings as generation_config.json has them, history, length of the prompt,
scores, and what the processors leave as log-probabilities (null: excluded).
"""

import json
import random

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

VOCAB = 24
EOS = 2


class Model(PreTrainedModel, GenerationMixin):
    """Only to be asked for its processors, in its order."""


def processors(c, prompt):
    c = dict(c)
    prefix = c.pop("forced_prefix", None)
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, "eos_token_id": EOS, "num_beams": 1,
                                 "num_return_sequences": 1, **c})
    model = Model(PretrainedConfig())
    model._prepare_special_tokens(config, device="cpu")
    return model._get_logits_processor(
        config, input_ids_seq_length=prompt, device="cpu",
        prefix_allowed_tokens_fn=prefix and (lambda _, ids: prefix[len(ids) - prompt:][:1] or list(range(VOCAB))),
    )


def main():
    rng = random.Random(7)
    one = [
        {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[5], [1, 2, 3], [0, 7], [EOS]]},
        {"min_new_tokens": 4}, {"min_new_tokens": 9}, {"temperature": 0.5}, {"temperature": 2.5}, {"top_k": 1},
        {"top_k": 6}, {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.05}, {"min_p": 0.6}, {"typical_p": 0.2},
        {"typical_p": 0.9},
    ]
    several = [
        {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 10, "top_p": 0.9},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[4], [6, 1]], "temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.7, "top_p": 0.95, "typical_p": 0.8},
        {"min_new_tokens": 7, "repetition_penalty": 1.1, "top_k": 12, "min_p": 0.02, "typical_p": 0.95},
    ]
    forced = [{"forced_prefix": [4, 9, 1, 0, 7]}, {"forced_prefix": [3, 3, 5], "repetition_penalty": 1.4, "top_p": 0.8}]
    # The edges: what only pads, keeps all or nothing, is longer than the history, equals another, or was excluded before.
    edges = [
        {"top_k": 1}, {"top_k": 3}, {"top_k": 23}, {"top_k": 24}, {"top_k": 1000}, {"top_p": 0.0}, {"top_p": 1e-9},
        {"top_p": 0.999999}, {"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1.0}, {"typical_p": 1e-6}, {"typical_p": 0.999999},
        {"temperature": 1e-4}, {"temperature": 1e4}, {"no_repeat_ngram_size": 40}, {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e3}, {"min_new_tokens": 1}, {"bad_words_ids": [[1] * 30, [3, 3, 3], [7, 5], [EOS, EOS]]},
        {"top_k": 4, "top_p": 0.5}, {"top_k": 5, "typical_p": 0.5}, {"top_k": 2, "min_p": 0.9, "temperature": 3.0},
    ]
    cases = []
    for config in one * 3 + several * 4 + forced * 3:
        # Few different tokens, so that there are repetitions.
        history = [rng.randrange(8) for _ in range(rng.randrange(6, 14))]
        prompt = rng.randrange(1, len(history))
        scores = [round(rng.gauss(0.0, 2.0), 4) for _ in range(VOCAB)]
        out = processors(config, prompt)(torch.tensor([history]), torch.tensor([scores], dtype=torch.float32))
        left = torch.log_softmax(out.double(), -1)[0].tolist()
        cases.append({
            "config": config, "history": history, "prompt": prompt, "scores": scores,
            "left": [None if x == float("-inf") else round(x, 7) for x in left],
        })
    for config in edges * 3:
        history = [rng.randrange(8) for _ in range(rng.randrange(1, 7))]
        # Whole numbers, of which many are equal.
        scores = [float(rng.randrange(-3, 4)) for _ in range(VOCAB)]
        if any(key in config for key in ("top_p", "typical_p")):
            scores = [round(score + rng.gauss(0.0, 0.1), 4) for score in scores]
        for _ in range(5):
            scores[rng.randrange(VOCAB)] = float("-inf")
        out = processors(config, 1)(torch.tensor([history]), torch.tensor([scores], dtype=torch.float32))
        left = torch.log_softmax(out.double(), -1)[0].tolist()
        cases.append({
            "config": config, "history": history, "prompt": 1,
            "scores": [None if x == float("-inf") else x for x in scores],
            "left": [None if x == float("-inf") else round(x, 7) for x in left],
        })
    print(json.dumps({"transformers": transformers.__version__, "eos": EOS, "cases": cases}))


main()
