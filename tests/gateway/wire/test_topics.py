"""Topics are read and built in one place; no name can become a wildcard, another level or a reserved word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import MalformedError, UnknownVersionError, WireError
from gateway.wire import topics
from gateway.wire.topics import Topic, TopicKind

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,79}", fullmatch=True)


@given(NAMES, NAMES, NAMES)
def test_what_is_built_is_read_back(gateway: str, device: str, signal: str) -> None:
    assert topics.parse(topics.data(gateway, device, signal)) == Topic(TopicKind.DATA, gateway, device, signal)
    assert topics.parse(topics.loss(gateway, device)) == Topic(TopicKind.LOSS, gateway, device)
    assert topics.parse(topics.meta(gateway, device)) == Topic(TopicKind.META, gateway, device)
    assert topics.parse(topics.status(gateway)) == Topic(TopicKind.STATUS, gateway)
    assert topics.parse(topics.receipt(gateway)) == Topic(TopicKind.RECEIPT, gateway)
    assert topics.parse(topics.receipt_request(gateway)) == Topic(TopicKind.RECEIPT_REQUEST, gateway)
    assert topics.parse(topics.time(gateway)) == Topic(TopicKind.TIME, gateway)
    assert topics.parse(topics.time_request(gateway)) == Topic(TopicKind.TIME_REQUEST, gateway)
    assert topics.parse(topics.bridge_status(gateway)) == Topic(TopicKind.BRIDGE_STATUS, bridge=gateway)
    assert all(topics.is_name(name) for name in (gateway, device, signal))


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for topic in (text, f"wardlink/v1/{text}", f"wardlink/v1/g/data/{text}"):
        try:
            parsed = topics.parse(topic)
        except WireError as error:
            said = str(error)
        else:
            said = ""
            assert all(topics.is_name(name) for name in (parsed.gateway, parsed.device, parsed.bridge) if name)
        assert len(said) < 500


BAD_NAMES = [
    "",
    "+",
    "#",
    "a+b",
    "a/b",
    "a#",
    "_cloud",
    "_x",
    "$SYS",
    ".a",
    "-a",
    "a b",
    "ä",
    "a\n",
    "\n",
    "a\0",
    "a" * 81,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name(name: str) -> None:
    assert not topics.is_name(name)
    for topic in (topics.data(name, "d", "s"), topics.data("g", name, "s"), topics.data("g", "d", name)):
        with pytest.raises(MalformedError):
            topics.parse(topic)
    with pytest.raises(MalformedError):
        topics.parse(topics.bridge_status(name))


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "wardlink",
        "wardlink/v1",
        "wardlink/v1/",
        "wardlink/v1/g",
        "wardlink/v1/g/data",
        "wardlink/v1/g/data/d",
        "wardlink/v1/g/data/d/s/more",
        "wardlink/v1/g/data/d/s/",
        "wardlink/v1/g/receipt/requests",
        "wardlink/v1/g/cmd/x",
        "wardlink/v1/g/time/requests",
        "wardlink/v1/_cloud/data/d/s",
        "wardlink/v1/_cloud/status",
        "/wardlink/v1/g/status",
        "Wardlink/v1/g/status",
        "other/v1/g/status",
        "a/" * 30_000,
    ],
)
def test_what_is_no_topic_of_ours(topic: str) -> None:
    with pytest.raises(MalformedError) as caught:
        topics.parse(topic)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("version", ["v2", "v0", "v", "1", "v1.1", "", "v" * 60_000])
def test_another_version_is_an_error_of_its_own(version: str) -> None:
    with pytest.raises(UnknownVersionError) as caught:
        topics.parse(f"wardlink/{version}/g/data/d/s")
    assert len(str(caught.value)) < 500
