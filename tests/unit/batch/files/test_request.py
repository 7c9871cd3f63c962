"""Lines of the input and of the output."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.batch.files.records import Answer, Record, error_body, read_record, write_record
from sidp_sgl.batch.files.request import CHAT, MAX_LINE_BYTES, URLS, LineError, parse
from tests.support.jobs import line

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def changed(**fields: object) -> bytes:
    return orjson.dumps({**line("a"), **fields})


def test_a_request() -> None:
    text = changed(custom_id="é\n1", extra=[1])
    request = parse(7, text)
    assert (request.line, request.custom_id, request.url) == (7, "é\n1", "/v1/completions")
    assert orjson.loads(request.body) == {"model": "demo", "prompt": "1+1="}
    assert request.num_bytes == len(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 but, it seems, Latin-1 (byte 0xFF at column 1)"),
        (b"[]", "not a JSON object"),
        (changed(custom_id=1), "custom_id is missing or no text"),
        (changed(custom_id=""), "custom_id is missing or no text"),
        (changed(method="GET"), "method is 'GET': use POST"),
        (changed(url=None), "url is None: use /v1/chat/completions or /v1/completions"),
        (changed(url="/v1/embeddings"), "/v1/embeddings is not supported: run-batch generates"),
        (changed(body=None), "body is missing"),
        (changed(body={"prompt": "a", "stream": True}), "stream: true"),
        (changed(body={"model": "m"}), "body has no prompt"),
        (changed(url=CHAT), "body has no messages"),
    ],
)
def test_what_is_wrong_with_a_line(text: bytes, reason: str) -> None:
    with pytest.raises(LineError) as caught:
        parse(1, text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_too_long() -> None:
    with pytest.raises(LineError, match="longer than 64 MiB"):
        parse(1, b" " * (MAX_LINE_BYTES + 1))


@given(st.binary(max_size=40) | JSON.map(orjson.dumps))
def test_any_other_line_is_refused_with_a_reason(text: bytes) -> None:
    with pytest.raises(LineError):
        parse(1, text)


@given(st.fixed_dictionaries({}, optional={name: JSON for name in line("a")}))
def test_any_fields(fields: dict[str, object]) -> None:
    """Either a request with what the line says, or a reason."""
    try:
        request = parse(3, orjson.dumps(fields))
    except LineError:
        return
    assert request.custom_id == fields["custom_id"] and request.url in URLS
    body = dict(fields["body"])  # type: ignore[call-overload]
    body.pop("rid", None)
    assert orjson.loads(request.body) == body


def test_an_id_of_the_engines_never_decides() -> None:
    """Two requests of one rid can't be in SGLang at a time."""
    for rid in ("same", ["a", "b"], 7, None):
        assert b"rid" not in parse(1, orjson.dumps(line("a", rid=rid))).body


def test_a_body_that_is_nested_deeply() -> None:
    text = orjson.dumps(line("a")).replace(b'"demo"', b"[" * 500 + b"]" * 500)
    with pytest.raises(LineError, match="can't be passed on"):
        parse(1, text)


@given(st.integers(1, 2**62), st.sampled_from([200, 400, 500]), st.text(min_size=1), JSON)
def test_a_record_is_read_as_it_was_written(
    number: int, status: int, custom_id: str, body: object
) -> None:
    text = write_record(custom_id, Answer(number, status, orjson.dumps(body)))
    assert text.endswith(b"\n") and text.count(b"\n") == 1
    assert read_record(text) == Record(number, status >= 400)
    values = orjson.loads(text)
    assert values["custom_id"] == custom_id and values["error"] is None
    assert values["response"] == {
        "status_code": status,
        "request_id": values["id"],
        "body": body,
    }


@given(st.data())
def test_no_part_of_a_record_is_a_record(data: st.DataObject) -> None:
    text = write_record("a", Answer(12, 200, b'{"b": 1}'))
    assert read_record(text[: data.draw(st.integers(0, len(text) - 1))]) is None


@given(st.binary(max_size=40) | JSON.map(orjson.dumps))
def test_anything_else_is_no_record(text: bytes) -> None:
    assert read_record(text + b"\n") is None


def test_errors_have_the_shape_of_openai() -> None:
    assert orjson.loads(error_body("too long", "invalid_request_error", 400)) == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": None,
            "code": 400,
        }
    }
