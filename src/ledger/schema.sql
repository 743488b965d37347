-- Schema 3. Times are milliseconds since the Unix epoch, amounts are nano-dollars, work is micro-replica-seconds.
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row: everything before this place in the journal is in the tables.
CREATE TABLE cursor (segment INTEGER NOT NULL, offset INTEGER NOT NULL);
INSERT INTO cursor VALUES (0, 0);

-- Names that many calls share.
CREATE TABLE labels (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    team TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    route TEXT NOT NULL,
    requested_model TEXT NOT NULL,
    served_model TEXT NOT NULL,
    backend TEXT NOT NULL,
    reason TEXT NOT NULL,
    tier TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    UNIQUE (requested_model, key, team, endpoint, route, served_model, backend, reason, tier, config_digest)
);

CREATE TABLE calls (
    n INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    label INTEGER NOT NULL REFERENCES labels (id),
    tags TEXT,
    opened_at INTEGER NOT NULL,
    closed_at INTEGER NOT NULL,
    first_token_at INTEGER,
    attempts INTEGER NOT NULL,
    status INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    stream INTEGER NOT NULL,
    usage_source INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    cached_input_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    audio_input_tokens INTEGER NOT NULL,
    image_input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL,
    audio_output_tokens INTEGER NOT NULL,
    image_output_tokens INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    api_cost INTEGER,
    self_hosted_cost INTEGER,
    work INTEGER NOT NULL,
    attempts_cost INTEGER NOT NULL,
    unpriced INTEGER NOT NULL
);
-- No index: an entry would cost half of what the row costs. Times are found by `spans`.

CREATE TABLE rent (
    n INTEGER PRIMARY KEY,
    backend TEXT NOT NULL,
    from_at INTEGER NOT NULL,
    to_at INTEGER NOT NULL,
    replica_millis INTEGER NOT NULL,
    busy INTEGER NOT NULL,
    rent INTEGER NOT NULL,
    attributed INTEGER NOT NULL,
    idle INTEGER NOT NULL
);
CREATE INDEX rent_from_at ON rent (from_at);

CREATE TABLE events (
    n INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX events_at ON events (at);
