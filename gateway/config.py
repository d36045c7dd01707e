"""Reading TOML settings for both sides: main file, `conf.d/*.toml`, credentials; every key checked, nothing opened.

A settings tree is a frozen `msgspec.Struct`; an error names the file, the key, what was expected and what helps.
Secrets never come from TOML: they are credential files of systemd or environment variables.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gateway.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

CONFIG_BYTES_MAX = 1 << 20
SECRET_BYTES_MAX = 4096
_ENVIRONMENT_PREFIX = "WARDLINK_"

Origins = dict[tuple[str | int, ...], Path]
"""Which file a key came from, by its path in the tree."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table of settings: frozen, and a key that it does not know is an error."""


def load(path: Path, settings: type[S]) -> S:
    """Read `path` and the `conf.d/*.toml` beside it into a settings tree. Raises `ConfigError`.

    Files are read in order of their names; a later value replaces an earlier one, tables are merged,
    and arrays of tables (`[[device]]`) are put one after the other.
    """
    origins: Origins = {}
    tree: dict[str, Any] = {}
    fragments = sorted((path.parent / "conf.d").glob("*.toml"))
    for file in (path, *fragments):
        _merge(tree, _read(file), (), file, origins)
    try:
        return msgspec.convert(tree, settings)
    except msgspec.ValidationError as error:
        raise _explain(str(error), settings, path, origins) from None


def problem(path: Path, key: str, message: str, *, hint: str = "") -> ConfigError:
    """An error about one key, for checks that a type cannot express."""
    return ConfigError(f"{path}: {key}: {message}", hint=hint)


def secret(name: str) -> str | None:
    """A secret by name, or None: the file `name` in `$CREDENTIALS_DIRECTORY`, else `$WARDLINK_NAME`.

    Raises `ConfigError` where the credential exists and cannot be read.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and (file := Path(folder) / name).exists():
        try:
            text = file.read_bytes()[: SECRET_BYTES_MAX + 1].decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"credential file {file} cannot be read: {error}") from None
        if len(text) > SECRET_BYTES_MAX:
            raise ConfigError(f"credential file {file} has more than {SECRET_BYTES_MAX} bytes")
        return text.rstrip("\r\n")
    return os.environ.get(environment_name(name))


def required_secret(name: str, needed_for: str) -> str:
    """A secret that must be there. Raises `ConfigError` saying where it is looked for."""
    value = secret(name)
    if value:
        return value
    raise ConfigError(
        f"credential {name!r} is missing, needed for {needed_for}",
        hint=f"LoadCredential={name}:/path in the unit, or the environment variable {environment_name(name)}",
    )


def environment_name(secret_name: str) -> str:
    """The environment variable that can hold a secret: `mqtt-password` is `WARDLINK_MQTT_PASSWORD`."""
    return _ENVIRONMENT_PREFIX + secret_name.upper().replace("-", "_")


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays on this machine."""
    if host in {"localhost", "ip6-localhost"} or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file", hint="--config names the configuration to use") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{file}: {len(raw)} bytes, at most {CONFIG_BYTES_MAX} are read")
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _merge(
    tree: dict[str, Any], addition: Mapping[str, Any], at: tuple[str | int, ...], file: Path, origins: Origins
) -> None:
    for key, value in addition.items():
        here = (*at, key)
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value, here, file, origins)
        elif isinstance(value, dict):
            tree[key] = {}
            origins[here] = file
            _merge(tree[key], value, here, file, origins)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            items = old if isinstance(old, list) else []
            for offset, _item in enumerate(value, start=len(items)):
                origins[(*here, offset)] = file
            tree[key] = [*items, *value]
        else:
            tree[key] = value
            origins[here] = file


_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


def _explain(text: str, settings: type[msgspec.Struct], main: Path, origins: Origins) -> ConfigError:
    match = _WHERE.match(text)
    what, where = (match["what"], match["path"] or "$") if match else (text, "$")
    steps = tuple(name or int(number) for name, number in _STEP.findall(where))
    hint = ""
    if unknown := _UNKNOWN.match(what):
        known = _fields_at(settings, steps)
        steps = (*steps, unknown["name"])
        what = "no such key"
        close = difflib.get_close_matches(unknown["name"], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    file = next((origins[steps[:n]] for n in range(len(steps), 0, -1) if steps[:n] in origins), main)
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    return ConfigError(f"{file}: {key or 'top level'}: {what[:1].lower()}{what[1:]}", hint=hint)


def _fields_at(settings: type[msgspec.Struct], steps: tuple[str | int, ...]) -> list[str]:
    """Names that a table of the settings tree may have."""
    node: msgspec.inspect.Type = msgspec.inspect.type_info(settings)
    for step in steps:
        structs = [part for part in _parts(node) if isinstance(part, msgspec.inspect.StructType)]
        if isinstance(step, int):
            lists = [
                part
                for part in _parts(node)
                if isinstance(part, msgspec.inspect.ListType | msgspec.inspect.VarTupleType)
            ]
            node = lists[0].item_type
        else:
            node = next(field.type for struct in structs for field in struct.fields if field.encode_name == step)
    return [
        field.encode_name
        for part in _parts(node)
        if isinstance(part, msgspec.inspect.StructType)
        for field in part.fields
    ]


def _parts(node: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, ...]:
    return node.types if isinstance(node, msgspec.inspect.UnionType) else (node,)
