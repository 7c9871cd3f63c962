"""One line of the input: an OpenAI Batch request, checked as far as that needs no model.

Pure. What only the model can judge (a prompt that is too long, a parameter out of
range) becomes an error record when the request runs; what is checked here stops the job before it
starts, since a file with such a line is not the one that the user meant.
"""

from typing import Any, NamedTuple

import orjson

from sidp_sgl.batch.files import encoding

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS = (CHAT, COMPLETIONS)
MAX_LINE_BYTES = 64 * 2**20
_CONTENT = {CHAT: ("messages",), COMPLETIONS: ("prompt",)}


class LineError(ValueError):
    """What is wrong with a line, without its number."""


class EncodingError(LineError):
    """The line is not UTF-8, so that the file is not."""


class Request(NamedTuple):
    """One checked request."""

    line: int  # in the input, from 1
    custom_id: str
    url: str  # one of URLS
    body: bytes  # JSON object
    num_bytes: int  # of its line
    is_seeded: bool = False  # it samples, and wants to do so again in the same way


def parse(line: int, text: bytes) -> Request:
    """The request of a line; raises LineError."""
    if len(text) > MAX_LINE_BYTES:
        raise LineError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if what_to_do := encoding.of_text(text):
            raise EncodingError(what_to_do) from None
        raise LineError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise LineError("not a JSON object")
    custom_id, url = values.get("custom_id"), values.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("custom_id is missing or no text")
    if values.get("method") != "POST":
        raise LineError(f"method is {_shown(values, 'method')}: use POST")
    if url == EMBEDDINGS:
        raise LineError(f"url {url} is not supported: run-batch generates text")
    if url not in URLS:
        raise LineError(f"url is {_shown(values, 'url')}: use {' or '.join(URLS)}")
    body: Any = values.get("body")
    _check_body(body, url)
    body.pop("rid", None)  # an id in the engine, where two of the same can't be at a time
    try:
        content = orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise LineError(f"body can't be passed on ({error})") from None
    return Request(line, custom_id, url, content, len(text), _is_seeded(body))


def _check_body(body: Any, url: str) -> None:
    if not isinstance(body, dict):
        raise LineError("body is missing or no JSON object")
    if body.get("stream"):
        raise LineError("body has stream: true: results of a job are not streamed, leave it out")
    for name in _CONTENT[url]:
        if not body.get(name):
            raise LineError(f"body has no {name}, which {url} needs")


def _is_seeded(body: dict[str, Any]) -> bool:
    return body.get("seed") is not None and body.get("temperature") != 0


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name])[:80] if name in values else "missing"
