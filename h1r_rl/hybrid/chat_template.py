"""The chat template of models built here: ChatML as Falcon-H1R's card describes it.

A default system turn when the conversation brings none; no `<think>` prefill, so that thinking is
the model's own choice; assistant turns before the last lose their reasoning; tools in Hermes form
(signatures in the system turn, `<tool_call>` by the assistant, `<tool_response>` in a user turn).
A model folder's own template always wins over this one.
"""

from __future__ import annotations

# Each sentence is one token of the tiny tokenizer: every prompt begins with them.
SYSTEM_SENTENCES = (
    "You are H1R, an assistant that reasons.",
    " First reason inside <think> </think>, then give the answer.",
)
DEFAULT_SYSTEM = "".join(SYSTEM_SENTENCES)

TOOLS_BEFORE = (
    "# Tools\n\nCall functions where they help. Their signatures stand inside <tools></tools>:\n"
    "<tools>\n"
)
TOOLS_AFTER = (
    "</tools>\n\nA call is one JSON object inside <tool_call></tool_call>:\n<tool_call>\n"
    '{"name": <function name>, "arguments": <object of arguments>}\n</tool_call>'
)

_TEXT = {"default_system": DEFAULT_SYSTEM, "before": TOOLS_BEFORE, "after": TOOLS_AFTER}

CHAT_TEMPLATE = (
    "".join(f"{{%- set {name} = {text!r} %}}\n" for name, text in _TEXT.items())
    + """\
{%- set turns = messages %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set default_system = messages[0]['content'] %}
{%- set turns = messages[1:] %}
{%- endif %}
{{- '<|im_start|>system\\n' + default_system }}
{%- if tools %}
{{- '\\n\\n' + before }}
{%- for tool in tools %}
{{- tool | tojson + '\\n' }}
{%- endfor %}
{{- after }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in turns %}
{%- set content = message['content'] or '' %}
{%- if message['role'] == 'tool' %}
{%- if loop.first or turns[loop.index0 - 1]['role'] != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or turns[loop.index0 + 1]['role'] != 'tool' %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- else %}
{%- if message['role'] == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + content }}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] or call %}
{{- '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + function['name'] | tojson + ', "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
)
