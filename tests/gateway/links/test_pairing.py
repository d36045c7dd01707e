from __future__ import annotations

from typing import Any

import pytest
from dbus_fast import Message, MessageType

from gateway.links import pairing

DEVICE = "/org/bluez/hci0/dev_00_22_D0_3A_10_01"


def asked(
    member: str, *body: Any, signature: str = "", path: str = pairing.AGENT_PATH, interface: str = pairing.AGENT
) -> Message | None:
    message = Message(":1.5", path, interface, member, signature=signature, body=list(body), sender=":1.2", serial=7)
    return pairing.answer(message, lambda address: address == "00:22:D0:3A:10:01")


def test_a_device_that_is_expected_may_pair() -> None:
    answer = asked("RequestAuthorization", DEVICE, signature="o")
    assert answer is not None
    assert answer.message_type is MessageType.METHOD_RETURN


@pytest.mark.parametrize(
    ("member", "signature", "body"),
    [
        ("RequestAuthorization", "o", ["/org/bluez/hci0/dev_00_22_D0_3A_10_02"]),
        ("RequestAuthorization", "o", [DEVICE + "/service0010"]),
        ("RequestAuthorization", "", []),
        ("RequestConfirmation", "ou", [DEVICE, 123456]),
        ("RequestPinCode", "o", [DEVICE]),
        ("RequestPasskey", "o", [DEVICE]),
        ("AuthorizeService", "os", [DEVICE, "00001101-0000-1000-8000-00805f9b34fb"]),
    ],
)
def test_everything_else_is_rejected(member: str, signature: str, body: list[Any]) -> None:
    answer = asked(member, *body, signature=signature)
    assert answer is not None
    assert answer.message_type is MessageType.ERROR
    assert answer.error_name == pairing.REJECTED


@pytest.mark.parametrize("member", ["Release", "Cancel"])
def test_notices_are_taken(member: str) -> None:
    answer = asked(member)
    assert answer is not None
    assert answer.message_type is MessageType.METHOD_RETURN


@pytest.mark.parametrize("changed", [{"path": "/other"}, {"interface": "org.bluez.Other"}])
def test_what_is_not_for_the_agent_is_left_alone(changed: dict[str, str]) -> None:
    assert asked("RequestAuthorization", DEVICE, signature="o", **changed) is None
