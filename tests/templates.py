"""Chat templates in the styles of several families, and conversations for them; tests/golden/make_templates.py renders
them with transformers."""

from typing import Any

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MARKED = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
HEADERS = """\
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- set content = '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' %}
    {%- if ns.first %}
        {%- set content = bos_token + content %}
        {%- set ns.first = false %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}
"""
TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<|start|>' + role + '\\n' + message['content'] | trim + '<|stop|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>model\\n' }}{% endif %}
"""
INST = """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if loop.first %}{{ bos_token }}{% elif loop.index == 2 and system %}{{ bos_token }}{% endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.index <= 2 else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
THINKING = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LISTED = """\
{{ bos_token }}{% for message in messages %}{{ {'who': message.role, 'text': message.content} | tojson }}
{% endfor %}
{% if add_generation_prompt %}{"who": "assistant", "text": "{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "headers": HEADERS,
    "turns": TURNS,
    "inst": INST,
    "thinking": THINKING,
    "listed": LISTED,
}
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

QUESTION = {"role": "user", "content": " What is 나 + 5?\n"}
ANSWER = {"role": "assistant", "content": "It is <b>12</b> 🙂"}
TALKS: dict[str, list[dict[str, Any]]] = {
    "asked": [QUESTION],
    "answered": [QUESTION, ANSWER],
    "several": [QUESTION, ANSWER, {"role": "user", "content": "And 'é'?"}, {"role": "assistant", "content": "\tNo. "}],
    "system": [{"role": "system", "content": 'Speak "plainly".'}, QUESTION, ANSWER],
}


def tokenizer_json() -> dict[str, Any]:
    """A tokenizer of one id for each byte, after the special tokens."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = [*map(chr, seen), *(chr(0x100 + i) for i in range(len(hidden)))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {name: i for i, name in enumerate([*SPECIALS, *letters])}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIALS)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
