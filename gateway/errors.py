"""The one family of errors: whose fault it is, whether it can heal by itself, what the operator can do.

Everything that wardlink raises on purpose derives from `WardlinkError`; anything else is a bug.
The command line turns one into a single line and an exit code, a service into a retry or an exit.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2


class Fault(Enum):
    """Whose fault an error is."""

    OPERATOR = "operator"
    """A configuration, a command line, a missing credential: only a person can mend it."""
    ENVIRONMENT = "environment"
    """A server, a network, a device that is away: it may come back."""
    PEER = "peer"
    """Bytes that came from somebody else and are not what they should be."""


class WardlinkError(Exception):
    """Base of all expected errors.

    `message` says what happened, where, and what was expected; `hint` says what helps.
    """

    fault: ClassVar[Fault] = Fault.ENVIRONMENT
    heals: ClassVar[bool] = False
    """True where trying again later, with nothing changed by hand, may succeed."""
    exit_code: ClassVar[int] = EXIT_FAILURE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ConfigError(WardlinkError):
    """A setting, credential or command line that cannot be used."""

    fault = Fault.OPERATOR
    exit_code = EXIT_CONFIG


class UnavailableError(WardlinkError):
    """A server, a device or a disk does not answer now and may do so later."""

    heals = True


class RefusedError(WardlinkError):
    """A server answered, and will never accept this: trying again changes nothing."""


class DamagedError(WardlinkError):
    """Stored data is not what was stored."""


class DeviceError(WardlinkError):
    """A device answered, but not as its protocol says, or says itself that it failed."""

    fault = Fault.PEER
    heals = True


class WireError(WardlinkError):
    """A message does not follow the wire contract."""

    fault = Fault.PEER


class UnknownVersionError(WireError):
    """The message is of a version of the contract that this program does not know."""


class UnknownSchemaError(WireError):
    """The message names a schema that this version of the contract does not have."""


class MalformedError(WireError):
    """The message cannot be decoded, or its content breaks its schema."""
