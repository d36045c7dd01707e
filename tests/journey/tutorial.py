"""What most tutorials build, written as they do and as well as they do: the peer beside which wardlink is killed.

Publisher: a table of rows in SQLite; each is published with QoS 1 and deleted when the broker has acknowledged it; what
is still there at a start is published again. Subscriber: a persistent session; `on_message` writes the point and says
what goes wrong; paho acknowledges by itself when `on_message` returns. Every row has a time of its own, so writing one
twice does no harm.

usage: python tutorial.py publish|subscribe CONFIG.json
"""

from __future__ import annotations

import base64
import json
import signal
import sqlite3
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

ROWS_PER_S = 50
BEGIN_NS = 1_714_564_800_000_000_000
WRITE_TIMEOUT_S = 5.0
MEASUREMENT = "tutorial"

Config = dict[str, Any]


def publish(config: Config) -> None:
    """Make rows until told to end; then wait until all that are stored have been acknowledged."""
    rows = sqlite3.connect(config["queue"], check_same_thread=False, isolation_level=None)
    rows.execute("PRAGMA journal_mode = WAL")
    rows.execute("PRAGMA synchronous = NORMAL")  # nobody cuts the power here
    rows.execute("CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY AUTOINCREMENT, payload TEXT)")
    guard, ending = threading.RLock(), threading.Event()
    waiting: dict[int, int] = {}
    signal.signal(signal.SIGTERM, lambda *_: ending.set())

    def on_publish(_client: mqtt.Client, _data: object, mid: int, *_: object) -> None:
        with guard:
            rows.execute("DELETE FROM queue WHERE id = ?", (waiting.pop(mid, -1),))

    client = session(config, "tutorial-publisher")
    client.on_publish = on_publish

    def send(number: int, payload: str) -> None:
        with guard:
            waiting[client.publish(config["topic"], payload, qos=1).mid] = number

    client.connect_async(config["broker"], config["broker_port"])
    client.loop_start()
    for number, payload in rows.execute("SELECT id, payload FROM queue ORDER BY id").fetchall():
        send(number, payload)
    while not ending.wait(1 / ROWS_PER_S):
        with guard:
            number = rows.execute("INSERT INTO queue (payload) VALUES ('')").lastrowid
            payload = json.dumps({"id": number, "value": time.time()})
            rows.execute("UPDATE queue SET payload = ? WHERE id = ?", (payload, number))
            send(number, payload)
    while rows.execute("SELECT count(*) FROM queue").fetchone()[0]:
        time.sleep(0.05)


def subscribe(config: Config) -> None:
    """Write every row as a point, for ever."""
    token = base64.b64encode(f"{config['influx_user']}:{config['influx_password']}".encode()).decode()
    url = f"{config['influx']}/write?db={config['influx_database']}&precision=ns"

    def write(row: dict[str, Any]) -> None:
        line = f"{MEASUREMENT} value={row['value']} {BEGIN_NS + row['id']}"
        request = urllib.request.Request(url, line.encode(), {"Authorization": f"Basic {token}"})
        with urllib.request.urlopen(request, timeout=WRITE_TIMEOUT_S):
            pass

    def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        try:
            write(json.loads(message.payload))
        except (OSError, ValueError) as error:
            print(f"could not write: {error}")

    client = session(config, "tutorial-subscriber")
    client.on_connect = lambda *_: client.subscribe(config["topic"], qos=1)
    client.on_message = on_message
    client.connect_async(config["broker"], config["broker_port"])
    client.loop_forever(retry_first_connection=True)


def session(config: Config, name: str) -> mqtt.Client:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, name, clean_session=False)
    client.username_pw_set(config[f"{name}_user"], config[f"{name}_password"])
    client.reconnect_delay_set(1, 2)
    return client


if __name__ == "__main__":
    {"publish": publish, "subscribe": subscribe}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
