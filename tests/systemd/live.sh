#!/bin/bash
# Both services under a live systemd: a Debian in a folder is booted, wardlink is installed in it as README.md says,
# and then started, hung, killed and stopped. What the units promise (readiness, watchdog, restart, a clean stop, the
# exposure limit) is checked on the running system.
#
# usage: tests/systemd/live.sh [FOLDER]      as root; FOLDER (default build/systemd, 2 GB) is kept for the next run
# needs: apt-get install debootstrap systemd-container
# exit codes: 0 all held; 1 something did not; 2 something is missing
set -euo pipefail
cd "$(dirname "$0")/../.."

WORK=$(mkdir -p "${1:-build/systemd}" && cd "${1:-build/systemd}" && pwd)
ROOT=$WORK/root
SUITE=bookworm
SERVERS="mosquitto influxdb postgresql"
COMPILERS="gcc g++ libc6-dev pkg-config libsystemd-dev python3-dev python3-venv"
EXPOSURE_MAX=2.0    # systemd-analyze security calls up to 2 "safe"
WATCHDOG_S=30       # WatchdogSec of both units
CONTAINER=""

stop() { printf 'error: %s\n' "$1" >&2; exit "${2:-2}"; }
say() { printf '==> %s\n' "$*"; }
in_root() { systemd-nspawn -q --register=no --keep-unit -D "$ROOT" --setenv=DEBIAN_FRONTEND=noninteractive --pipe "$@"; }
live() { nsenter -t "$LEADER" -a "$@"; }
property() { live systemctl show --value -p "$2" "$1"; }

finish() {
    [ -n "$CONTAINER" ] || return 0
    live systemctl poweroff >/dev/null 2>&1 || kill "$CONTAINER" 2>/dev/null || true
    wait "$CONTAINER" 2>/dev/null || true
}
trap finish EXIT

eventually() {
    # eventually SECONDS WHAT COMMAND…: until the command succeeds.
    local tries=$(($1 * 5)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        if [ $tries = 0 ]; then
            live journalctl --no-pager -n 30 -u wardlink-gateway -u wardlink-cloud >&2 || true
            stop "$what did not happen" 1
        fi
        sleep 0.2
    done
    say "$what"
}

[ "$(id -u)" = 0 ] || stop "this needs root"
for tool in debootstrap systemd-nspawn nsenter; do
    command -v $tool >/dev/null || stop "$tool is missing: apt-get install debootstrap systemd-container"
done

if [ ! -e "$ROOT/complete" ]; then
    say "A Debian $SUITE in $ROOT (minutes)"
    rm -rf "$ROOT"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,udev,ca-certificates "$SUITE" "$ROOT" \
        >"$WORK/debootstrap.log" 2>&1 || stop "debootstrap failed, see $WORK/debootstrap.log"
    # How this machine reaches its packages is how the other one does.
    for file in /etc/pip.conf /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/apt/apt.conf.d/*registry*; do
        [ ! -e "$file" ] || install -D -m 644 "$file" "$ROOT$file"
    done
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d"
    chmod 755 "$ROOT/usr/sbin/policy-rc.d"
    # shellcheck disable=SC2086
    in_root sh -c "apt-get update -q && apt-get install -q -y --no-install-recommends $SERVERS $COMPILERS" \
        >"$WORK/apt.log" 2>&1 || stop "apt-get failed, see $WORK/apt.log"
    rm "$ROOT/usr/sbin/policy-rc.d"
    printf 'listener 1883 127.0.0.1\nallow_anonymous true\n' >"$ROOT/etc/mosquitto/conf.d/local.conf"
    touch "$ROOT/complete"
fi

say "Installing wardlink as README.md says"
rm -rf "$ROOT/root/wardlink" "$ROOT/opt/wardlink" "$ROOT/etc/wardlink" "$ROOT"/var/lib/wardlink-*
mkdir -p "$ROOT/root/wardlink" "$ROOT/etc/wardlink/credentials"
git ls-files -z | xargs -0 cp --parents -t "$ROOT/root/wardlink"
in_root sh -c 'python3 -m venv /opt/wardlink && /opt/wardlink/bin/pip install -q "/root/wardlink[gateway,cloud,systemd]"' \
    >"$WORK/pip.log" 2>&1 || stop "pip failed, see $WORK/pip.log"
install -m 644 systemd/wardlink-gateway.service systemd/wardlink-cloud.service "$ROOT/etc/systemd/system/"
install -D -m 644 systemd/wardlink.sysusers.conf "$ROOT/usr/lib/sysusers.d/wardlink.conf"

# A receiver of positions, from a recording: any device would do, the services are what is looked at.
python3 - "$ROOT/etc/wardlink/walk.nmea" <<'PY'
import sys
with open(sys.argv[1], "w", newline="") as log:
    for second in range(60):
        body = f"GPRMC,0926{second:02d}.000,A,5327.{second:05d},N,00214.42462,W,0.046,,060321,,,A"
        checksum = 0
        for character in body:
            checksum ^= ord(character)
        log.write(f"${body}*{checksum:02X}\r\n")
PY
cat >"$ROOT/etc/wardlink/gateway.toml" <<'TOML'
[gateway]
id = "gateway-1"
[mqtt]
host = "localhost"
port = 1883
tls = false
[[device]]
driver = "replay"
serial = "GPS-1"
file = "/etc/wardlink/walk.nmea"
repeat = true
TOML
cat >"$ROOT/etc/wardlink/cloud.toml" <<'TOML'
[mqtt]
host = "localhost"
port = 1883
tls = false
[influx]
dialect = "v1"
url = "http://localhost:8086"
[postgres]
sslmode = "prefer"
TOML
PASSWORD=$(head -c 12 /dev/urandom | od -An -tx1 | tr -d ' \n')
install -m 600 /dev/stdin "$ROOT/etc/wardlink/credentials/postgres-password" <<<"$PASSWORD"
install -D -m 644 /dev/stdin "$ROOT/etc/systemd/system/wardlink-cloud.service.d/credentials.conf" <<'UNIT'
[Service]
LoadCredential=postgres-password:/etc/wardlink/credentials/postgres-password
UNIT

say "Booting"
systemd-nspawn -q --register=no --keep-unit -b -D "$ROOT" </dev/null >"$WORK/console.log" 2>&1 &
CONTAINER=$!
LEADER=""
for _ in $(seq 100); do
    LEADER=$(pgrep -P $CONTAINER | head -n 1) && [ -n "$LEADER" ] && break
    sleep 0.1
done
[ -n "$LEADER" ] || stop "nothing booted, see $WORK/console.log" 1
eventually 60 "the system runs" live systemctl is-active multi-user.target influxdb mosquitto
sql() { live runuser -u postgres -- psql -qtA -v ON_ERROR_STOP=1 "$@"; }
eventually 60 "PostgreSQL answers" sql -c "SELECT 1"
sql -c "SET client_min_messages = error" -c "DROP DATABASE IF EXISTS wardlink" -c "DROP ROLE IF EXISTS wardlink" \
    -c "CREATE ROLE wardlink LOGIN PASSWORD '$PASSWORD'" -c "CREATE DATABASE wardlink OWNER wardlink"
cloud() { live env WARDLINK_POSTGRES_PASSWORD="$PASSWORD" /opt/wardlink/bin/wardlink cloud "$@" >/dev/null; }
points() { sql wardlink -c "SELECT coalesce(sum(point_count), 0) FROM signal_streams"; }
more_points() { [ "$(points)" -gt "$before" ]; }
runs_again() { [ "$(property "$1" NRestarts)" -gt 0 ] && [ "$(property "$1" ActiveState)" = active ]; }

cloud migrate
cloud org add ward-1
cloud device add GPS-1 --org ward-1 --type gps --patient P-1 --create
live systemctl daemon-reload
live systemctl start wardlink-cloud wardlink-gateway     # returns when both have said READY
before=0
eventually 30 "both services run, and samples are stored" more_points

live systemctl kill -s KILL wardlink-cloud
eventually 30 "the bridge was killed and runs again" runs_again wardlink-cloud
live systemctl kill -s STOP wardlink-gateway
eventually $((2 * WATCHDOG_S)) "the gateway hung, its watchdog ended it, and it runs again" runs_again wardlink-gateway
before=$(points)
eventually 60 "samples are stored again" more_points

live systemctl stop wardlink-gateway wardlink-cloud
for unit in wardlink-gateway wardlink-cloud; do
    [ "$(property $unit Result)" = success ] || stop "$unit did not stop cleanly: $(property $unit Result)" 1
    exposure=$(live systemd-analyze security --no-pager $unit | sed -n 's/.*Overall exposure level.*: \([0-9.]*\).*/\1/p')
    awk "BEGIN { exit !($exposure <= $EXPOSURE_MAX) }" || stop "$unit has an exposure of $exposure" 1
    say "$unit stopped cleanly; exposure $exposure"
done
say "All held"
