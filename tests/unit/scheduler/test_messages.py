"""Control messages: what was sent is what is read, and what is malformed is dropped."""

from typing import Any, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.messages import (
    VERSION,
    CasDecline,
    CasGrant,
    CasRelease,
    CasRequest,
    DispatchUpdate,
    Message,
    Recall,
    StateUpdate,
    decode,
    encode,
)
from sidp_sgl.scheduler.state import RankState

counts = st.integers(0, 2**63)
modes = st.sampled_from(["was", "cas"])
seconds = st.floats(0, allow_infinity=False)
states = st.builds(RankState, *[counts] * 8, step_seconds=seconds, mode=modes)
messages = st.one_of(
    st.builds(StateUpdate, states),
    st.builds(CasRequest, counts, counts, counts),
    st.builds(CasGrant, counts, counts, counts, counts, counts),
    st.builds(CasDecline, counts, counts, counts, st.text(max_size=20)),
    st.builds(CasRelease, counts, counts),
    st.builds(Recall, counts),
    st.builds(DispatchUpdate, counts, counts, counts),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
EXAMPLES: list[Message] = [
    StateUpdate(RankState(0, 1, 2, 3, 4, 5, 6, 7, 0.5, "cas")),
    CasRequest(rank=1, step=2, rows=3),
    CasGrant(owner=0, rank=1, step=2, offset=4, rows=3),
    CasDecline(owner=0, rank=1, step=2, reason="busy"),
    CasRelease(rank=1, step=2),
    Recall(3),
    DispatchUpdate(queued=1, sent=2, moved=3),
]
WRONG = [None, True, -1, 1.5, "1", [], {}, 2**64]


def leaves(values: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields of an encoded message."""
    found = []
    for key, value in values.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += leaves(value, (*path, key))
    return found


def replaced(message: Message, path: tuple[str, ...], value: Any) -> bytes:
    values = orjson.loads(encode(message))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        return orjson.dumps(values)
    except TypeError:  # an integer of more than 64 bits
        import json

        return json.dumps(values).encode()


def test_the_examples_are_of_every_kind() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


def test_a_message_names_its_version_and_kind() -> None:
    assert orjson.loads(encode(CasRequest(rank=1, step=2, rows=3))) == {
        "v": VERSION,
        "kind": "cas_request",
        "rank": 1,
        "step": 2,
        "rows": 3,
    }


@given(messages)
def test_what_was_sent_is_what_is_read(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary() | json_values.map(lambda value: orjson.dumps(value, option=0)))
def test_noise_is_no_message(data: bytes) -> None:
    assert decode(data) is None


@given(messages, st.data())
def test_a_cut_message_is_dropped(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    assert decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))]) is None


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_missing_or_surplus_field_is_dropped(message: Message) -> None:
    for path in leaves(orjson.loads(encode(message))):
        values = orjson.loads(encode(message))
        inner = values["state"] if path[0] == "state" and len(path) > 1 else values
        value = inner.pop(path[-1])
        assert decode(orjson.dumps(values)) is None, f"without {path}"
        inner |= {path[-1]: value, "surplus": 1}
        assert decode(orjson.dumps(values)) is None, f"surplus beside {path}"
        del inner["surplus"]
        assert decode(orjson.dumps(values)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_value_of_the_wrong_type_is_dropped(message: Message) -> None:
    for path in leaves(orjson.loads(encode(message))):
        for wrong in WRONG:
            if (path[-1] == "reason" and wrong == "1") or (
                path[-1] == "step_seconds" and wrong in (1.5, 2**64) and wrong is not True
            ):
                continue
            assert decode(replaced(message, path, wrong)) is None, (path, wrong)


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, True, 1.0, "1", None])
def test_another_version_is_dropped(version: Any) -> None:
    assert decode(replaced(EXAMPLES[1], ("v",), version)) is None


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-0.1"])
def test_a_step_time_is_a_finite_duration(text: str) -> None:
    encoded = encode(EXAMPLES[0])
    assert b"0.5" in encoded
    assert decode(encoded.replace(b"0.5", text.encode())) is None
    whole = decode(encoded.replace(b"0.5", b"2"))
    assert isinstance(whole, StateUpdate) and type(whole.state.step_seconds) is float


def test_an_unknown_mode_is_dropped() -> None:
    assert decode(replaced(EXAMPLES[0], ("state", "mode"), "auto")) is None
