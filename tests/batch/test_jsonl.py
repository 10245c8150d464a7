"""Lines of JSON with the exact text of each value, at any depth, and the id of a line that is no JSON."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llama_sampling.batch.jsonl import MAX_DEPTH, TOO_DEEP, find_value, nesting, read_record, value_end

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@pytest.mark.slow
@settings(deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans(), st.sampled_from([None, " ", "\t"]))
def test_fields_are_read_as_python_reads_them_and_keep_their_text(record, ascii_only, indent):
    """Any JSON object, however it is spaced: the same values, and texts that read as these."""
    try:
        text = json.dumps(record, ensure_ascii=ascii_only, indent=indent).replace("\n", " ").encode()
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8
        return
    fields = read_record(text, used=list(record))
    assert {name: field.value for name, field in fields.items()} == {k: v for k, v in record.items() if v is not None}
    for name, field in fields.items():
        assert json.loads(field.json) == record[name] and field.json.encode() in text


@pytest.mark.slow
@settings(deadline=None)
@given(VALUES, st.text(alphabet='[]{},:"1 xntf\\', max_size=3), st.data())
def test_the_end_of_a_value_is_where_python_finds_it(value, noise, data):
    """Of valid text, and of the same with some characters put in somewhere."""
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    for changed in (text, text[:at] + noise + text[at:]):
        stripped = changed.lstrip(" \t\n\r")
        try:
            end = (
                json.JSONDecoder(parse_constant=lambda name: 1 / 0).raw_decode(stripped)[1]
                + len(changed)
                - len(stripped)
            )
        except (ValueError, ZeroDivisionError):
            end = -1
        assert value_end(changed, 0) == end


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 40))
def test_any_bytes_are_read_or_refused_in_a_sentence(line, cut):
    """No bytes raise anything but ValueError, by themselves or put into a record."""
    record = b'{"id": [7], "prompt": "a", "n": {"b": 1.5}}'
    for text in (line, record[:cut] + line + record[cut:], record[:cut]):
        find_value(text, ["id", "task_id"])
        try:
            read_record(text, ["prompt"])
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 983, 100_000])
def test_depth_is_no_error_of_pythons(depth):
    """Up to `MAX_DEPTH` levels a value is read; beyond, it is only passed on, at any depth."""
    deep = "[" * depth + "]" * depth
    field = read_record(f'{{"prompt": "a", "id": {deep}}}'.encode())["id"]
    assert field.json == deep and nesting(deep) == depth
    assert (field.value is TOO_DEEP) == (depth > MAX_DEPTH)
    assert find_value(f'{{"prompt": a, "id": {deep}'.encode(), ["id"]) == deep
