#!/bin/sh
# Builds the compiled modules for aarch64 from the same sources and runs their tests under qemu-user.
#
# usage: tests/aarch64.sh [PYTEST ARGUMENTS]      environment: VENV (default .venv: after `make setup-test`),
#        WORK (default build/aarch64: what is downloaded there is kept for the next run)
# needs: apt-get install qemu-user gcc-aarch64-linux-gnu g++-aarch64-linux-gnu      (Debian 12)
# exit codes: pytest's; 2 something is missing
set -eu
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
WORK=$(mkdir -p "${WORK:-build/aarch64}" && cd "${WORK:-build/aarch64}" && pwd)
ROOT=$WORK/root
TREE=$WORK/tree
HOST=$(pwd)/$VENV/bin/python

# The interpreter of Debian 12 and what it and the wheels link to.
PACKAGES="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libc6 libgcc-s1 libstdc++6
    libgomp1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libncursesw6 libtinfo6 libcrypt1"
# No own modules of these are compiled here: wheels for Python 3.11 as a Pi gets them.
WHEELS="numpy scipy pytest pytest-asyncio pytest-timeout psutil hypothesis edfio msgspec cbor2 zstandard tenacity
    influxdb-client"
TESTS="tests/gateway/signal tests/gateway/devices/test_packets.py tests/gateway/wire/test_packing.py
    tests/cloud_sync/test_line_protocol.py"

stop() { printf 'error: %s\n' "$1" >&2; exit 2; }

for tool in qemu-aarch64 aarch64-linux-gnu-gcc aarch64-linux-gnu-g++ dpkg-deb; do
    command -v $tool >/dev/null || stop "$tool is missing: apt-get install qemu-user gcc-aarch64-linux-gnu g++-aarch64-linux-gnu"
done
[ -x "$HOST" ] || stop "$HOST is missing: make setup-test"

apt_arm64() {
    # A state of its own: the machine's list of architectures and packages stays as it is.
    mkdir -p "$WORK/apt/lists/partial" "$WORK/apt/cache/archives/partial"
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$WORK/apt" \
        -o Dir::State::status=/dev/null -o Dir::Cache="$WORK/apt/cache" -o APT::Sandbox::User=root "$@"
}

if [ "$(cat "$ROOT/complete" 2>/dev/null)" != "$PACKAGES $WHEELS" ]; then
    printf '==> Debian packages for arm64\n'
    rm -rf "$ROOT" && mkdir -p "$ROOT" "$WORK/debs"
    apt_arm64 update >"$WORK/apt.log" 2>&1 || stop "apt-get update failed for arm64, see $WORK/apt.log"
    # shellcheck disable=SC2086
    (cd "$WORK/debs" && apt_arm64 download $PACKAGES >>"$WORK/apt.log" 2>&1) || stop "see $WORK/apt.log"
    for package in "$WORK"/debs/*.deb; do
        dpkg-deb -x "$package" "$ROOT"
    done
    printf '==> Wheels for aarch64\n'
    # shellcheck disable=SC2086
    "$HOST" -m pip install -q --disable-pip-version-check --no-compile --target "$ROOT/wheels" --only-binary :all: \
        --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_aarch64 \
        --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        $WHEELS || stop "pip could not find the wheels"
    printf '%s\n' "$PACKAGES $WHEELS" >"$ROOT/complete"
fi

printf '==> Compiling\n'
rm -rf "$TREE" && mkdir -p "$TREE/c"
cp -r gateway cloud_sync wardlink ext tests pyproject.toml "$TREE"
[ ! -d ../shared ] || ln -sfn "$(cd ../shared && pwd)" "$WORK/shared"
find "$TREE" -name '*.so' -delete
cd "$TREE"
# name, source, language, flags: as pyproject.toml has them.
"$HOST" -c '
import tomllib
for module in tomllib.load(open("pyproject.toml", "rb"))["tool"]["setuptools"]["ext-modules"]:
    print(module["name"], module["sources"][0], module.get("language", "c"), *module.get("extra-compile-args", []))
' | while read -r name source language flags; do
    if [ "$language" = c++ ]; then compiler=aarch64-linux-gnu-g++ translate=--cplus; else compiler=aarch64-linux-gnu-gcc translate=; fi
    # shellcheck disable=SC2086
    "$HOST" -m cython -3 $translate --module-name "$name" "$source" -o "c/$name.$language"
    # shellcheck disable=SC2086
    $compiler -shared -fPIC -DNDEBUG -fwrapv -O3 $flags -Iext -I"$ROOT/usr/include/python3.11" -I"$ROOT/usr/include" \
        "c/$name.$language" -o "$(printf '%s' "$name" | tr . /).cpython-311-aarch64-linux-gnu.so"
    printf '    %s\n' "$name"
done

printf '==> Tests under qemu-aarch64\n'
# The twins are numpy, which needs no proof here; they still are the oracle. With them a million steps take a day, and
# there is no InfluxDB. Hypothesis must not take slowness for a fault.
[ $# -gt 0 ] || set -- -q --durations=5 --hypothesis-profile=ci -k "not plain and not influxdb_reads_back" \
    --deselect tests/gateway/signal/test_million_steps.py $TESTS
# What these files share is for servers and event loops, of which these tests have none.
rm -f tests/conftest.py tests/cloud_sync/conftest.py
PYTHONHOME=$ROOT/usr PYTHONPATH=$TREE:$ROOT/wheels PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 \
    exec qemu-aarch64 -L "$ROOT" "$ROOT/usr/bin/python3.11" -m pytest -o timeout=1800 -p no:cacheprovider "$@"
