"""What a request says about the form of its answer, as the grammar that `TextRequest.grammar` carries.

That string is llguidance's own serialised grammar (JSON: `{"grammars": [...]}`). It is compiled with the model's tokens where
`lm_head` lives; here it is only checked, so that what cannot be compiled is a 400 that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cake_core.errors import RequestError
from cake_server.errors import ApiError, unsupported
from cake_server.schemas.common import SamplingFields

MAX_SCHEMA_BYTES = 100_000
MAX_SCHEMA_DEPTH = 64
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def answer_grammar(body: SamplingFields) -> str | None:
    """The grammar a request asks for, by whichever of the fields in use for it. Raises a 400 for a bad or a second one."""
    wanted = {name for name in ("json_schema", "grammar", "structured_outputs") if getattr(body, name) is not None}
    if body.response_format is not None and body.response_format.type != "text":
        wanted.add("response_format")
    if not wanted:
        return None
    if len(wanted) > 1:
        raise RequestError(f"give one of {' and '.join(sorted(wanted))}, not both", min(wanted))
    if body.json_schema is not None:
        return schema_grammar(body.json_schema, "json_schema")
    if body.grammar is not None:
        return _text_grammar(body.grammar, "grammar")
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    return _response_format(body)


def _response_format(body: SamplingFields) -> str:
    asked = body.response_format
    if asked is not None and asked.type == "json_object":
        return schema_grammar(asked.schema or _ANY_OBJECT, "response_format")
    if asked is not None and asked.type == "json_schema":
        spec = asked.json_schema
        schema = spec.schema if spec is not None else asked.schema
        if schema is None:
            raise RequestError("response_format of type json_schema needs json_schema.schema", "response_format.json_schema")
        return schema_grammar(schema, "response_format", strict=spec is None or spec.strict is not False)
    raise RequestError("response_format.type is text, json_object or json_schema", "response_format.type")


def _structured(asked: Mapping[str, Any]) -> str:
    """vLLM's `structured_outputs`: one of json, json_object, regex, choice, grammar."""
    given = {key: value for key, value in asked.items() if value is not None}
    if len(given) != 1:
        raise RequestError("structured_outputs takes one of json, json_object, regex, choice and grammar", "structured_outputs")
    ((kind, value),) = given.items()
    param = f"structured_outputs.{kind}"
    if kind == "json" and isinstance(value, str):
        value = _parse(value, param)
    if kind == "json" and isinstance(value, Mapping):
        return schema_grammar(value, param)
    if kind == "json_object" and value is True:
        return schema_grammar(_ANY_OBJECT, param)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return _lark("start: " + " | ".join(json.dumps(text) for text in value), param)
    if kind == "regex" and isinstance(value, str):
        from llguidance import LLMatcher

        return _checked(LLMatcher.grammar_from_regex(value), param)
    if kind == "grammar" and isinstance(value, str):
        return _text_grammar(value, param)
    raise unsupported(param, f"{param} is not something this server can enforce")


def _parse(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not valid JSON", param) from error


def _text_grammar(text: str, param: str) -> str:
    """A grammar in GBNF (llama.cpp) or Lark (llguidance), told apart by how their rules look."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{param} may have at most {MAX_SCHEMA_BYTES} characters", param)
    if "::=" not in text:
        return _lark(text, param)
    from llguidance import gbnf_to_lark

    try:
        return _lark(gbnf_to_lark.gbnf_to_lark(text), param)
    except ApiError:
        raise
    except Exception as error:  # a parser of foreign text raises whatever it meets
        raise ApiError(400, f"{param} is not a valid GBNF grammar: {error}", "invalid_grammar", param) from error


def _lark(text: str, param: str) -> str:
    return _checked(json.dumps({"grammars": [{"lark_grammar": text}]}), param)


def schema_grammar(schema: Mapping[str, Any], param: str, strict: bool = True) -> str:
    """The grammar of a JSON schema. Blanks are not free: small models loop on them. Not strict: what cannot be enforced is
    ignored instead of refused."""
    from llguidance import LLMatcher

    if depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"{param}: the schema is nested more than {MAX_SCHEMA_DEPTH} deep", param)
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{param}: the schema has more than {MAX_SCHEMA_BYTES} bytes", param)
    try:
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False, "lenient": not strict})
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", "invalid_schema", param) from error
    return _checked(grammar, param)


def _checked(grammar: str, param: str) -> str:
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        reason = messages[0].splitlines()[0] if messages else "it cannot be compiled"
        raise ApiError(400, f"{param} cannot be enforced: {reason}", "invalid_schema", param)
    return grammar


def depth(value: Any) -> int:
    """Nesting of mappings and lists, found without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, level = todo.pop()
        deepest = max(deepest, level)
        if isinstance(item, Mapping):
            todo += [(child, level + 1) for child in item.values()]
        elif isinstance(item, list):
            todo += [(child, level + 1) for child in item]
    return deepest
