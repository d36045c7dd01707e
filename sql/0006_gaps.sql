-- Holes in the ledger become gaps: what is missing, since when, how it ended. The bridge also needs DELETE on
-- ledger_edges; the other grants of 0001 stay as they are.

ALTER TABLE ledger
    ADD COLUMN lost int8multirange NOT NULL DEFAULT '{}',
    ADD COLUMN missing bigint NOT NULL DEFAULT 0 CHECK (missing >= 0),
    ADD COLUMN has_holes boolean GENERATED ALWAYS AS (missing > 0) STORED,
    ADD COLUMN review_due boolean NOT NULL DEFAULT false,
    ADD COLUMN settled_below bigint NOT NULL DEFAULT 0 CHECK (settled_below >= 0),
    ADD COLUMN known_through bigint NOT NULL DEFAULT -1 CHECK (known_through >= -1),
    ADD COLUMN is_gone boolean NOT NULL DEFAULT false,
    ADD COLUMN opened_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN asked_at timestamptz,
    ADD COLUMN newest_at timestamptz,
    ADD COLUMN block_count bigint NOT NULL DEFAULT 0 CHECK (block_count >= 0),
    ADD COLUMN sample_count bigint NOT NULL DEFAULT 0 CHECK (sample_count >= 0),
    ADD CHECK (isempty(lost) OR lower(lost) >= 0);
COMMENT ON COLUMN ledger.lost IS 'Given up, by a loss record or because nobody has them any more; what comes all the same leaves it.';
COMMENT ON COLUMN ledger.missing IS 'How many sequences up to the highest known one are neither committed nor lost.';
COMMENT ON COLUMN ledger.settled_below IS 'The gateway holds nothing below: receipted, or on record as lost.';
COMMENT ON COLUMN ledger.known_through IS 'The highest sequence that the gateway is known to have given; -1: none.';
COMMENT ON COLUMN ledger.is_gone IS 'The gateway holds nothing of this epoch any more.';
COMMENT ON COLUMN ledger.newest_at IS 'Time of the last sample of the highest committed sequence.';
COMMENT ON COLUMN ledger.block_count IS 'Committed blocks whose samples are in sample_count: their mean estimates those of a hole.';
-- A row with very many ranges is rewritten with every commit: compressing it would take most of that time.
ALTER TABLE ledger ALTER committed SET STORAGE EXTERNAL, ALTER lost SET STORAGE EXTERNAL;
CREATE INDEX ledger_review ON ledger (device_serial, signal, epoch) WHERE review_due;
CREATE INDEX ledger_gateway ON ledger (gateway_id);
CREATE INDEX ledger_holes ON ledger (gateway_id) WHERE has_holes;

CREATE FUNCTION holes_of(committed int8multirange, lost int8multirange, known_through bigint) RETURNS int8multirange
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
        SELECT int8multirange(int8range(0, greatest(upper(committed), upper(lost), known_through + 1)))
               - committed - lost
    $$;
CREATE FUNCTION missing_of(committed int8multirange, lost int8multirange, known_through bigint) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
        SELECT coalesce(sum(upper(hole) - lower(hole)), 0)::bigint FROM unnest(holes_of(committed, lost, known_through)) hole
    $$;
COMMENT ON FUNCTION holes_of IS 'Sequences that are known to exist, and are neither here nor given up.';

-- Ends of what was committed beside a hole, so that a gap has times. Rows go when no hole touches them any more.
CREATE TABLE ledger_edges (
    device_serial text NOT NULL,
    signal        text NOT NULL,
    epoch         text NOT NULL,
    first         bigint NOT NULL,
    last          bigint NOT NULL CHECK (last >= first),
    first_at      timestamptz NOT NULL,
    last_at       timestamptz NOT NULL,
    PRIMARY KEY (device_serial, signal, epoch, first)
);

ALTER TABLE stream_gaps
    ADD COLUMN epoch text,
    ADD COLUMN outcome text DEFAULT 'lost' CHECK (outcome IN ('lost', 'arrived', 'elsewhere', 'recorded')),
    ADD COLUMN is_estimated boolean NOT NULL DEFAULT false,
    DROP CONSTRAINT stream_gaps_sample_count_check,
    ADD CONSTRAINT stream_gaps_sample_count_check
        CHECK (sample_count > 0 OR sample_count = 0 AND coalesce(outcome, '') IN ('arrived', 'recorded'));
UPDATE stream_gaps SET outcome = NULL WHERE closed_at IS NULL;
ALTER TABLE stream_gaps ADD CONSTRAINT stream_gaps_closed_with_outcome CHECK ((closed_at IS NULL) = (outcome IS NULL));
COMMENT ON COLUMN stream_gaps.outcome IS
    'Null: open. lost: counts as a loss. arrived: came late, nothing is lost. elsewhere: the gateway has its receipt for '
    'it, but this database does not have it. recorded: another row speaks of these samples.';
COMMENT ON COLUMN stream_gaps.sample_count IS
    'What is missing now: samples of the named sequences that come after all are taken off.';
COMMENT ON COLUMN stream_gaps.is_estimated IS 'The samples were counted from blocks of mean size.';
CREATE INDEX stream_gaps_sequences ON stream_gaps (device_serial, signal, epoch) WHERE epoch IS NOT NULL;

-- Loss records of before did not say which outbox their sequences were of: every outbox of that gateway is taken to
-- have lost what it did not send, so that no hole is reported a second time.
UPDATE ledger l SET lost = g.sequences * int8multirange(int8range(0, upper(l.committed))) - l.committed
  FROM (SELECT device_serial, signal, gateway_id, range_agg(sequences) AS sequences
          FROM stream_gaps WHERE sequences IS NOT NULL GROUP BY 1, 2, 3) g
 WHERE NOT isempty(l.committed)
   AND (l.device_serial, l.signal, l.gateway_id) = (g.device_serial, g.signal, g.gateway_id);
UPDATE stream_gaps g SET epoch = l.epoch
  FROM (SELECT device_serial, signal, gateway_id, min(epoch) AS epoch FROM ledger GROUP BY 1, 2, 3 HAVING count(*) = 1) l
 WHERE g.sequences IS NOT NULL
   AND (l.device_serial, l.signal, l.gateway_id) = (g.device_serial, g.signal, g.gateway_id);
UPDATE ledger SET opened_at = updated_at, missing = missing_of(committed, lost, known_through);
UPDATE ledger SET review_due = has_holes;

ALTER TABLE alerts ADD COLUMN acknowledged_at timestamptz, ADD COLUMN acknowledged_by text;
COMMENT ON COLUMN alerts.acknowledged_at IS 'Somebody knows of it; it stays open, and is not raised again, while its cause lasts.';
