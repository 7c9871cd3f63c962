"""Control messages: what was sent is what is read, and what is malformed is dropped."""

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.messages import (
    DispatchUpdate,
    LeaseDecline,
    LeaseGrant,
    LeaseRequest,
    Message,
    RankState,
    Recall,
    decode,
    encode,
)

counts = st.integers(0, 2**64 - 1)
messages = st.one_of(
    st.builds(RankState, *[counts] * 7),
    st.builds(LeaseRequest, counts, counts, counts),
    st.builds(LeaseGrant, counts, counts, counts, counts),
    st.builds(LeaseDecline, counts, counts, counts, st.text(max_size=20)),
    st.builds(Recall, counts),
    st.builds(DispatchUpdate, counts, counts, counts),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
EXAMPLES: list[Message] = [
    RankState(0, 1, 2, 3, 4, 5, 6),
    LeaseRequest(rank=1, step=2, rows=3),
    LeaseGrant(owner=0, rank=1, step=2, rows=3),
    LeaseDecline(owner=0, rank=1, step=2, reason="busy"),
    Recall(3),
    DispatchUpdate(queued=1, sent=2, moved=3),
]
WRONG = [None, True, -1, 1.5, "1", b"1", [], {}]


def fields_of(message: Message) -> dict[str, Any]:
    return msgspec.msgpack.decode(encode(message))


def decoded(fields: Any) -> Message | None:
    return decode(msgspec.msgpack.encode(fields))


def test_the_examples_are_of_every_kind() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


@given(messages)
def test_what_was_sent_is_what_is_read(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary() | values.map(msgspec.msgpack.encode))
def test_noise_is_no_message(data: bytes) -> None:
    assert decode(data) is None


@given(messages, st.data())
def test_a_cut_or_prolonged_message_is_dropped(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    assert decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))]) is None
    assert decode(encoded + data.draw(st.binary(min_size=1))) is None


@given(messages, st.integers(0), st.binary(min_size=1, max_size=4))
def test_what_is_read_is_whole_whatever_was_written_over_it(
    message: Message, at: int, noise: bytes
) -> None:
    """Either nothing, or a message whose every field can be one."""
    data = bytearray(encode(message))
    at %= len(data)
    data[at : at + len(noise)] = noise
    if (read := decode(bytes(data))) is not None:
        fields = fields_of(read)
        assert fields.pop("kind") == type(read).__name__
        assert isinstance(fields.pop("reason", ""), str)
        assert all(type(value) is int and value >= 0 for value in fields.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_missing_or_surplus_field_is_dropped(message: Message) -> None:
    for name, value in fields_of(message).items():
        fields = fields_of(message)
        del fields[name]
        assert decoded(fields) is None, f"without {name}"
        assert decoded({**fields, name: value, "surplus": 1}) is None, f"surplus beside {name}"
        assert decoded({**fields, name: value}) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_value_of_the_wrong_type_is_dropped(message: Message) -> None:
    for name in fields_of(message):
        for wrong in WRONG:
            if name != "reason" or wrong != "1":
                assert decoded({**fields_of(message), name: wrong}) is None, (name, wrong)


def test_text_that_is_no_utf_8_is_dropped() -> None:
    encoded = encode(LeaseDecline(owner=0, rank=1, step=2, reason="busy"))
    assert decode(encoded.replace(b"busy", b"bus\xff")) is None
    assert decode(encoded.replace(b"step", b"ste\xff")) is None
