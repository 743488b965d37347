//! Every metric family: its name, kind, labels and help. A promise to dashboards and alerts.

use super::instruments::Bounds;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

macro_rules! families {
    ($($constant:ident $kind:ident $name:literal [$($label:literal)*] $help:literal)*) => {
        $(pub(crate) const $constant: &Family =
            &Family { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*
        /// All families, in the order of the manual.
        pub const ALL: &[&Family] = &[$($constant),*];
    };
}

families! {
    REQUESTS Counter "breakeven_requests_total" ["backend" "model" "team" "outcome"]
        "Client requests finished, by the backend that answered."
    REJECTED Counter "breakeven_rejected_requests_total" ["team" "reason"]
        "Client requests refused before any backend was tried."
    TOKENS Counter "breakeven_tokens_total" ["backend" "model" "team" "type"]
        "Billable tokens; the types are disjoint, so sum() is the bill."
    IN_FLIGHT Gauge "breakeven_inflight_requests" ["backend"]
        "Requests sent to a backend and not finished."
    QUEUE_DEPTH Gauge "breakeven_queue_depth" ["pool"]
        "Requests waiting for a self-hosted slot."
    QUEUE_WAIT Histogram "breakeven_queue_wait_seconds" ["pool"]
        "Time spent waiting for a self-hosted slot."
    DURATION Histogram "breakeven_request_duration_seconds" ["backend" "model"]
        "Request received to last byte sent."
    FIRST_TOKEN Histogram "breakeven_time_to_first_token_seconds" ["backend" "model"]
        "Request received to first token sent (streaming only)."
    PER_OUTPUT_TOKEN Histogram "breakeven_time_per_output_token_seconds" ["backend" "model"]
        "Decode time per token after the first."
    OVERHEAD Histogram "breakeven_proxy_overhead_seconds" []
        "Time added by breakeven itself (total minus upstream wait)."

    ATTEMPTS Counter "breakeven_upstream_attempts_total" ["backend" "result"]
        "Attempts sent to a backend, retries included."
    RETRIES Counter "breakeven_retries_total" ["backend" "reason"]
        "Attempts that repeated an earlier one on the same backend."
    FALLBACKS Counter "breakeven_fallbacks_total" ["from" "to" "reason"]
        "Requests moved to another backend after a failure."
    BACKEND_UP Gauge "breakeven_backend_up" ["backend"]
        "1 if the last health probe succeeded."
    CIRCUIT_STATE Gauge "breakeven_circuit_state" ["backend" "state"]
        "1 for the state the circuit is in, 0 for the others."
    CIRCUIT_TRANSITIONS Counter "breakeven_circuit_transitions_total" ["backend" "to"]
        "Circuit state changes."

    SPEND Counter "breakeven_spend_usd_total" ["backend" "kind"]
        "US dollars owed: token charges, fees per request, and rent accrued per second while replicas are up."
    REQUEST_COST Counter "breakeven_request_cost_usd_total" ["backend" "model" "team"]
        "US dollars of spend attributed to requests; rent not attributed is idle."
    ALL_API_COST Counter "breakeven_all_api_cost_usd_total" ["model" "team"]
        "US dollars the same requests would have cost on the API."
    ALL_SELF_HOSTED_COST Counter "breakeven_all_selfhosted_cost_usd_total" ["pool"]
        "US dollars of rent had all requests run self-hosted (replicas needed x price)."
    UNPRICED Counter "breakeven_unpriced_requests_total" ["backend" "model"]
        "Requests with no price in the price book (counted as $0)."
    TOKEN_PRICE Gauge "breakeven_token_price_usd_per_million_tokens" ["backend" "model" "type"]
        "Price book in force."
    CAPACITY_PRICE Gauge "breakeven_capacity_price_usd_per_hour" ["pool"]
        "Rent for one replica for one hour."
    PRICE_BOOK_TIME Gauge "breakeven_price_book_timestamp_seconds" ["backend"]
        "When the prices of this backend were last confirmed."
    LEDGER_AMOUNT Gauge "breakeven_ledger_usd" ["period" "amount"]
        "US dollars of the current period from the ledger, restarts included."

    VOLUME Gauge "breakeven_volume_requests_per_hour" ["pool"]
        "Smoothed volume the router decides on."
    THRESHOLD Gauge "breakeven_threshold_requests_per_hour" ["pool"]
        "Volume at which self-hosting costs the same as the API at the current token mix."
    BAND Gauge "breakeven_threshold_band_requests_per_hour" ["pool" "edge"]
        "Hysteresis band around the threshold."
    POOL_CAPACITY Gauge "breakeven_pool_capacity_requests_per_hour" ["pool"]
        "Volume the pool can serve at full size and current token mix."
    KAPPA Gauge "breakeven_pool_kappa_ratio" ["pool"]
        "API dollars that a fully used replica replaces, per dollar of rent; below 1 no replica can pay."
    MARGINAL_COST Gauge "breakeven_marginal_cost_usd_per_request" ["backend" "pool"]
        "Cost of one more request, as the router sees it."
    AVERAGE_COST Gauge "breakeven_average_cost_usd_per_request" ["backend" "pool"]
        "Cost per request at the current volume, rent included."
    PREFERRED Gauge "breakeven_route_preferred" ["pool" "backend"]
        "1 for the backend now preferred."
    DECISIONS Counter "breakeven_route_decisions_total" ["pool" "backend" "reason"]
        "Routing decisions."
    FLIPS Counter "breakeven_route_flips_total" ["pool" "to"]
        "Changes of the preferred backend."
    PINNED Gauge "breakeven_route_pinned" ["pool"]
        "1 while an operator has pinned the pool to a backend."

    REPLICAS Gauge "breakeven_pool_replicas" ["pool" "state"]
        "Replicas by state."
    WANTED_REPLICAS Gauge "breakeven_pool_wanted_replicas" ["pool"]
        "Replicas the policy wants, starting and ready, for an autoscaler to follow."
    BUSY Counter "breakeven_pool_busy_seconds_total" ["pool"]
        "Replica-seconds doing work."
    RENTED Counter "breakeven_pool_rented_seconds_total" ["pool"]
        "Replica-seconds paid for."

    BUDGET_LIMIT Gauge "breakeven_budget_limit_usd" ["budget"]
        "Budget for the period."
    BUDGET_SPENT Gauge "breakeven_budget_spent_usd" ["budget"]
        "Spent this period, from the ledger."
    BUDGET_START Gauge "breakeven_budget_period_start_timestamp_seconds" ["budget"]
        "Start of the period."
    BUDGET_END Gauge "breakeven_budget_period_end_timestamp_seconds" ["budget"]
        "End of the period."

    TOKEN_COUNTS Counter "breakeven_token_counts_total" ["source"]
        "Where a request's token counts came from."
    TOKEN_ESTIMATE_ERROR Histogram "breakeven_token_estimate_error_ratio" ["model"]
        "|own count - upstream count| / upstream count."
    TOKEN_COUNTS_COMPARED Counter "breakeven_token_counts_compared_total" ["model" "source"]
        "Tokens of the requests counted both by breakeven and by the upstream."
    LEDGER_RECORDS Counter "breakeven_ledger_records_total" ["result"]
        "Ledger records by result."
    LEDGER_PENDING Gauge "breakeven_ledger_pending_records" []
        "Records accepted and not yet durable."
    LEDGER_COMMIT_TIME Gauge "breakeven_ledger_commit_timestamp_seconds" []
        "When the last record became durable."
    LEDGER_SHIPPED Counter "breakeven_ledger_shipped_records_total" []
        "Records copied to Postgres."
    LEDGER_UNSHIPPED Gauge "breakeven_ledger_unshipped_records" []
        "Records that are not in Postgres yet; they wait in the proxy's own ledger."
    LEDGER_SHIP_FAILURES Counter "breakeven_ledger_ship_failures_total" []
        "Times that Postgres could not be reached or written."
    LEDGER_SHIP_TIME Gauge "breakeven_ledger_ship_timestamp_seconds" []
        "When Postgres last took what there was; absent before the first time, and without `ledger.postgres`."
    RECONCILIATION_DRIFT Gauge "breakeven_reconciliation_drift_ratio" ["backend"]
        "(own total - provider invoice) / invoice, last closed day; absent until it is compared, and without a `costs_key`."

    RELOAD_SUCCESS Gauge "breakeven_config_reload_success" []
        "1 if the last reload succeeded."
    RELOAD_TIME Gauge "breakeven_config_reload_timestamp_seconds" []
        "Last successful reload."
    LABEL_OVERFLOW Counter "breakeven_label_overflow_total" ["label"]
        "Values folded into \"other\" to bound cardinality."
    SHARED_VOLUME_STALE Gauge "breakeven_shared_volume_stale" []
        "1 while the other proxies' volume is unknown and this one decides on its own."
    SHARED_PROXIES Gauge "breakeven_shared_proxies" []
        "Proxies that share volume and budgets, as last heard; 1 where there are no others."
    PLANNER_LEASE Gauge "breakeven_planner_lease_held" []
        "1 while this proxy holds the planner's lease and orders replicas."
    PANICS Counter "breakeven_panics_total" []
        "Panics caught; each one failed a single request or background task."
    RENDER_DURATION Gauge "breakeven_metrics_render_seconds" []
        "Time the previous scrape took to render."
    BUILD_INFO Gauge "breakeven_build_info" ["version" "revision"]
        "Build information."
}

const fn millis<const N: usize>(millis: [u64; N]) -> [u64; N] {
    scaled(millis, 1_000_000)
}

const fn scaled<const N: usize>(mut values: [u64; N], factor: u64) -> [u64; N] {
    let mut index = 0;
    while index < N {
        values[index] *= factor;
        index += 1;
    }
    values
}

pub(crate) const DURATION_BOUNDS: Bounds = &millis([
    50, 100, 200, 400, 800, 1_500, 3_000, 6_000, 12_000, 25_000, 50_000, 100_000, 200_000, 400_000, 800_000,
]);
pub(crate) const FIRST_TOKEN_BOUNDS: Bounds =
    &millis([10, 25, 50, 100, 250, 500, 750, 1_000, 2_500, 5_000, 7_500, 10_000, 20_000, 40_000, 80_000]);
pub(crate) const PER_OUTPUT_TOKEN_BOUNDS: Bounds = &scaled(
    [25, 50, 100, 250, 500, 750, 1_000, 1_500, 2_000, 3_000, 4_000, 5_000, 7_500, 10_000, 25_000],
    100_000,
);
pub(crate) const OVERHEAD_BOUNDS: Bounds =
    &scaled([5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000], 10_000);
pub(crate) const QUEUE_WAIT_BOUNDS: Bounds =
    &millis([1, 5, 10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000]);
pub(crate) const RATIO_BOUNDS: Bounds =
    &scaled([10, 25, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000], 100_000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_prefix_and_the_suffix_of_their_kind() {
        for family in ALL {
            assert!(family.name.starts_with("breakeven_"), "{}", family.name);
            assert_eq!(family.name.ends_with("_total"), family.kind == Kind::Counter, "{}", family.name);
        }
    }

    #[test]
    fn help_is_a_sentence_on_one_line() {
        for family in ALL {
            assert!(family.help.ends_with(['.', ')']) && !family.help.contains('\n'), "{}", family.name);
        }
    }

    #[test]
    fn bounds_rise() {
        let all = [
            DURATION_BOUNDS,
            FIRST_TOKEN_BOUNDS,
            PER_OUTPUT_TOKEN_BOUNDS,
            OVERHEAD_BOUNDS,
            QUEUE_WAIT_BOUNDS,
            RATIO_BOUNDS,
        ];
        for bounds in all {
            assert!(bounds.is_sorted_by(|low, high| low < high));
        }
    }
}
