-- A counter for each device that moves with every change of its bindings, in the same transaction: a bridge that reads
-- it knows whether what it remembers still holds, however late the notification comes. '*' is all devices at once.
-- Whoever changes a binding needs INSERT and UPDATE on it, the bridge, which opens streams, too.

CREATE TABLE binding_versions (
    device_serial text PRIMARY KEY,
    version       bigint NOT NULL DEFAULT 1
);

CREATE OR REPLACE FUNCTION tell_binding_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE
    changed jsonb := to_jsonb(CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END);
    serial  text;
BEGIN
    CASE TG_TABLE_NAME
        WHEN 'devices' THEN
            serial := changed ->> 'serial';
            IF TG_OP = 'UPDATE' AND OLD.serial <> NEW.serial THEN
                PERFORM move_binding_version(OLD.serial);
            END IF;
        WHEN 'device_owners', 'signal_streams' THEN
            SELECT d.serial INTO serial FROM devices d WHERE d.id = (changed ->> 'device_id')::uuid;
        WHEN 'timeseries_binding' THEN
            SELECT d.serial INTO serial FROM signal_streams s JOIN devices d ON d.id = s.device_id
             WHERE s.id = (changed ->> 'stream_id')::uuid;
        WHEN 'timeseries_binding_tag' THEN
            SELECT d.serial INTO serial
              FROM timeseries_binding b JOIN signal_streams s ON s.id = b.stream_id JOIN devices d ON d.id = s.device_id
             WHERE b.id = (changed ->> 'binding_id')::bigint;
        ELSE
            serial := '*';
    END CASE;
    -- A row that went with its parent no longer leads to a device.
    PERFORM move_binding_version(coalesce(serial, '*'));
    RETURN NULL;
END
$$;

CREATE FUNCTION move_binding_version(changed_serial text) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO binding_versions AS v (device_serial) VALUES (changed_serial)
        ON CONFLICT (device_serial) DO UPDATE SET version = v.version + 1;
    PERFORM pg_notify('wardlink_bindings', changed_serial);
END
$$;
