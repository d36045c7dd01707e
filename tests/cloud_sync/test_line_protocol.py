"""One body for the compiled encoder and the plain one, against influxdb-client's `Point` and a real InfluxDB."""

from __future__ import annotations

import base64
import math
import urllib.request
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from influxdb_client import Point, WritePrecision
from numpy.typing import NDArray

from cloud_sync import _line_protocol, line_protocol
from cloud_sync.line_protocol import (
    SERIES_KEY_BYTES_MAX,
    SHORTEST,
    Encode,
    UnwritableError,
    encode_plain,
    escape_key,
    escape_measurement,
    escape_tag_value,
    series_prefix,
)
from wardlink.servers import InfluxDB

compiled: Encode = _line_protocol.encode

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
T0 = 1_700_000_000_000_000_000

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    36.5,
    0.1,
    1e5,
    100000.5,
    123456.0,
    1e-4,
    1e-5,
    1e15,
    1e16,
    2.0**53,
    2.0**60,
    1e22,
    1e23,
    123456789012345680.0,
    5e-324,
    2.2250738585072014e-308,
    -1.2345678901234567e-308,
    1.7976931348623157e308,
    187500.0,
    -22.351744455,
    0.022351744455,
]


@pytest.fixture(params=["plain", "compiled"])
def encode(request: pytest.FixtureRequest) -> Encode:
    return encode_plain if request.param == "plain" else compiled


def times(*ns: int) -> NDArray[np.int64]:
    return np.array(ns, dtype=np.int64)


def floats(*values: float) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def test_the_compiled_one_runs_where_it_is_built() -> None:
    assert line_protocol.IMPLEMENTATION == "compiled"
    assert line_protocol.encode is compiled


def test_the_worked_example_of_the_data_model(encode: Encode) -> None:
    prefix = series_prefix(
        "vital_signs",
        {
            "priority": "high",
            "location": "ICU-5",
            "device_id": "d",
            "org_id": "o",
            "patient_id": "p",
            "signal_type": "vital_signs",
            "stream_id": "s",
        },
    )
    columns = [
        (b"diastolic_bp", floats(80), True),
        (b"heart_rate", floats(72), True),
        (b"spo2", floats(98), True),
        (b"systolic_bp", floats(120), True),
        (b"temperature", floats(36.5), False),
    ]
    expected = (
        b"vital_signs,device_id=d,location=ICU-5,org_id=o,patient_id=p,priority=high,signal_type=vital_signs,stream_id=s"
        b" diastolic_bp=80i,heart_rate=72i,spo2=98i,systolic_bp=120i,temperature=36.5 1700000000000000000\n"
    )
    assert encode(prefix, times(T0), columns) == (expected, 1)


def test_values_that_are_none_are_left_out_and_so_are_empty_lines(encode: Encode) -> None:
    columns = [
        (b"a", floats(math.nan, 1, math.inf, math.nan), False),
        (b"b", floats(2, math.nan, -math.inf, 3), True),
    ]
    assert encode(b"m", times(1, 2, 3, 4), columns) == (b"m b=2i 1\nm a=1 2\nm b=3i 4\n", 3)


def test_nothing_to_write(encode: Encode) -> None:
    assert encode(b"m", times(), [(b"a", floats(), False)]) == (b"", 0)
    assert encode(b"m", times(1), []) == (b"", 0)
    assert encode(b"m", times(1), [(b"a", floats(math.nan), False)]) == (b"", 0)


def test_times_of_any_sign(encode: Encode) -> None:
    instants = (INT64_MIN, -1_500_000_001, -1, 0, 1, 999_999_999, 1_000_000_000, T0 + 1, INT64_MAX)
    lines, count = encode(b"m", times(*instants), [(b"a", np.ones(len(instants)), False)])
    assert lines.decode().splitlines() == [f"m a=1 {instant}" for instant in instants]
    assert count == len(instants)


def test_floats_read_back_the_same_in_the_fewest_characters(encode: Encode) -> None:
    lines, _ = encode(b"m", np.arange(len(SPECIAL)), [(b"a", floats(*SPECIAL), False)])
    texts = [line.split(" ")[1].removeprefix("a=") for line in lines.decode().splitlines()]
    for text, value in zip(texts, SPECIAL, strict=True):
        assert math.copysign(1, float(text)) == math.copysign(1, value)
        assert float(text) == value
        assert len(text) <= len(repr(value).removesuffix(".0"))
    assert texts[:11] == ["0", "-0", "1", "-1", "36.5", "0.1", "1e+05", "100000.5", "123456", "1e-04", "1e-05"]


def test_integer_fields(encode: Encode) -> None:
    held = floats(72, -1, 0.4, 0.5, 1.5, 2.5, -0.0, 2.0**53, -(2.0**63), 2.0**63, 1e300, math.nan)
    lines, count = encode(b"m", np.arange(12), [(b"i", held, True)])
    texts = [line.split(" ")[1].removeprefix("i=") for line in lines.decode().splitlines()]
    assert texts == ["72i", "-1i", "0i", "0i", "2i", "2i", "0i", "9007199254740992i", "-9223372036854775808i"]
    assert count == 9


def test_whole_64_bit_integers(encode: Encode) -> None:
    held = np.array([INT64_MIN, -1, 0, 2**53 + 1, INT64_MAX], dtype=np.int64)
    lines, _ = encode(b"m", np.arange(5), [(b"quality", held, True)])
    assert [line.split(" ")[1] for line in lines.decode().splitlines()] == [f"quality={k}i" for k in held.tolist()]


def test_columns_of_a_wider_array_and_read_only_ones(encode: Encode) -> None:
    block = np.arange(40, dtype=np.float64).reshape(10, 4)
    instants = np.arange(20, dtype=np.int64)[::-2]
    quality = np.arange(30, dtype=np.int64)[::3]
    for array in (block, instants, quality):
        array.flags.writeable = False
    columns = [(b"b", block[:, 2], False), (b"a", block[::-1, 0], False), (b"q", quality, True)]
    plain = [(name, np.array(values), whole) for name, values, whole in columns]
    assert encode(b"m", instants, columns) == encode(b"m", np.array(instants), plain)
    assert encode(b"m", instants, columns)[0].startswith(b"m b=2,a=36,q=0i 19\nm b=6,a=32,q=3i 17\n")


@pytest.mark.parametrize(
    ("prefix", "instants", "columns"),
    [
        (b"", times(1), [(b"a", floats(1), False)]),
        (b"m\nx", times(1), [(b"a", floats(1), False)]),
        (b"m", times(1), [(b"", floats(1), False)]),
        (b"m", times(1), [(b"a\n", floats(1), False)]),
        (b"m", times(1), [(b"a", floats(1, 2), False)]),
        (b"m", times(1, 2), [(b"a", floats(1), False)]),
        (b"m", times(1), [(b"a", np.ones((1, 1)), False)]),
        (b"m", times(1), [(b"a", np.ones(1, dtype=np.int64), False)]),
        (b"m", times(1), [(b"a", np.ones(1, dtype=np.int32), True)]),
        (b"m", times(1), [(b"a", np.ones(1, dtype=np.float16), False)]),
        (b"m", times(1), [(b"a", np.ones(1, dtype=np.uint64), True)]),
        (b"m", np.ones(1, dtype=np.int32), [(b"a", floats(1), False)]),
        (b"m", times(1), [(b"a", np.ones(1, dtype=">f8"), False)]),
        (b"m", floats(1), [(b"a", floats(1), False)]),
        (b"m", np.ones((1, 1), dtype=np.int64), [(b"a", np.ones((1, 1)), False)]),
        (b"m" * 300, np.zeros(1_000_000, dtype=np.int64), [(b"a", np.zeros(1_000_000), False)]),
    ],
)
def test_what_does_not_fit_is_refused(
    encode: Encode,
    prefix: bytes,
    instants: NDArray[np.int64],
    columns: list[tuple[bytes, NDArray[np.float64], bool]],
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        encode(prefix, instants, columns)


@pytest.mark.parametrize("column", [("a", floats(1), False), (b"a", [1.0], False), (b"a", floats(1))])
def test_columns_that_are_none_are_refused(encode: Encode, column: Any) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        encode(b"m", times(1), [column])


@given(st.lists(st.floats(width=64), max_size=30), st.booleans(), st.integers(INT64_MIN, INT64_MAX - 30))
def test_both_give_the_same_bytes(values: list[float], is_integer: bool, start_ns: int) -> None:
    instants = np.arange(len(values), dtype=np.int64) + start_ns
    columns = [(b"a", np.array(values, dtype=np.float64), is_integer)]
    assert compiled(b"m", instants, columns) == encode_plain(b"m", instants, columns)


def test_both_give_the_same_bytes_for_all_magnitudes() -> None:
    rng = np.random.default_rng(1)
    held = np.concatenate(
        [
            rng.integers(INT64_MIN, INT64_MAX, 20_000).view(np.float64),
            10 ** rng.uniform(-25, 25, 10_000),
            np.rint(10 ** rng.uniform(0, 25, 10_000)),
            2.0 ** np.arange(-1074, 1024),
            np.round(rng.uniform(-2e5, 2e5, 10_000), 3),
        ]
    )
    columns = [(b"a", held, False), (b"i", held, True)]
    instants = np.arange(held.shape[0])
    assert compiled(b"m", instants, columns) == encode_plain(b"m", instants, columns)


def test_both_write_the_values_of_converters_alike() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(-(2**23), 2**23, 20_000)
    scales = [4.5e6 / 24 / (2**23 - 1), 4.5e6 / (2**23 - 1), 125 / 256, 1450 / 16383, 0.0000610352]
    near = [np.ldexp(2.0**52 + np.arange(-40, 40), power) for power in range(-66, 3)]
    held = np.concatenate([*(counts * scale for scale in scales), *near, counts / 1000, counts / 10, counts / 4096])
    instants = np.arange(held.shape[0])
    columns = [(b"a", held, False)]
    assert compiled(b"m", instants, columns) == encode_plain(b"m", instants, columns)
    for line, value in zip(compiled(b"m", instants, columns)[0].splitlines(), held.tolist(), strict=True):
        assert float(line.split(b" ")[1][2:]) == value


def test_singles_are_written_with_the_digits_of_singles(encode: Encode) -> None:
    held = np.array([0.1, -22.351744, 3.4028235e38, 1e-45, 0.0, math.nan, 16777216.0, 1e10], dtype=np.float32)
    lines, count = encode(b"m", np.arange(8), [(b"a", held, False)])
    texts = [line.split(" ")[1].removeprefix("a=") for line in lines.decode().splitlines()]
    assert texts == ["0.1", "-22.351744", "3.4028235e+38", "1e-45", "0", "16777216", "1e+10"]
    assert count == 7
    assert encode(b"m", times(1), [(b"a", np.array([2.5], dtype=np.float32), True)])[0] == b"m a=2i 1\n"


def test_both_write_singles_alike() -> None:
    rng = np.random.default_rng(3)
    held = np.concatenate(
        [rng.integers(-(2**31), 2**31, 20_000, dtype=np.int32).view(np.float32), rng.normal(0, 50, 9_000)],
        dtype=np.float32,
    )
    instants = np.arange(held.shape[0])
    columns = [(b"a", held, False), (b"i", held, True)]
    for decimals in (SHORTEST, 3):
        assert compiled(b"m", instants, columns, decimals) == encode_plain(b"m", instants, columns, decimals)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (-22.351744455, 3, "-22.352"),
        (22.351744455, 0, "22"),
        (0.0005, 3, "0.001"),  # above the tie as a float64
        (0.0625, 3, "0.062"),
        (0.1875, 3, "0.188"),
        (2.5, 0, "2"),
        (-0.0004, 3, "0.000"),
        (-0.0, 3, "0.000"),
        (-0.0, 0, "0"),
        (187500.0, 3, "187500.000"),
        (99999.9996, 3, "100000.000"),
        (1e-9, 9, "0.000000001"),
        (2.0**51 / 1000, 3, "2251799813685.248"),
        (2251799813685.0, 3, "2251799813685.000"),
        (1e300, 3, "1e+300"),
    ],
)
def test_fixed_decimals(encode: Encode, value: float, decimals: int, text: str) -> None:
    assert encode(b"m", times(1), [(b"a", floats(value), False)], decimals)[0] == f"m a={text} 1\n".encode()


def test_fixed_decimals_leave_integers_and_what_has_no_value_alone(encode: Encode) -> None:
    columns = [(b"a", floats(math.nan, 1.0005), False), (b"q", np.array([3, 4]), True)]
    assert encode(b"m", times(1, 2), columns, 2)[0] == b"m q=3i 1\nm a=1.00,q=4i 2\n"


@pytest.mark.parametrize("decimals", [-2, 10])
def test_decimals_have_a_limit(encode: Encode, decimals: int) -> None:
    with pytest.raises(ValueError, match="decimals"):
        encode(b"m", times(1), [], decimals)


def test_three_decimals_tell_every_count_of_a_converter(encode: Encode) -> None:
    scale = 4.5e6 / 24 / (2**23 - 1)
    counts = np.random.default_rng(5).integers(-(2**23), 2**23, 5_000)
    lines, _ = encode(b"m", np.arange(5_000), [(b"a", counts * scale, False)], 3)
    read = [float(line.split(b" ")[1][2:]) for line in lines.splitlines()]
    assert (np.rint(np.array(read) / scale) == counts).all()


@given(
    st.lists(
        st.floats(width=64)
        | st.floats(-1e9, 1e9)
        | st.integers(-(10**7), 10**7).map(lambda halves: halves / 2000)
        | st.integers(-(2**40), 2**40).map(lambda parts: parts / 2**20),
        max_size=30,
    ),
    st.integers(0, 9),
)
def test_both_write_fixed_decimals_alike(values: list[float], decimals: int) -> None:
    instants = np.arange(len(values), dtype=np.int64)
    columns = [(b"a", np.array(values, dtype=np.float64), False)]
    assert compiled(b"m", instants, columns, decimals) == encode_plain(b"m", instants, columns, decimals)


NAMES = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12).filter(
    lambda text: not text.endswith("\\") and not text.startswith(("_", "#")) and text != "time"
)


@given(
    NAMES,
    st.dictionaries(NAMES, NAMES, max_size=4),
    NAMES,
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(INT64_MIN, INT64_MAX),
    st.integers(INT64_MIN, INT64_MAX),
)
def test_as_influxdb_client_writes_it(
    measurement: str, tags: dict[str, str], field: str, value: float, whole: int, time_ns: int
) -> None:
    point = Point(measurement).field(field, value).field(f"{field} i", whole).time(time_ns, WritePrecision.NS)
    for key, text in tags.items():
        point.tag(key, text)
    columns = [
        (escape_key(field).encode(), floats(value), False),
        (escape_key(f"{field} i").encode(), np.array([whole]), True),
    ]
    lines, count = line_protocol.encode(series_prefix(measurement, tags), times(time_ns), columns)
    ours, theirs = lines.decode().removesuffix("\n"), point.to_line_protocol()
    # Both write shortest digits, in two spellings (1e+05, 100000): the float is compared by value.
    before, _, after = theirs.partition(f"{escape_key(field)}={str(value).removesuffix('.0')},")
    assert ours.startswith(before)
    assert ours.endswith(after)
    written = ours[len(before) : len(ours) - len(after)].removeprefix(f"{escape_key(field)}=").removesuffix(",")
    assert float(written) == value
    assert count == 1


@pytest.mark.parametrize(
    ("escaped", "expected"),
    [
        (escape_measurement("vital signs,x=y"), r"vital\ signs\,x=y"),
        (escape_key("a b,c=d"), r"a\ b\,c\=d"),
        (escape_tag_value("ICU 5,bed=3"), r"ICU\ 5\,bed\=3"),
        (escape_tag_value('say "hi"'), r'say\ "hi"'),
        (escape_tag_value("C:\\x\\,y"), "C:\\x\\\\,y"),
        (escape_tag_value("_x"), "_x"),
        (escape_tag_value("time"), "time"),
        (escape_measurement("time"), "time"),
        (escape_tag_value("Überwachung 😀"), r"Überwachung\ 😀"),
    ],
)
def test_escapes(escaped: str, expected: str) -> None:
    assert escaped == expected


@pytest.mark.parametrize("escape", [escape_measurement, escape_key, escape_tag_value])
@pytest.mark.parametrize("text", ["", "a\\", "a\nb", "a\r", "a\tb", "\0", "a\x7f", "\ud800"])
def test_what_line_protocol_cannot_carry(escape: type[str], text: str) -> None:
    with pytest.raises(UnwritableError):
        escape(text)


@pytest.mark.parametrize("measurement", ["_internal", "#comment"])
def test_measurements_that_influxdb_keeps_for_itself(measurement: str) -> None:
    with pytest.raises(UnwritableError, match="keeps for itself"):
        escape_measurement(measurement)


@pytest.mark.parametrize("key", ["_field", "time"])
def test_keys_that_influxdb_keeps_for_itself(key: str) -> None:
    with pytest.raises(UnwritableError, match="InfluxDB"):
        escape_key(key)


def test_tags_are_sorted_by_key() -> None:
    assert series_prefix("m", {"b": "1", "a b": "2", "B": "3"}) == rb"m,B=3,a\ b=2,b=1"
    assert series_prefix("m", {}) == b"m"


def test_a_series_key_has_a_limit() -> None:
    longest = SERIES_KEY_BYTES_MAX - len("m,k=")
    assert len(series_prefix("m", {"k": "x" * longest})) == SERIES_KEY_BYTES_MAX
    with pytest.raises(UnwritableError, match="65536 bytes"):
        series_prefix("m", {"k": "x" * (longest + 1)})


def test_influxdb_reads_back_what_was_meant(encode: Encode, influx_server: InfluxDB, influx_database: str) -> None:
    measurement = "vital, signs=x"
    tags = {"a b": "x,y =z", "k=e,y": "back\\slash\\,q", "u": "ü €😀", "q": 'say "hi"', "n": "a\\ b"}
    held = [value for value in SPECIAL if value or math.copysign(1, value) > 0]
    instants = [-5, 0, 1, 999_999_999, T0 + 1, *range(T0 + 2, T0 + 2 + len(held) - 5)]
    bits = np.arange(len(held), dtype=np.int64) + 2**62 + 1
    columns = [(escape_key("fi eld,=1").encode(), floats(*held), False), (b"quality", bits, True)]
    lines, count = encode(series_prefix(measurement, tags), times(*instants), columns)
    login = base64.b64encode(f"{influx_server.user_name}:{influx_server.password}".encode()).decode()
    request = urllib.request.Request(
        f"{influx_server.url}/write?db={influx_database}&precision=ns", lines, {"Authorization": f"Basic {login}"}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 204
    (series,) = influx_server.query('SELECT * FROM "vital, signs=x"', influx_database)
    rows = [dict(zip(series["columns"], row, strict=True)) for row in series["values"]]
    for row in rows:
        row["fi eld,=1"] = float(row["fi eld,=1"])  # whole numbers come back without a point
    assert len(rows) == count == len(held)
    expected = [
        {"time": instant, "fi eld,=1": value, "quality": int(bit), **tags}
        for instant, value, bit in zip(instants, held, bits, strict=True)
    ]
    assert rows == sorted(expected, key=lambda row: int(row["time"]))
