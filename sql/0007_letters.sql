-- A dead letter knows what was counted of it, so that driving it again counts the rest, once.

ALTER TABLE dead_letters
    ADD COLUMN is_claimed boolean,
    ADD COLUMN counted jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN first_at timestamptz,
    ADD COLUMN last_at timestamptz;
COMMENT ON COLUMN dead_letters.is_claimed IS
    'Whether its sequence is in the ledger on account of this row, which then is the token of the count. Null: the row '
    'is older than this column.';
COMMENT ON COLUMN dead_letters.counted IS 'Points of it that are counted already, by stream.';
COMMENT ON COLUMN dead_letters.first_at IS 'With last_at: only the samples from then to then are left to write. Null: all.';
