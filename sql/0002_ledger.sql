-- What has been committed, what was lost, what waits and what was refused. Written by the bridge.

-- One row for each outbox that ever sent a device's signal: `epoch` is born with the gateway's spool file.
CREATE TABLE ledger (
    device_serial text NOT NULL,
    signal        text NOT NULL,
    epoch         text NOT NULL,
    committed     int8multirange NOT NULL DEFAULT '{}',
    gateway_id    text NOT NULL,
    updated_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (device_serial, signal, epoch),
    CHECK (isempty(committed) OR lower(committed) >= 0)
) WITH (fillfactor = 80);

CREATE TABLE stream_gaps (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream_id     uuid REFERENCES signal_streams (id) ON DELETE SET NULL,
    device_id     uuid REFERENCES devices (id) ON DELETE SET NULL,
    device_serial text NOT NULL,
    signal        text NOT NULL,
    gateway_id    text NOT NULL,
    cause         text NOT NULL CHECK (cause IN ('radio', 'shed', 'corrupt', 'clock', 'transport')),
    first_at      timestamptz NOT NULL,
    last_at       timestamptz NOT NULL,
    sample_count  bigint NOT NULL CHECK (sample_count > 0),
    sequences     int8range,
    opened_at     timestamptz NOT NULL DEFAULT now(),
    closed_at     timestamptz CHECK (closed_at >= opened_at),
    CHECK (last_at >= first_at)
);
CREATE INDEX stream_gaps_stream ON stream_gaps (stream_id, first_at);
CREATE INDEX stream_gaps_unlinked ON stream_gaps (device_serial, signal, first_at) WHERE stream_id IS NULL;
CREATE INDEX stream_gaps_open ON stream_gaps (opened_at) WHERE closed_at IS NULL;
CREATE INDEX stream_gaps_opened ON stream_gaps USING brin (opened_at);
COMMENT ON COLUMN stream_gaps.closed_at IS 'Null: the samples may still come (transport). A final loss is recorded closed.';
COMMENT ON COLUMN stream_gaps.device_serial IS 'As the gateway knows it: a loss of a device that is not registered is kept too.';

CREATE TABLE parked_messages (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_serial text NOT NULL,
    signal        text NOT NULL,
    epoch         text NOT NULL,
    sequence      bigint NOT NULL CHECK (sequence >= 0),
    gateway_id    text NOT NULL,
    topic         text NOT NULL,
    content_type  text NOT NULL,
    properties    jsonb NOT NULL DEFAULT '{}',
    payload       bytea NOT NULL,
    first_at      timestamptz NOT NULL,
    last_at       timestamptz NOT NULL,
    sample_count  bigint NOT NULL CHECK (sample_count > 0),
    reason        text NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (device_serial, signal, epoch, sequence),
    CHECK (last_at >= first_at)
);
CREATE INDEX parked_messages_order ON parked_messages (device_serial, first_at, id);
CREATE INDEX parked_messages_received ON parked_messages USING brin (received_at);
COMMENT ON TABLE parked_messages IS
    'Data that waits for its device to be bound. A row is the token of exactly one later count: it is deleted when counted. '
    'Only samples whose time, rounded down to the microsecond, is within first_at..last_at still wait.';

CREATE TABLE dead_letters (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    gateway_id    text NOT NULL DEFAULT '',
    topic         text NOT NULL,
    content_type  text NOT NULL DEFAULT '',
    properties    jsonb NOT NULL DEFAULT '{}',
    payload       bytea NOT NULL,
    reason        text NOT NULL,
    detail        text NOT NULL DEFAULT '',
    received_at   timestamptz NOT NULL DEFAULT now(),
    redriven_at   timestamptz,
    digest        bytea NOT NULL CHECK (length(digest) = 32),
    repeats       bigint NOT NULL DEFAULT 0 CHECK (repeats >= 0)
);
-- A sender that repeats one bad message for ever fills one row, not the disk.
CREATE UNIQUE INDEX dead_letters_waiting ON dead_letters (digest) WHERE redriven_at IS NULL;
CREATE INDEX dead_letters_gateway ON dead_letters (gateway_id) WHERE redriven_at IS NULL;
CREATE INDEX dead_letters_received ON dead_letters USING brin (received_at);
COMMENT ON COLUMN dead_letters.digest IS 'SHA-256 of topic, a zero byte and payload.';
COMMENT ON COLUMN dead_letters.repeats IS 'How often the same message came again while this row waited.';

CREATE TABLE alerts (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind      text NOT NULL,
    subject   text NOT NULL,
    detail    text NOT NULL DEFAULT '',
    opened_at timestamptz NOT NULL DEFAULT now(),
    closed_at timestamptz CHECK (closed_at >= opened_at)
);
CREATE UNIQUE INDEX alerts_open ON alerts (kind, subject) WHERE closed_at IS NULL;
CREATE INDEX alerts_opened ON alerts USING brin (opened_at);

CREATE TABLE audit (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    who    text NOT NULL DEFAULT current_user,
    what   text NOT NULL,
    "when" timestamptz NOT NULL DEFAULT now(),
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_when ON audit USING brin ("when");
