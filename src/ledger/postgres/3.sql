-- Schema 3: ids of rows that may come again, from any proxy, and the row that is here for each. A month that is let go
-- of leaves them, so that its rows do not come back.
CREATE TABLE breakeven.once (
    id uuid PRIMARY KEY,
    ledger integer NOT NULL,
    closed_at timestamptz NOT NULL
);
INSERT INTO breakeven.once (id, ledger, closed_at)
SELECT DISTINCT ON (id) id, ledger, closed_at FROM breakeven.calls
WHERE substr(id::text, 15, 1) = '8' ORDER BY id, closed_at;
