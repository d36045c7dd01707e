"""A pairing agent for sensors without display and buttons (NoInputNoOutput), as BlueZ asks for on D-Bus.

Some sensors answer only over an encrypted link. BlueZ then begins to pair by itself and asks the default agent.
It agrees for the devices that this gateway is there for, and for no others; where numbers would have to be compared
or typed in, nobody is there to do it. Source: BlueZ, doc/org.bluez.Agent.rst and org.bluez.AgentManager.rst.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from dbus_fast import Message, MessageType

log = logging.getLogger(__name__)

AGENT = "org.bluez.Agent1"
AGENT_MANAGER = "org.bluez.AgentManager1"
AGENT_MANAGER_PATH = "/org/bluez"
AGENT_PATH = "/org/wardlink/agent"
CAPABILITY = "NoInputNoOutput"
REJECTED = "org.bluez.Error.Rejected"

PAIRING_HINT = (
    "bring the device into its pairing mode; if it was paired before: bluetoothctl remove ADDRESS, and let the device "
    "forget this gateway too"
)

_ADDRESS = re.compile(r"/dev_([0-9A-F]{2}(?:_[0-9A-F]{2}){5})\Z")
_NOTICES = frozenset({"Release", "Cancel"})


def answer(message: Message, may_pair: Callable[[str], bool]) -> Message | None:
    """The answer to a call of the agent; None if the message is none.

    `may_pair` is asked with an address, upper case with colons.
    """
    if message.message_type is not MessageType.METHOD_CALL or message.interface != AGENT or message.path != AGENT_PATH:
        return None
    if message.member in _NOTICES:
        return Message.new_method_return(message)
    found = _ADDRESS.search(str(message.body[0])) if message.body else None
    address = found.group(1).replace("_", ":") if found else "a device without address"
    if message.member == "RequestAuthorization" and found and may_pair(address):
        log.info("%s: pairing", address)
        return Message.new_method_return(message)
    log.warning("%s: pairing (%s) rejected", address, message.member)
    return Message.new_error(message, REJECTED, "Rejected")
