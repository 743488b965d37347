-- Schema 1. Amounts are nano-dollars, work is micro-replica-seconds. `calls`, `rent` and `events` are partitioned by
-- month (UTC); the partitions are made by whoever ships rows.
CREATE TABLE breakeven.meta (key text PRIMARY KEY, value text NOT NULL);

-- One row a proxy's ledger: up to which of its rows all are here.
CREATE TABLE breakeven.ledgers (
    ledger integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id uuid NOT NULL UNIQUE,
    instance text NOT NULL,
    calls bigint NOT NULL DEFAULT 0,
    rent bigint NOT NULL DEFAULT 0,
    events bigint NOT NULL DEFAULT 0,
    shipped_at timestamptz
);

-- Names that many calls share. They are found by their digest, because an index on all of them could not hold the
-- longest.
CREATE TABLE breakeven.labels (
    label integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest bytea NOT NULL UNIQUE,
    key text NOT NULL,
    team text NOT NULL,
    endpoint text NOT NULL,
    route text NOT NULL,
    requested_model text NOT NULL,
    served_model text NOT NULL,
    backend text NOT NULL,
    reason text NOT NULL,
    tier text NOT NULL,
    config_digest text NOT NULL
);

-- No foreign keys: a check a row would cost more than the insert, and only the shipper writes here. Counts that are
-- zero for most calls are empty instead, which takes no space.
CREATE TABLE breakeven.calls (
    closed_at timestamptz NOT NULL,
    opened_at timestamptz NOT NULL,
    first_token_at timestamptz,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cost bigint NOT NULL,
    api_cost bigint,
    self_hosted_cost bigint,
    cached_input_tokens bigint,
    cache_write_tokens bigint,
    audio_input_tokens bigint,
    image_input_tokens bigint,
    reasoning_tokens bigint,
    audio_output_tokens bigint,
    image_output_tokens bigint,
    work bigint,
    attempts_cost bigint,
    ledger integer NOT NULL,
    label integer NOT NULL,
    id uuid NOT NULL,
    attempts smallint NOT NULL,
    status smallint NOT NULL,
    outcome smallint NOT NULL,
    usage_source smallint NOT NULL,
    stream boolean NOT NULL,
    unpriced boolean NOT NULL,
    tags text,
    PRIMARY KEY (closed_at, id)
) PARTITION BY RANGE (closed_at);

CREATE TABLE breakeven.rent (
    from_at timestamptz NOT NULL,
    to_at timestamptz NOT NULL,
    n bigint NOT NULL,
    replica_millis bigint NOT NULL,
    busy bigint NOT NULL,
    rent bigint NOT NULL,
    attributed bigint NOT NULL,
    idle bigint NOT NULL,
    ledger integer NOT NULL,
    backend text NOT NULL,
    PRIMARY KEY (from_at, ledger, n, backend)
) PARTITION BY RANGE (from_at);

CREATE TABLE breakeven.events (
    at timestamptz NOT NULL,
    n bigint NOT NULL,
    ledger integer NOT NULL,
    kind text NOT NULL,
    subject text NOT NULL,
    detail text NOT NULL,
    PRIMARY KEY (at, ledger, n)
) PARTITION BY RANGE (at);

-- `oldest_writer`: a breakeven that knows this schema or a later one may go on to ship rows here.
INSERT INTO breakeven.meta VALUES ('schema_version', '1'), ('oldest_writer', '1');
