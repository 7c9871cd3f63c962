"""One line of the output: the result of a request, as OpenAI's Batch API writes it.

Pure. A record's `id` holds the request's line in the input: that is how a job that
continues knows what is done, in one bit per line and without a look at the input.
"""

from typing import Any, NamedTuple

import orjson

ID_PREFIX = "batch_req_"
_FAILED = 400  # HTTP statuses from here on are errors


class Answer(NamedTuple):
    """What the engine says to a request."""

    line: int
    status: int  # HTTP status that the server would have answered with
    body: bytes  # JSON: the server's response, or OpenAI's {"error": {…}}
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_error(self) -> bool:
        return self.status >= _FAILED


class Record(NamedTuple):
    """What a job that continues needs to know of a record."""

    line: int
    is_error: bool


def error_body(message: str, kind: str, code: Any = None, param: Any = None) -> bytes:
    """OpenAI's error object."""
    message = message.encode(errors="replace").decode()  # JSON has no half of a surrogate pair
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def write_record(custom_id: str, answer: Answer) -> bytes:
    """The record's line, newline included."""
    name = f"{ID_PREFIX}{answer.line}"
    response = {
        "status_code": answer.status,
        "request_id": name,
        "body": orjson.Fragment(answer.body),
    }
    record = {"id": name, "custom_id": custom_id, "response": response, "error": None}
    return orjson.dumps(record) + b"\n"


def read_record(text: bytes) -> Record | None:
    """None where the line is not a whole record."""
    if not text.endswith(b"\n"):
        return None
    try:
        values = orjson.loads(text)
        number = values["id"].removeprefix(ID_PREFIX)
        if values["id"] != f"{ID_PREFIX}{int(number)}":
            return None
        return Record(int(number), values["response"]["status_code"] >= _FAILED)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
