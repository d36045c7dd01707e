"""`wardlink gateway add`: one more device in `conf.d`, after the whole configuration was checked with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gateway import settings
from gateway.devices.registry import DRIVERS
from gateway.errors import EXIT_OK, ConfigError
from gateway.links.serial_names import stable_name
from gateway.wire.topics import NAME_PATTERN, NAME_RULE

FIRST_NUMBER = 10
"""Room before it for files that are to be read first."""
LAST_NUMBER = 99
_NUMBERED = re.compile(r"(\d{2})-.*\.toml")


def add(
    config: Path, driver: str, serial: str, place: Mapping[str, str | int], channels: Sequence[str] | None = None
) -> int:
    """Write the device's file and say what is next. Raises `ConfigError`.

    `place`: `port`, `address`, `file`, `stream`, `board_id`: what the driver needs of them.
    """
    _refuse_unfit(settings.load(config), driver, serial)
    if not place:
        raise ConfigError(
            f"where {serial} is was not said", hint="one of --port, --address, --file, --stream, --board-id"
        )
    place = {key: _settled(key, value) for key, value in place.items()}
    text = _table({"driver": driver, "serial": serial, **place}, channels)
    folder = config.parent / "conf.d"
    file = folder / f"{_number(folder):02d}-{serial}.toml"
    # Its name is one that the check reads: what is checked is what the next start will see.
    new = file.with_name(f"{file.stem}.new.toml")
    try:
        with _made(folder):
            _write(new, text)
            try:
                _let_read(new, config)
                _check(config, new, file)
                os.link(new, file)  # unlike a rename it replaces nothing
            finally:
                new.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written: {error.strerror}", hint="it belongs to root: try with sudo"
        ) from error
    print(f"{file}:\n{text}")
    print(f"next: wardlink gateway watch {serial} --config {config}")
    print("      sudo systemctl restart wardlink-gateway")
    print(f"      wardlink cloud device add {serial} … where the registry does not know it yet")
    return EXIT_OK


def _refuse_unfit(chosen: settings.Settings, driver: str, serial: str) -> None:
    if driver not in DRIVERS:
        raise ConfigError(f"no driver {driver!r}", hint=f"known drivers: {', '.join(sorted(DRIVERS))}")
    if not re.fullmatch(NAME_PATTERN, serial):  # it becomes a file's name, too
        raise ConfigError(f"serial {serial!r} is not usable", hint=NAME_RULE)
    for device in chosen.device:
        if device.serial == serial:
            raise ConfigError(
                f"there is a device {serial} already: {device.driver} at {device.port or device.address}",
                hint="change the file that has it; wardlink gateway check-config lists the devices",
            )


def _settled(key: str, value: str | int) -> str | int:
    """As it is to be found from everywhere, and after the next plug."""
    match key, value:
        case "port", str(port):
            return _stable(port)
        case "address", str(address):
            return address.upper()
        case "file", str(file):
            return str(Path(file).absolute())
    return value


def _stable(port: str) -> str:
    return port if port.startswith("/dev/serial/") else stable_name(port) or port


def _table(values: Mapping[str, str | int], channels: Sequence[str] | None) -> str:
    lines = ["[[device]]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    if channels is not None:
        lines.append(f"channels = [{', '.join(map(_value, channels))}]")
    return "\n".join(lines) + "\n"


def _value(value: str | int) -> str:
    """A number or a basic string of TOML, whose escapes are JSON's."""
    return json.dumps(value, ensure_ascii=False)


def _number(folder: Path) -> int:
    """The number after the last one, so that the devices stay in the order in which they were added."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = [file.name for file in folder.iterdir()]
    taken = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))]
    return min(max([FIRST_NUMBER - 1, *taken]) + 1, LAST_NUMBER)


def _check(config: Path, new: Path, file: Path) -> None:
    """Raises `ConfigError` that names the file as it was to be called."""
    try:
        settings.load(config)
    except ConfigError as error:
        message = error.message.replace(str(new), str(file))
        raise ConfigError(f"{message} (nothing was written)", hint=error.hint) from None


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there; if it was not, and what follows fails, it is not there afterwards."""
    made = not folder.is_dir()
    folder.mkdir(exist_ok=True)
    try:
        if made:
            _let_read(folder, folder.parent)
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _let_read(path: Path, model: Path) -> None:
    """Whoever reads the configuration can read this, too: the service's user is not the one who adds a device."""
    of = model.stat()
    with contextlib.suppress(PermissionError):  # not root, and not in that group
        os.chown(path, -1, of.st_gid)
    path.chmod(stat.S_IMODE(of.st_mode))


def _write(file: Path, text: str) -> None:
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
