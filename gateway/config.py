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


_origins: dict[Path, Origins] = {}
"""Of every configuration read so far, by its main file: `problem` names the file that a key came from."""


def load(path: Path, settings: type[S], *, fragments: bool = True) -> S:
    """Read `path` and, if `fragments`, the `conf.d/*.toml` beside it into a settings tree. Raises `ConfigError`.

    Files are read in order of their names; a later value replaces an earlier one, tables are merged,
    and arrays of tables (`[[device]]`) are put one after the other.
    """
    origins: Origins = {}
    tree: dict[str, Any] = {}
    for file in (path, *(_fragments(path.parent / "conf.d") if fragments else ())):
        _merge(tree, _read(file), (), file, origins)
    _origins[path] = origins
    try:
        return msgspec.convert(tree, settings)
    except msgspec.ValidationError as error:
        raise _explain(str(error), settings, path, origins) from None


def problem(path: Path, key: str, message: str, *, hint: str = "") -> ConfigError:
    """An error about one key (`mqtt.tls`, `device[0].port`), for checks that a type cannot express.

    `path` is the main file; the error names the one that has the key.
    """
    file = _file_of(_steps(f".{key}"), path, _origins.get(path, {}))
    return ConfigError(f"{file}: {key}: {message}", hint=hint)


def secret(name: str) -> str | None:
    """A secret by name, or None: the file `name` in `$CREDENTIALS_DIRECTORY`, else `$WARDLINK_NAME`.

    Raises `ConfigError` where the credential exists and cannot be used.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    value = _credential(Path(folder) / name) if folder else None
    return value if value is not None else os.environ.get(environment_name(name))


def required_secret(name: str, needed_for: str) -> str:
    """A secret that must be there. Raises `ConfigError` saying where it is looked for."""
    value = secret(name)
    if value:
        return value
    raise ConfigError(
        f"credential {name!r} is {'missing' if value is None else 'empty'}, needed for {needed_for}",
        hint=f"LoadCredential={name}:/path in the unit, or the environment variable {environment_name(name)}",
    )


def environment_name(secret_name: str) -> str:
    """The environment variable that can hold a secret: `mqtt-password` is `WARDLINK_MQTT_PASSWORD`."""
    return _ENVIRONMENT_PREFIX + secret_name.upper().replace("-", "_")


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays on this machine."""
    if host.lower() in {"localhost", "ip6-localhost"} or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _credential(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            raw = opened.read(SECRET_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"credential file {file} cannot be read: {error.strerror}", hint="check its owner and mode"
        ) from None
    if len(raw) > SECRET_BYTES_MAX:
        raise ConfigError(f"credential file {file} has more than {SECRET_BYTES_MAX} bytes", hint="is it the right one?")
    try:
        text = raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:  # what it says would repeat a part of the secret
        text = "\0"
    if "\0" in text:
        raise ConfigError(f"credential file {file} is not text in UTF-8", hint="write the bare secret into it")
    return text


def _fragments(folder: Path) -> list[Path]:
    """The `*.toml` of a folder in order; none where it is missing. Not by glob, which hides an unreadable folder."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix == ".toml" and not file.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be read: {error.strerror}", hint="the service's user needs to list it"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            raw = opened.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file", hint="--config names the configuration to use") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}", hint="check its owner and mode") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{file}: more than {CONFIG_BYTES_MAX} bytes are not read", hint="is it the right file?")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: line {line}: not UTF-8", hint="save the file in the encoding UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{file}: not valid TOML: {error}", hint='a line is: key = 1, key = "text" or [table]'
        ) from None


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


_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_CHOICE = re.compile(r"^Invalid enum value (?P<value>.*)$", re.DOTALL)
_PATTERN = re.compile(r"^Expected `str` matching regex ")
_GOT = re.compile(r"^Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`$")
_SECRET = re.compile(r"password|passwd|secret|token", re.IGNORECASE)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_ANY = "*"
"""A step to some value of a table with free keys: msgspec does not say which."""

_TOML_FORMS = {
    "str": 'text stands in quotes: "…"',
    "int": "a whole number stands without quotes and point",
    "float": "a number stands without quotes",
    "bool": "true or false, without quotes",
    "array": "a list stands in brackets: […]; tables of a list are headed [[name]]",
    "object": "a table is headed [name], or stands in braces: {key = 1}",
}


def _explain(text: str, settings: type[msgspec.Struct], main: Path, origins: Origins) -> ConfigError:
    match = _WHERE.match(text)
    what, where = (match["what"], match["path"] or "$") if match else (text, "$")
    steps = _steps(where)
    nodes = _nodes_at(settings, steps)
    hint = ""
    if unknown := _UNKNOWN.match(what):
        known = [field.encode_name for struct in _structs(nodes) for field in struct.fields]
        steps = (*steps, unknown["name"])
        what = "no such key"
        close = difflib.get_close_matches(unknown["name"], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        if _SECRET.search(unknown["name"]):
            hint = "secrets never stand in a TOML file: they are systemd credentials or environment variables"
    elif missing := _MISSING.match(what):
        steps = (*steps, missing["name"])
        what = f"missing, expected {_described(_nodes_at(settings, steps))}"
        hint = f"add it to {_file_of(steps[:-1], main, origins)}"
    elif choice := _CHOICE.match(what):
        what = f"{choice['value']} is not one of the possible values"
        hint = f"one of {_described(nodes)}"
    elif _PATTERN.match(what):
        hint = _described(nodes)
    elif got := _GOT.match(what):
        hint = "; ".join(form for name, form in _TOML_FORMS.items() if name in re.split(r"\W+", got["expected"]))
    elif not what.startswith("Expected"):
        hint = f"expected {_described(nodes)}"
    file = _file_of(steps, main, origins)
    shown = f"{what[:1].lower()}{what[1:]}"
    return ConfigError(f"{file}: {_key(steps) or 'top level'}: {shown}", hint=hint or f"expected {_described(nodes)}")


def _steps(path: str) -> tuple[str | int, ...]:
    return tuple(name or (_ANY if number == "..." else int(number)) for name, number in _STEP.findall(path))


def _key(steps: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _file_of(steps: tuple[str | int, ...], main: Path, origins: Origins) -> Path:
    return next((origins[steps[:n]] for n in range(len(steps), 0, -1) if steps[:n] in origins), main)


Nodes = list[msgspec.inspect.Type]
"""The types that a value may have: more than one for a union."""


def _nodes_at(settings: type[msgspec.Struct], steps: tuple[str | int, ...]) -> Nodes:
    nodes: Nodes = [msgspec.inspect.type_info(settings)]
    for step in steps:
        nodes = [part for node in nodes for part in _inside(node, step)]
    return [part for node in nodes for part in _parts(node)]


def _inside(node: msgspec.inspect.Type, step: str | int) -> Nodes:
    found: Nodes = []
    for part in _parts(node):
        bare = _bare(part)
        match bare:
            case msgspec.inspect.StructType():
                found += [field.type for field in bare.fields if field.encode_name == step]
            case msgspec.inspect.DictType():
                found.append(bare.value_type)
            case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
                found.append(bare.item_type)
            case msgspec.inspect.TupleType() if isinstance(step, int):
                found += bare.item_types[step : step + 1]
            case _:
                continue
    return found


def _parts(node: msgspec.inspect.Type) -> Nodes:
    bare = _bare(node)
    return (
        [part for inner in bare.types for part in _parts(inner)]
        if isinstance(bare, msgspec.inspect.UnionType)
        else [node]
    )


def _bare(node: msgspec.inspect.Type) -> msgspec.inspect.Type:
    return _bare(node.type) if isinstance(node, msgspec.inspect.Metadata) else node


def _structs(nodes: Nodes) -> list[msgspec.inspect.StructType]:
    return [bare for bare in map(_bare, nodes) if isinstance(bare, msgspec.inspect.StructType)]


def _described(nodes: Nodes) -> str:
    """What may stand there, in words an operator knows."""
    return " or ".join(dict.fromkeys(_word(node) for node in nodes)) or "something else"


def _word(node: msgspec.inspect.Type) -> str:
    match node:
        case msgspec.inspect.Metadata(type=inner, extra_json_schema=extra):
            description = (extra or {}).get("description")
            return str(description) if description else _word(inner)
        case msgspec.inspect.LiteralType(values=values):
            return ", ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return f"text that matches {pattern}"
        case msgspec.inspect.StrType():
            return "text"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            bounds = ((">", node.gt), (">=", node.ge), ("<", node.lt), ("<=", node.le))
            return " ".join(["a number", *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)])
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType() | msgspec.inspect.TupleType():
            return "a list"
        case msgspec.inspect.NoneType():
            return "nothing"
        case _:
            return "a table"
