"""What Hugging Face's logits processors make of scores: python3 processors.py > processors.json

Needs torch and transformers. Each case: the settings as generation_config.json has them, history, length of the prompt,
scores, and what the processors leave as log-probabilities (null: excluded).
"""

import json
import random

import torch
import transformers
from transformers import LogitsProcessorList, generation

VOCAB = 24
EOS = 2


def processors(c, prompt):
    """The order of GenerationMixin._get_logits_processor."""
    p = LogitsProcessorList()
    if "repetition_penalty" in c:
        p.append(generation.RepetitionPenaltyLogitsProcessor(c["repetition_penalty"]))
    if "no_repeat_ngram_size" in c:
        p.append(generation.NoRepeatNGramLogitsProcessor(c["no_repeat_ngram_size"]))
    if "bad_words_ids" in c:
        p.append(generation.NoBadWordsLogitsProcessor(c["bad_words_ids"], EOS))
    if "min_new_tokens" in c:
        p.append(generation.MinNewTokensLengthLogitsProcessor(prompt, c["min_new_tokens"], EOS))
    if "temperature" in c:
        p.append(generation.TemperatureLogitsWarper(c["temperature"]))
    if "top_k" in c:
        p.append(generation.TopKLogitsWarper(c["top_k"]))
    if "top_p" in c:
        p.append(generation.TopPLogitsWarper(c["top_p"]))
    if "min_p" in c:
        p.append(generation.MinPLogitsWarper(c["min_p"]))
    if "typical_p" in c:
        p.append(generation.TypicalLogitsWarper(c["typical_p"]))
    return p


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
    cases = []
    for config in one * 3 + several * 4:
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
    print(json.dumps({"transformers": transformers.__version__, "eos": EOS, "cases": cases}))


main()
