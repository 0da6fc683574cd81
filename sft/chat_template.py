"""The chat template: role tokens around contents that cannot become control tokens.

    <|user|>SYSTEM (blank line) USER<|end_of_turn|><|assistant|>ANSWER<|end_of_turn|>...

The vocabularies have no token for a system turn: its text precedes that of the user turn that follows it. Text
parts of a content are joined. Anything else in a message is refused, by role and index.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from periln.runkit.control_tokens import END_OF_TEXT, JOINER, PAD, ROLES, control_tokens, passes

REFUSED = ("tool_calls", "function_call", "reasoning_content", "thinking")  # of a message: they would be left out

# `generation` marks what the loss is taken on: the assistant's words and the token that ends its turn.
_TEMPLATE = """
{%- set control = [CONTROL] -%}
{%- set system = namespace(text='', waits=false) -%}
{%- if tools -%}{{ raise_exception('tools are not supported by this chat template') }}{%- endif -%}
{%- for message in messages -%}
{%- set where = 'message ' ~ loop.index0 ~ " (role '" ~ message['role'] ~ "')" -%}
{%- set turn = namespace(text='') -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception(where ~ ' is of no known role: use system (first), user and assistant') }}
{%- endif -%}
{%- if message['role'] == 'system' and not loop.first -%}
{{ raise_exception(where ~ ' is not the first: only the first may be a system turn') }}
{%- endif -%}
{%- if system.waits and message['role'] != 'user' -%}
{{ raise_exception(where ~ ' follows the system turn: a user turn must') }}
{%- endif -%}
{%- for key in [REFUSED] -%}
{%- if message[key] -%}{{ raise_exception(where ~ ' has ' ~ key ~ ': only content is supported') }}{%- endif -%}
{%- endfor -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- elif message['content'] is defined and message['content'] is sequence and message['content'] is not mapping -%}
{%- for part in message['content'] -%}
{%- if part is mapping and part['type'] == 'text' and part['text'] is string -%}
{%- set turn.text = turn.text ~ part['text'] -%}
{%- else -%}
{{ raise_exception(where ~ ' has a content part ' ~ loop.index0 ~ ' that is not text') }}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{{ raise_exception(where ~ ' has a content that is neither text nor a list of text parts') }}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- set system.text = turn.text ~ '\\n\\n' -%}
{%- set system.waits = true -%}
{%- else -%}
{%- if system.waits -%}
{%- set turn.text = system.text ~ turn.text -%}
{%- set system.waits = false -%}
{%- endif -%}
{%- for token in control -%}
{%- set turn.text = turn.text | replace(token, token[0] ~ 'JOINER' ~ token[1:]) -%}
{%- endfor -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ turn.text }}<|end_of_turn|>{% endgeneration %}
{%- else -%}
<|user|>{{ turn.text }}<|end_of_turn|>
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if system.waits -%}
{{ raise_exception("message 0 (role 'system') is alone: a user turn must follow it") }}
{%- endif -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def _literals(words: Sequence[str]) -> str:
    escaped = (word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") for word in words)
    return ", ".join(f"'{word}'" for word in escaped)


def template_for(tokens: Sequence[str]) -> str:
    """The template that keeps contents apart from these control tokens."""
    control = [token for token in tokens for _ in range(passes(token))]
    lines = _TEMPLATE.strip().replace("REFUSED", _literals(REFUSED)).replace("JOINER", JOINER)
    return lines.replace("CONTROL", _literals(control))


CHAT_TEMPLATE = template_for((END_OF_TEXT, PAD, *ROLES))  # of the BPE that prepare_data trains


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer's own control tokens."""
    return template_for(control_tokens(tokenizer))
