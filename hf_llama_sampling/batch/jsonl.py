"""Read lines of JSON: each field's value, and its exact text.

- Values that are only passed on (ids, fields to keep) keep their spelling: `1e-400`, `1.0`, escapes, any depth.
- Values that are used are read strictly: no NaN, no infinity, no name twice, no nesting beyond `MAX_DEPTH`.

This module gives no field a meaning, and does not check a value's type.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

MAX_DEPTH = 64  # Python's own reader fails at a depth below 1,000 that varies with its caller's depth

_STRING = r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_TOKEN = re.compile(rf"[ \t\n\r]*(?:(?P<text>{_STRING})|(?P<plain>{_NUMBER}|true|false|null)|(?P<mark>[][{{}},:]))")
_TEXT_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")


class Field(NamedTuple):
    """A field's value, and its JSON text; the value is `TOO_DEEP` if nested beyond `MAX_DEPTH`."""

    value: Any
    json: str


TOO_DEEP: Any = object()


def read_record(line: bytes, used: Collection[str] = ()) -> dict[str, Field]:
    """Read the fields of one line, except null ones. Fields named in `used` are read strictly.

    Raises:
        ValueError: the line is not UTF-8, or not one JSON object, or names a field twice.

    >>> read_record(b'{"id": 1e-400, "prompt": "Hi"}')
    {'id': Field(value=0.0, json='1e-400'), 'prompt': Field(value='Hi', json='"Hi"')}
    """
    try:
        text = line.decode("utf-8-sig").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, and this line is not, at byte {error.start}: convert it") from None
    if not text:
        raise ValueError("a line must hold one JSON object: it is empty")
    return read_object(text, used)


def read_object(text: str, used: Collection[str] = ()) -> dict[str, Field]:
    """Read the fields of a JSON object from text; see `read_record`."""
    if not text.startswith("{"):
        raise _not_an_object(text)
    fields: dict[str, Field] = {}
    shallow = text.count("[") + text.count("{") <= MAX_DEPTH
    at = _SPACE.match(text, 1).end()  # type: ignore[union-attr]  # matches nothing at least
    while not (text[at : at + 1] == "}" and not fields):
        name, at = _LAX.raw_decode(text, at) if text[at : at + 1] == '"' else _fail(text)
        colon = _COLON.match(text, at)
        start = colon.end() if colon else _fail(text)
        value, at = _read_value(text, start, _BY_THE_BOOK if name in used else _LAX, shallow=shallow)
        if name in fields:
            raise _named_twice(name)
        fields[name] = Field(value, text[start:at])
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] != ",":
            break
        at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    if text[at:] != "}":
        _fail(text)
    return {name: field for name, field in fields.items() if field.value is not None}


def find_value(line: bytes, names: Sequence[str]) -> str | None:
    """Find the JSON text of the first of these fields that a line has, even if the line is not valid JSON.

    >>> find_value(b'{"prompt": "Hi" "task_id": 7, ', ["id", "task_id"])
    '7'
    """
    text = line.decode("utf-8-sig", "replace")
    depth, found = 0, dict[str, str]()
    for match in _TEXT_OR_BRACKET.finditer(text):
        lexeme = match.group()
        depth += (lexeme in "[{") - (lexeme in "]}")
        if depth == 1 and lexeme[0] == '"' and lexeme[1:-1] in names:
            value = _value_after(text, match.end())
            if value is not None:
                found.setdefault(lexeme[1:-1], value)
    for name in names:
        if name in found:
            return found[name]
    if '"' not in _TEXT_OR_BRACKET.sub("", text):
        return None
    for name in names:  # a quotation mark is missing somewhere, so texts and the rest are mixed up
        at = text.find(f'"{name}"')
        value = _value_after(text, at + len(name) + 2) if at >= 0 else None
        if value is not None:
            return value
    return None


def _value_after(text: str, at: int) -> str | None:
    """Return the JSON text of a value after a colon at this place; None if there is none, or null."""
    colon = _COLON.match(text, at)
    end = value_end(text, colon.end()) if colon else -1
    if colon is None or end < 0 or text[end : end + 1] not in ("", ",", "}", "]", " ", "\t", "\r", "\n"):
        return None
    value = text[colon.end() : end]
    return None if value == "null" else value


def value_end(text: str, start: int) -> int:
    """Find the end of the JSON value that starts here, at any depth of nesting; -1 if there is none.

    >>> value_end('[[1, "]"]], 5', 0)
    10
    """
    brackets: list[str] = []
    state, at = "value", start
    while token := _TOKEN.match(text, at):
        at = token.end()
        kind = token["mark"] or ("text" if token["text"] else "plain")
        if kind in "[{" and state in ("value", "value or end"):
            brackets.append(kind)
            state = "value or end" if kind == "[" else "key or end"
        elif kind in "]}" and state in ("after", "value or end", "key or end") and brackets[-1] + kind in ("[]", "{}"):
            brackets.pop()
            state = "after"
        elif kind == "," and state == "after":
            state = "value" if brackets[-1] == "[" else "key"
        elif kind == "text" and state in ("key", "key or end"):
            state = "colon"
        elif kind == ":" and state == "colon":
            state = "value"
        elif kind in ("text", "plain") and state in ("value", "value or end"):
            state = "after"
        else:
            return -1
        if state == "after" and not brackets:
            return at
    return -1


def nesting(text: str) -> int:
    """Compute the deepest nesting of brackets."""
    depth = deepest = 0
    for match in _TEXT_OR_BRACKET.finditer(text):
        depth += (match.group() in "[{") - (match.group() in "]}")
        deepest = max(deepest, depth)
    return deepest


def canonical(value: Any) -> str:
    """Encode a value as canonical JSON, independent of spacing and the order of names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def canonical_record(fields: Mapping[str, Field], used: Collection[str]) -> str:
    """Encode a record as canonical JSON; values that are not used keep their spelling."""
    texts = (
        f"{json.dumps(name)}:{canonical(field.value) if name in used and field.value is not TOO_DEEP else field.json}"
        for name, field in sorted(fields.items())
    )
    return "{" + ",".join(texts) + "}"


def _read_value(text: str, start: int, decoder: json.JSONDecoder, *, shallow: bool) -> tuple[Any, int]:
    if not shallow:
        end = value_end(text, start)
        if end < 0:
            _fail(text)
        if nesting(text[start:end]) > MAX_DEPTH:
            return TOO_DEEP, end
    try:
        value, end = decoder.raw_decode(text, start)
        return value, end
    except json.JSONDecodeError:
        value, end = _fail(text)
        return value, end


def _fail(text: str) -> Any:
    """Raise the reason why this is not a JSON object, in the words of Python's own reader."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a line must hold one JSON object: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        pass
    raise ValueError("a line must hold one JSON object, and this is nested too deeply")


def _not_an_object(text: str) -> ValueError:
    if nesting(text) > MAX_DEPTH:
        return ValueError("a record must be a flat JSON object, and this is nested too deeply")
    try:
        kind = type(json.loads(text)).__name__
    except json.JSONDecodeError as error:
        return ValueError(f"a line must hold one JSON object: {error.msg} at character {error.pos + 1}")
    return ValueError(f"a line must hold one JSON object, and this holds a {kind}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _named_twice(next(name for at, name in enumerate(names) if name in names[:at]))
    return values


def _named_twice(name: str) -> ValueError:
    return ValueError(f"a JSON object names each field once, and this names {name!r} twice: drop one")


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}: give a number or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {text}")
    return number


def _integer(text: str) -> int:
    _finite(text)  # first, since Python's int() has its own limit, with a message that does not help here
    return int(text)


_LAX = json.JSONDecoder(parse_constant=_no_constant, parse_int=float)
_BY_THE_BOOK = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
)
