-- Schema 2: a view for people, with names in place, words for codes, and exact dollars.
CREATE VIEW breakeven.calls_readable AS
SELECT
    calls.id, ledgers.instance, labels.key, labels.team, labels.endpoint, labels.route, labels.requested_model,
    labels.served_model, labels.backend, labels.reason, labels.tier, labels.config_digest,
    coalesce(calls.tags, '') AS tags,
    calls.opened_at, calls.closed_at, calls.first_token_at, calls.attempts, calls.status,
    (ARRAY['success', 'client_error', 'upstream_error', 'timeout', 'cancelled'])[calls.outcome + 1] AS outcome,
    calls.stream,
    (ARRAY['upstream_usage', 'own_tokenizer', 'estimate', 'none'])[calls.usage_source + 1] AS usage_source,
    calls.input_tokens,
    coalesce(calls.cached_input_tokens, 0) AS cached_input_tokens,
    coalesce(calls.cache_write_tokens, 0) AS cache_write_tokens,
    coalesce(calls.audio_input_tokens, 0) AS audio_input_tokens,
    coalesce(calls.image_input_tokens, 0) AS image_input_tokens,
    calls.output_tokens,
    coalesce(calls.reasoning_tokens, 0) AS reasoning_tokens,
    coalesce(calls.audio_output_tokens, 0) AS audio_output_tokens,
    coalesce(calls.image_output_tokens, 0) AS image_output_tokens,
    calls.cost::numeric * 0.000000001 AS cost_usd,
    calls.api_cost::numeric * 0.000000001 AS api_cost_usd,
    calls.self_hosted_cost::numeric * 0.000000001 AS self_hosted_cost_usd,
    coalesce(calls.work, 0)::numeric * 0.000001 AS work_replica_seconds,
    coalesce(calls.attempts_cost, 0)::numeric * 0.000000001 AS attempts_cost_usd,
    calls.unpriced
FROM breakeven.calls
JOIN breakeven.labels USING (label)
JOIN breakeven.ledgers USING (ledger);
