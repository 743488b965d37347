//! The report from Postgres: the database sums, and what is made of the sums is the same code as for SQLite.

use std::collections::HashMap;
use std::time::Duration;

use tokio_postgres::{IsolationLevel, Row as SqlRow, Transaction};

use super::PostgresError;
use super::session::{open, within};
use crate::config::PostgresSettings;
use crate::economics::{NanoUsd, Timestamp};
use crate::ledger::UsageSource;
use crate::ledger::database::unsigned;
use crate::ledger::query::totals::{Group, Grouping, bucket_width, tag_values};
use crate::ledger::query::{Key, Row};
use crate::ledger::record::LABELS;

/// How long a report may take; years of rows are summed within it.
const LONGEST_REPORT: Duration = Duration::from_mins(10);

/// As [`query::totals`](crate::ledger::query::totals), over the ledgers of all proxies.
pub async fn totals(
    settings: &PostgresSettings,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    by: &[Key],
) -> Result<Vec<Row>, PostgresError> {
    let patient = PostgresSettings { statement_timeout: LONGEST_REPORT, ..settings.clone() };
    let server = settings.server.to_string();
    let mut open = open(&patient).await?;
    let failed = |source| PostgresError::Failed { server: server.clone(), source };
    let work = async {
        // One snapshot for calls and rent, whatever is shipped meanwhile.
        let transaction = open
            .client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await
            .map_err(failed)?;
        let exists: bool = transaction
            .query_one("SELECT to_regclass('breakeven.ledgers') IS NOT NULL", &[])
            .await
            .map_err(failed)?
            .get(0);
        if !exists {
            return Err(PostgresError::NoLedger { server: server.clone() });
        }
        group(&transaction, (since, until), by).await.map_err(failed)
    };
    within(LONGEST_REPORT, &server, work).await
}

async fn group(
    transaction: &Transaction<'_>,
    range: (Option<Timestamp>, Option<Timestamp>),
    by: &[Key],
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let mut grouping = Grouping::new(by);
    if grouping.needs_rented_backends() {
        let backends = transaction.query("SELECT DISTINCT backend FROM breakeven.rent", &[]).await?;
        grouping.rented = backends.iter().map(|row| row.get(0)).collect();
    }
    let columns = LABELS.join(", ");
    let labels = transaction.query(&format!("SELECT label, {columns} FROM breakeven.labels"), &[]).await?;
    let names = |row: &SqlRow| (1..=LABELS.len()).map(|index| row.get(index)).collect::<Vec<String>>();
    let labels: HashMap<i32, Vec<String>> = labels.iter().map(|row| (row.get(0), names(row))).collect();
    for row in transaction.query(&calls_sql(range, by), &[]).await? {
        let label: i32 = row.get(0);
        let Some(names) = labels.get(&label) else { continue };
        grouping.add_calls(group_of(&row, by), names, sums(&row));
    }
    let (from, range) = (millis_sql("from_at"), range_sql("from_at", range));
    let sql = format!("SELECT backend, {from}, rent, idle FROM breakeven.rent {range}");
    for row in transaction.query(&sql, &[]).await? {
        let from = Timestamp::from_millis(unsigned(row.get(1)));
        let amount = |index| NanoUsd::from_nanos(row.get(index));
        grouping.add_rent(row.get(0), from, amount(2), amount(3));
    }
    Ok(grouping.into_rows())
}

/// Exact sums by everything that SQL can tell apart. Tags are told apart as they were written.
fn calls_sql(range: (Option<Timestamp>, Option<Timestamp>), by: &[Key]) -> String {
    let bucket = bucket_width(by)
        .map_or("0::bigint".to_owned(), |width| format!("{0} - {0} % {width}", millis_sql("closed_at")));
    let outcome = if by.contains(&Key::Outcome) { "outcome" } else { "0::smallint" };
    let by_tags = by.iter().any(|key| matches!(key, Key::Tag(_)));
    let tags = if by_tags { "coalesce(tags, '')" } else { "''::text" };
    let (own, estimate) = (UsageSource::OwnTokenizer as i64, UsageSource::Estimate as i64);
    format!(
        "SELECT label, {bucket}, {outcome}, {tags}, count(*),
            sum(input_tokens)::bigint, coalesce(sum(cached_input_tokens), 0)::bigint, sum(output_tokens)::bigint,
            count(*) FILTER (WHERE usage_source IN ({own}, {estimate}) OR attempts_cost <> 0), sum(cost)::bigint,
            sum(coalesce(api_cost, cost))::bigint, sum(coalesce(self_hosted_cost, cost))::bigint,
            sum(cost - coalesce(attempts_cost, 0))::bigint
         FROM breakeven.calls {} GROUP BY 1, 2, 3, 4",
        range_sql("closed_at", range)
    )
}

/// Milliseconds since the epoch, exactly: `extract` is numeric.
fn millis_sql(column: &str) -> String {
    format!("(extract(epoch FROM {column}) * 1000)::bigint")
}

/// Literals rather than parameters, so that only the months in the range are planned.
fn range_sql(column: &str, (since, until): (Option<Timestamp>, Option<Timestamp>)) -> String {
    let bound = |comparison: &str, at: Timestamp| {
        let (seconds, millis) = (at.as_millis() / 1000, at.as_millis() % 1000);
        format!("{column} {comparison} '{}'::timestamptz", literal(seconds, millis))
    };
    let bounds = [since.map(|at| bound(">=", at)), until.map(|at| bound("<", at))];
    let bounds: Vec<String> = bounds.into_iter().flatten().collect();
    if bounds.is_empty() { String::new() } else { format!("WHERE {}", bounds.join(" AND ")) }
}

fn literal(seconds: u64, millis: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map_or("infinity".to_owned(), |at| format!("{}.{millis:03}+00", at.strftime("%Y-%m-%d %H:%M:%S")))
}

fn group_of(row: &SqlRow, by: &[Key]) -> Group {
    Group {
        label: i64::from(row.get::<_, i32>(0)),
        bucket: unsigned(row.get(1)),
        outcome: i64::from(row.get::<_, i16>(2)),
        tags: tag_values(row.get(3), by),
    }
}

fn sums(row: &SqlRow) -> Row {
    let count = |index| unsigned(row.get(index));
    let amount = |index| NanoUsd::from_nanos(row.get(index));
    Row {
        keys: Vec::new(),
        requests: count(4),
        input_tokens: count(5),
        cached_input_tokens: count(6),
        output_tokens: count(7),
        estimated_requests: count(8),
        cost: amount(9),
        all_api: amount(10),
        all_self_hosted: amount(11),
        rent: amount(12),
        idle: NanoUsd::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_its_start_and_not_its_end() {
        let (since, until) = (Timestamp::from_millis(1_800_014_400_007), Timestamp::from_secs(1_800_018_000));
        assert_eq!(
            range_sql("closed_at", (Some(since), Some(until))),
            "WHERE closed_at >= '2027-01-15 12:00:00.007+00'::timestamptz \
             AND closed_at < '2027-01-15 13:00:00.000+00'::timestamptz"
        );
        assert_eq!(range_sql("closed_at", (None, None)), "");
        assert!(range_sql("at", (None, Some(Timestamp::from_millis(u64::MAX)))).contains("infinity"));
    }
}
