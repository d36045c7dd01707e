-- Rules that no client can forget: the history of owners, tenants kept apart, the bridge told of every change.

-- Who wore the device. The time of the change is the transaction's, or that of the setting `wardlink.owner_since`
-- of this transaction. The first owner of all is valid from -infinity: nobody else wore the device before.
CREATE FUNCTION keep_device_owners() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE
    told  timestamptz := nullif(current_setting('wardlink.owner_since', true), '')::timestamptz;
    since timestamptz := coalesce(told, now());
    cut   timestamptz := since;
    taken timestamptz;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.owner_patient_id IS NOT DISTINCT FROM OLD.owner_patient_id THEN
        RETURN NULL;
    END IF;
    IF told IS NULL AND NOT EXISTS (SELECT FROM device_owners WHERE device_id = NEW.id) THEN
        since := '-infinity';
    END IF;

    -- Two changes at one instant: the earlier one never was.
    DELETE FROM device_owners WHERE device_id = NEW.id AND valid_to IS NULL AND valid_from = since;
    SELECT max(coalesce(valid_to, valid_from)) INTO taken FROM device_owners
     WHERE device_id = NEW.id AND coalesce(valid_to, valid_from) > since;
    IF taken IS NOT NULL THEN
        RAISE EXCEPTION 'the owner of device % last changed at %, which is later than %', NEW.serial, taken, since
            USING ERRCODE = 'check_violation', HINT = 'give a time after the last change';
    END IF;
    UPDATE device_owners SET valid_to = since WHERE device_id = NEW.id AND valid_to IS NULL;
    IF NEW.owner_patient_id IS NOT NULL THEN
        INSERT INTO device_owners (device_id, patient_id, valid_from) VALUES (NEW.id, NEW.owner_patient_id, since);
    END IF;

    -- No stream of another patient reaches into the new owner's time.
    UPDATE signal_streams SET ended_at = greatest(started_at, cut)
     WHERE device_id = NEW.id AND patient_id IS DISTINCT FROM NEW.owner_patient_id
       AND (ended_at IS NULL OR ended_at > cut);
    RETURN NULL;
END
$$;
CREATE TRIGGER devices_keep_owners AFTER INSERT OR UPDATE OF owner_patient_id ON devices
    FOR EACH ROW EXECUTE FUNCTION keep_device_owners();

CREATE FUNCTION keep_device_organization() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF NEW.org_id <> OLD.org_id AND (EXISTS (SELECT FROM device_owners WHERE device_id = NEW.id)
                                     OR EXISTS (SELECT FROM signal_streams WHERE device_id = NEW.id)) THEN
        RAISE EXCEPTION 'device % was worn in its organisation and stays there', NEW.serial
            USING ERRCODE = 'check_violation', HINT = 'register the device anew under another serial';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER devices_keep_organization BEFORE UPDATE OF org_id ON devices
    FOR EACH ROW EXECUTE FUNCTION keep_device_organization();

CREATE FUNCTION keep_stream_in_organization() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM patients p JOIN devices d ON d.org_id = p.org_id
                    WHERE p.id = NEW.patient_id AND d.id = NEW.device_id) THEN
        RAISE EXCEPTION 'a stream joins a device and a patient of one organisation'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER signal_streams_in_organization BEFORE INSERT OR UPDATE OF patient_id, device_id ON signal_streams
    FOR EACH ROW EXECUTE FUNCTION keep_stream_in_organization();

CREATE FUNCTION keep_counted_stream() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION 'stream % has % points in the time-series store', OLD.id, OLD.point_count
        USING ERRCODE = 'restrict_violation', HINT = 'close it instead';
END
$$;
CREATE TRIGGER signal_streams_keep_counted BEFORE DELETE ON signal_streams
    FOR EACH ROW WHEN (OLD.point_count > 0) EXECUTE FUNCTION keep_counted_stream();

-- Losses that came before the device was registered or its stream was opened find their place afterwards.
CREATE FUNCTION link_gaps_to_device() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    UPDATE stream_gaps SET device_id = NEW.id
     WHERE device_serial = NEW.serial AND stream_id IS NULL AND device_id IS NULL;
    RETURN NULL;
END
$$;
CREATE TRIGGER devices_link_gaps AFTER INSERT ON devices
    FOR EACH ROW EXECUTE FUNCTION link_gaps_to_device();

CREATE FUNCTION link_gaps_to_stream() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    UPDATE stream_gaps g SET stream_id = NEW.id
      FROM devices d, signal_types t
     WHERE d.id = NEW.device_id AND t.id = NEW.signal_type_id
       AND g.device_serial = d.serial AND g.signal = t.code AND g.stream_id IS NULL
       AND g.first_at >= NEW.started_at AND (NEW.ended_at IS NULL OR g.first_at < NEW.ended_at);
    RETURN NULL;
END
$$;
CREATE TRIGGER signal_streams_link_gaps AFTER INSERT OR UPDATE OF started_at ON signal_streams
    FOR EACH ROW EXECUTE FUNCTION link_gaps_to_stream();

CREATE FUNCTION refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION 'the audit record is only ever added to' USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER audit_only_grows BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- The bridge keeps bindings in a cache: every change that can alter one names the device, or all of them with '*'.
-- Counts, last times and battery are not such changes: the triggers name their columns.
CREATE FUNCTION tell_binding_change() RETURNS trigger
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
                PERFORM pg_notify('wardlink_bindings', OLD.serial);
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
    PERFORM pg_notify('wardlink_bindings', coalesce(serial, '*'));
    RETURN NULL;
END
$$;
CREATE TRIGGER devices_tell
    AFTER INSERT OR DELETE OR UPDATE OF serial, org_id, owner_patient_id ON devices
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER device_owners_tell
    AFTER INSERT OR DELETE OR UPDATE ON device_owners
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER signal_streams_tell
    AFTER INSERT OR DELETE OR UPDATE OF patient_id, device_id, signal_type_id, started_at, ended_at ON signal_streams
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER timeseries_binding_tell
    AFTER INSERT OR DELETE OR UPDATE ON timeseries_binding
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER timeseries_binding_tag_tell
    AFTER INSERT OR DELETE OR UPDATE ON timeseries_binding_tag
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER patients_tell
    AFTER UPDATE OF org_id ON patients
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
CREATE TRIGGER signal_types_tell
    AFTER INSERT OR DELETE OR UPDATE OF code ON signal_types
    FOR EACH ROW EXECUTE FUNCTION tell_binding_change();
