"""Writes templates.json: what `transformers` makes of conversations with the templates in templates/.

    python templates.py

The templates are written in the style of well-known models. Each case is rendered by `apply_chat_template`, as text and
as ids, with a small byte-level tokenizer that would add a <s> by itself.
"""

import json
from pathlib import Path

import jinja2
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

here = Path(__file__).parent


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


conversations = {
    "one": say(("user", "Hello there.")),
    "system": say(("system", "Be brief."), ("user", "Who are you?")),
    "turns": say(("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four"), ("user", "Five")),
    "system and turns": say(
        ("system", " Reply in verse.\n"), ("user", " Hi "), ("assistant", "  A rose is a rose. "), ("user", "More\n")
    ),
    "french": say(("system", "Réponds en français."), ("user", "L’été, où est-ce ? « Là-bas »…"), ("assistant", "À côté.")),
    "unicode": say(("user", "日本語 🙂 👩‍👩‍👧 e\u0301 \u00a0 \"quotes\" \\ <b>&amp;</b> {{ x }} {% y %}")),
    "empty": say(("user", "")),
    "empty answer": say(("user", "a"), ("assistant", ""), ("user", "b")),
    "blank": say(("system", ""), ("user", " \n\t ")),
    "ends with the answer": say(("user", "Say A."), ("assistant", "A")),
    "special": say(("user", "What does <|im_end|> or </s> mean?")),
    "thinking": say(
        ("user", "2+2"), ("assistant", "<think>\nsum\n</think>\n\n4"), ("user", "3+3"), ("assistant", "<think>s</think>6")
    ),
    "note": say(("user", "a"), ("note", "skipped"), ("assistant", "b")),
    "two users": say(("user", "a"), ("user", "b")),
    "answer first": say(("assistant", "a"), ("user", "b")),
    "tool": say(("user", "a"), ("assistant", "b"), ("tool", "c")),
    "late system": say(("user", "a"), ("system", "b")),
}

broken = {
    "unclosed.jinja": "{% for message in messages %}\n{{ message.content }}\n{% if %}\n{% endfor %}",
    "unfinished.jinja": "a\nb\n{{ messages[0].content",
    "filter.jinja": "a\nb {{ messages[0].content | shout }}",
    "function.jinja": "a\n\n{{ shout(messages[0].content) }}",
    "attribute.jinja": "{{ messages[0].nothing.more }}",
    "method.jinja": "a\n{{ messages[0].content.shout() }}",
    "addition.jinja": "{{ 1 + messages[0].content }}",
}

fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>")
variables = {"date_string": "26 Jul 2024"}


def case(template, text, name, messages, prompt, more):
    result = {"template": template, "conversation": name, "add_generation_prompt": prompt, "variables": more}
    render = lambda **kw: fast.apply_chat_template(
        messages, chat_template=text, add_generation_prompt=prompt, **{**variables, **more}, **kw
    )
    try:
        result["text"] = render(tokenize=False)
        if name in ("system and turns", "french", "special"):
            result["ids"] = list(render(tokenize=True)["input_ids"])
    except (jinja2.exceptions.TemplateError, TypeError) as error:
        raised = type(error) is jinja2.exceptions.TemplateError
        result["raised" if raised else "broken"] = str(error)
    return result


cases = []
for path in sorted((here / "templates").glob("*.jinja")):
    text = path.read_text(encoding="utf-8")
    for name, messages in conversations.items():
        for prompt in (True, False):
            cases.append(case(path.name, text, name, messages, prompt, {}))
    if path.name == "thinking.jinja":
        cases.append(case(path.name, text, "one", conversations["one"], True, {"enable_thinking": False}))
for name, text in broken.items():
    result = case(name, text, "one", conversations["one"], True, {})
    assert "broken" in result, result
    # What Python says of it differs; that it says something, and where the mistake is, does not.
    cases.append(result)

golden = {
    "made with": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}",
    "tokenizer": json.loads(tokenizer().to_str()),
    "variables": variables,
    "broken": broken,
    "conversations": conversations,
    "cases": cases,
}
lines = []
for key, value in golden.items():
    if key == "cases":
        value = "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in value) + "\n]"
    else:
        value = json.dumps(value, ensure_ascii=False)
    lines.append(f"{json.dumps(key)}: {value}")
(here / "templates.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
print(len(cases), "cases,", sum("raised" in c for c in cases), "raised,", sum("broken" in c for c in cases), "broken")
