"""Random JSON schemas: bounded ones, so that a finite answer exists, with every keyword that people write."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "größe", "a b", 'q"uote', "x", "id", "tags", "née", "value")
PATTERNS = ("^[a-c]{1,4}$", "^(yes|no)$", r"^\d{3}-\d{2}$", "^[A-Z][a-z]{0,5}$", "^[^x]{2,5}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
BEYOND: tuple[Schema, ...] = (
    {"not": {"type": "string"}},
    {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 3, "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}, "maxItems": 2, "items": {"type": "boolean"}},
    {"if": {"type": "string"}, "then": {"maxLength": 2}},
    {"type": "object", "propertyNames": {"maxLength": 1}, "maxProperties": 2},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
    {"type": "string", "format": "regex", "maxLength": 5},
)
"""What a grammar can hardly say: enforced or refused, never ignored."""


class SchemaMaker:
    """Schemas drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def make(self) -> Schema:
        """An object or an array at the top, as clients ask for them, now and then with definitions."""
        draw = self._draw
        defs = {f"d{index}": self._any(1) for index in range(draw.randint(0, 2))}
        schema = draw.choice((self._object, self._object, self._array))(3, tuple(defs))
        return {**schema, "$defs": defs} if defs else schema

    def _any(self, depth: int, defs: tuple[str, ...] = ()) -> Schema:
        draw = self._draw
        if draw.random() < 0.03:
            return dict(draw.choice(BEYOND))
        if defs and draw.random() < 0.15:
            return {"$ref": f"#/$defs/{draw.choice(defs)}"}
        simple = (self._integer, self._number, self._string, self._choice, self._plain)
        if depth <= 0 or draw.random() < 0.5:
            return draw.choice(simple)()
        return draw.choice((self._object, self._array, self._union))(depth - 1, defs)

    def _plain(self) -> Schema:
        return self._draw.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))

    def _integer(self) -> Schema:
        draw, low = self._draw, self._draw.randint(-1000, 1000)
        bounds: Schema = {"minimum": low, "maximum": low + draw.randint(0, 500)}
        if draw.random() < 0.2:
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + draw.randint(3, 500)}
        if draw.random() < 0.15:
            bounds = {"multipleOf": draw.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
        return {"type": "integer", **bounds}

    def _number(self) -> Schema:
        low = round(self._draw.uniform(-10, 10), 2)
        return {"type": "number", "minimum": low, "maximum": round(low + self._draw.uniform(0, 20), 2)}

    def _string(self) -> Schema:
        draw, kind = self._draw, self._draw.random()
        if kind < 0.25:
            return {"type": "string", "pattern": draw.choice(PATTERNS)}
        if kind < 0.4:
            return {"type": "string", "format": draw.choice(FORMATS)}
        low = draw.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 8)}

    def _choice(self) -> Schema:
        values = [self._draw.choice((None, True, -3, 2.5, "été", "a\nb", [1, "x"], {"k": []})) for _ in range(3)]
        return {"const": values[0]} if self._draw.random() < 0.3 else {"enum": values}

    def _array(self, depth: int, defs: tuple[str, ...]) -> Schema:
        draw, low = self._draw, self._draw.randint(0, 2)
        schema: Schema = {
            "type": "array",
            "items": self._any(depth, defs),
            "minItems": low,
            "maxItems": low + draw.randint(0, 2),
        }
        if draw.random() < 0.2:
            first = [self._any(depth, defs) for _ in range(2)]
            schema = {"type": "array", "prefixItems": first, "items": False, "minItems": 1}
        return schema

    def _object(self, depth: int, defs: tuple[str, ...]) -> Schema:
        names = self._draw.sample(WORDS, self._draw.randint(0, 4))
        properties = {name: self._any(depth, defs) for name in names}
        required = [name for name in names if self._draw.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _union(self, depth: int, defs: tuple[str, ...]) -> Schema:
        key = self._draw.choice(("anyOf", "anyOf", "oneOf", "allOf"))
        if key == "allOf":
            return {"allOf": [self._integer(), {"minimum": -2000}]}
        return {key: [self._any(depth, defs) for _ in range(self._draw.randint(1, 3))]}
