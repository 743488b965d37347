//! A batch as arrays, one a column: one statement inserts all of it, and what is there already stays.
//!
//! `unnest` of arrays rather than `COPY`, because `COPY` cannot skip what is there, and a table in between would be
//! written twice and would need a session of its own behind a pooler.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Transaction};
use uuid::Uuid;

use super::schema::latest;
use super::source::Batch;
use crate::economics::Timestamp;
use crate::ledger::database::{signed, unsigned};
use crate::ledger::once;
use crate::ledger::record::{CALL_NUMBERS, LABELS};
use crate::ledger::rows::{CallRow, Names};

type Parameter<'a> = dyn ToSql + Sync + 'a;

/// One column of a batch.
#[derive(Debug)]
enum Column {
    Time(Vec<Option<SystemTime>>),
    Big(Vec<Option<i64>>),
    Small(Vec<i16>),
    Flag(Vec<bool>),
}

impl Column {
    fn of_calls(column: &str, calls: &[&CallRow]) -> Self {
        let numbers = || calls.iter().map(|call| call.number(column));
        match column {
            "closed_at" | "opened_at" | "first_token_at" => {
                let time = |millis| instant(Timestamp::from_millis(unsigned(millis)));
                Self::Time(numbers().map(|number| number.map(time)).collect())
            }
            "attempts" | "status" | "outcome" | "usage_source" => {
                let small = |number| i16::try_from(number).unwrap_or(i16::MAX);
                Self::Small(numbers().map(|number| number.map_or(0, small)).collect())
            }
            "stream" | "unpriced" => Self::Flag(numbers().map(|number| number == Some(1)).collect()),
            "input_tokens" | "output_tokens" | "cost" | "api_cost" | "self_hosted_cost" => {
                Self::Big(numbers().collect())
            }
            // Zero for most calls, and empty then: see the table.
            _ => Self::Big(numbers().map(|number| number.filter(|number| *number != 0)).collect()),
        }
    }

    const fn postgres_type(&self) -> &'static str {
        match self {
            Self::Time(_) => "timestamptz",
            Self::Big(_) => "bigint",
            Self::Small(_) => "smallint",
            Self::Flag(_) => "boolean",
        }
    }

    const fn as_parameter(&self) -> &Parameter<'_> {
        match self {
            Self::Time(values) => values,
            Self::Big(values) => values,
            Self::Small(values) => values,
            Self::Flag(values) => values,
        }
    }
}

pub(super) fn instant(at: Timestamp) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(latest(at).as_millis())
}

/// Postgres's text holds every character but NUL, which a client may well put into a model's name.
fn plain(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{FFFD}").into() } else { text.into() }
}

/// `INSERT` of rows of one ledger: the first parameter is its number, the others are one array a column.
fn insert_sql(table: &str, columns: &[(&str, &str)]) -> String {
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let arrays: Vec<String> =
        columns.iter().zip(2..).map(|((_, of), place)| format!("${place}::{of}[]")).collect();
    format!(
        "INSERT INTO breakeven.{table} (ledger, {}) SELECT $1::integer, arrays.* FROM unnest({}) AS arrays
         ON CONFLICT DO NOTHING",
        names.join(", "),
        arrays.join(", ")
    )
}

/// Inserts a batch of a ledger. `labels` has the numbers of all its labels. Returns how many rows were new.
pub(super) async fn insert(
    transaction: &Transaction<'_>,
    ledger: i32,
    labels: &HashMap<i64, i32>,
    batch: &Batch,
) -> Result<u64, Error> {
    let mut rows = 0;
    let again = elsewhere(transaction, ledger, &batch.calls).await?;
    let calls: Vec<&CallRow> = batch.calls.iter().filter(|call| !again.contains(&call.id)).collect();
    if !calls.is_empty() {
        rows += insert_calls(transaction, ledger, labels, &calls).await?;
    }
    if !batch.rent.is_empty() {
        rows += insert_rent(transaction, ledger, batch).await?;
    }
    if !batch.events.is_empty() {
        rows += insert_events(transaction, ledger, batch).await?;
    }
    Ok(rows)
}

/// The ids among those that may come again whose row is here already, as another's or as an earlier one of this ledger.
/// The others are taken in, in their order, so that no two proxies wait for each other in a ring.
async fn elsewhere(
    transaction: &Transaction<'_>,
    ledger: i32,
    calls: &[CallRow],
) -> Result<HashSet<Uuid>, Error> {
    let mut derived: Vec<(Uuid, SystemTime)> = calls
        .iter()
        .filter(|call| once::is_derived(call.id.as_bytes()))
        .map(|call| (call.id, instant(call.closed_at())))
        .collect();
    if derived.is_empty() {
        return Ok(HashSet::new());
    }
    derived.sort_unstable();
    let (ids, times): (Vec<Uuid>, Vec<SystemTime>) = derived.into_iter().unzip();
    let parameters: [&Parameter<'_>; 3] = [&ledger, &ids, &times];
    let take_in = "INSERT INTO breakeven.once (id, ledger, closed_at)
         SELECT id, $1::integer, closed_at FROM unnest($2::uuid[], $3::timestamptz[]) AS own (id, closed_at)
         ON CONFLICT DO NOTHING";
    transaction.execute(take_in, &parameters).await?;
    let others = "SELECT own.id FROM unnest($2::uuid[], $3::timestamptz[]) AS own (id, closed_at)
         JOIN breakeven.once USING (id) WHERE (once.ledger, once.closed_at) <> ($1::integer, own.closed_at)";
    Ok(transaction.query(others, &parameters).await?.iter().map(|row| row.get(0)).collect())
}

async fn insert_calls(
    transaction: &Transaction<'_>,
    ledger: i32,
    labels: &HashMap<i64, i32>,
    calls: &[&CallRow],
) -> Result<u64, Error> {
    let ids: Vec<Uuid> = calls.iter().map(|call| call.id).collect();
    // Postgres refuses a call without a label; all were looked up before.
    let own_labels: Vec<Option<i32>> = calls.iter().map(|call| labels.get(&call.label).copied()).collect();
    let tags: Vec<Option<Cow<'_, str>>> = calls.iter().map(|call| call.tags.as_deref().map(plain)).collect();
    let numbers: Vec<Column> = CALL_NUMBERS.iter().map(|column| Column::of_calls(column, calls)).collect();
    let mut columns = vec![("id", "uuid"), ("label", "integer"), ("tags", "text")];
    columns.extend(CALL_NUMBERS.into_iter().zip(numbers.iter().map(Column::postgres_type)));
    let mut parameters: Vec<&Parameter<'_>> = vec![&ledger, &ids, &own_labels, &tags];
    parameters.extend(numbers.iter().map(Column::as_parameter));
    transaction.execute(&insert_sql("calls", &columns), &parameters).await
}

async fn insert_rent(transaction: &Transaction<'_>, ledger: i32, batch: &Batch) -> Result<u64, Error> {
    let rent = || batch.rent.iter();
    let n: Vec<i64> = rent().map(|entry| entry.n).collect();
    let backends: Vec<Cow<'_, str>> = rent().map(|entry| plain(&entry.row.backend)).collect();
    let from: Vec<SystemTime> = rent().map(|entry| instant(entry.row.from)).collect();
    let to: Vec<SystemTime> = rent().map(|entry| instant(entry.row.to)).collect();
    let replicas: Vec<i64> = rent().map(|entry| signed(entry.row.replica_millis)).collect();
    let busy: Vec<i64> = rent().map(|entry| signed(entry.row.busy.0)).collect();
    let amounts: Vec<i64> = rent().map(|entry| entry.row.rent.as_nanos()).collect();
    let attributed: Vec<i64> = rent().map(|entry| entry.row.attributed.as_nanos()).collect();
    let idle: Vec<i64> = rent().map(|entry| entry.row.idle.as_nanos()).collect();
    let columns = [
        ("n", "bigint"),
        ("backend", "text"),
        ("from_at", "timestamptz"),
        ("to_at", "timestamptz"),
        ("replica_millis", "bigint"),
        ("busy", "bigint"),
        ("rent", "bigint"),
        ("attributed", "bigint"),
        ("idle", "bigint"),
    ];
    let parameters: [&Parameter<'_>; 10] =
        [&ledger, &n, &backends, &from, &to, &replicas, &busy, &amounts, &attributed, &idle];
    transaction.execute(&insert_sql("rent", &columns), &parameters).await
}

async fn insert_events(transaction: &Transaction<'_>, ledger: i32, batch: &Batch) -> Result<u64, Error> {
    let events = || batch.events.iter();
    let n: Vec<i64> = events().map(|event| event.n).collect();
    let at: Vec<SystemTime> = events().map(|event| instant(event.row.at)).collect();
    let kinds: Vec<Cow<'_, str>> = events().map(|event| plain(&event.row.kind)).collect();
    let subjects: Vec<Cow<'_, str>> = events().map(|event| plain(&event.row.subject)).collect();
    let details: Vec<Cow<'_, str>> = events().map(|event| plain(&event.row.detail)).collect();
    let columns =
        [("n", "bigint"), ("at", "timestamptz"), ("kind", "text"), ("subject", "text"), ("detail", "text")];
    let parameters: [&Parameter<'_>; 6] = [&ledger, &n, &at, &kinds, &subjects, &details];
    transaction.execute(&insert_sql("events", &columns), &parameters).await
}

/// A name for all names of a label together, the same at every proxy.
fn digest(names: &Names) -> [u8; 32] {
    let mut digest = Sha256::new();
    for name in names {
        digest.update((name.len() as u64).to_be_bytes());
        digest.update(name.as_bytes());
    }
    digest.finalize().into()
}

/// The numbers in Postgres of these labels of the proxy's own ledger; what is not there is inserted.
///
/// Not a part of the rows' transaction: a label that no row refers to does no harm, and proxies that insert the same
/// labels wait for each other so briefly. They are inserted in the order of their digests, so that no two proxies
/// wait for each other in a ring.
pub(super) async fn number_labels(
    client: &Client,
    names: &BTreeMap<i64, &Names>,
) -> Result<Vec<(i64, i32)>, Error> {
    let cleaned = |names: &Names| names.each_ref().map(|name| plain(name).into_owned());
    let by_digest: BTreeMap<Vec<u8>, (i64, Names)> = names
        .iter()
        .map(|(label, names)| (cleaned(names), label))
        .map(|(names, label)| (digest(&names).to_vec(), (*label, names)))
        .collect();
    let digests: Vec<&[u8]> = by_digest.keys().map(Vec::as_slice).collect();
    let columns: Vec<Vec<&str>> = (0..LABELS.len())
        .map(|column| by_digest.values().map(|(_, names)| names[column].as_str()).collect())
        .collect();
    let mut parameters: Vec<&Parameter<'_>> = vec![&digests];
    parameters.extend(columns.iter().map(|column| column as &Parameter<'_>));
    let arrays: Vec<String> = (2..LABELS.len() + 2).map(|place| format!("${place}::text[]")).collect();
    let sql = format!(
        "INSERT INTO breakeven.labels (digest, {}) SELECT * FROM unnest($1::bytea[], {}) ON CONFLICT DO NOTHING",
        LABELS.join(", "),
        arrays.join(", ")
    );
    client.execute(&sql, &parameters).await?;
    let found = client
        .query("SELECT digest, label FROM breakeven.labels WHERE digest = ANY ($1)", &[&digests])
        .await?;
    let numbers: HashMap<Vec<u8>, i32> = found.iter().map(|row| (row.get(0), row.get(1))).collect();
    let number = |names: &Names| numbers.get(digest(&cleaned(names)).as_slice()).copied();
    Ok(names.iter().filter_map(|(label, names)| Some((*label, number(names)?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(first: &str, second: &str) -> Names {
        let mut names = Names::default();
        first.clone_into(&mut names[0]);
        second.clone_into(&mut names[1]);
        names
    }

    #[test]
    fn names_that_read_the_same_when_joined_have_different_digests() {
        assert_ne!(digest(&names("ab", "c")), digest(&names("a", "bc")));
        assert_eq!(digest(&names("ab", "c")), digest(&names("ab", "c")));
    }

    #[test]
    fn a_nul_in_a_name_does_not_stop_the_batch() {
        assert_eq!(plain("gpt\0 4"), "gpt\u{FFFD} 4");
        assert!(matches!(plain("gpt-4"), Cow::Borrowed("gpt-4")));
    }

    #[test]
    fn an_insert_names_a_parameter_for_every_column() {
        let sql = insert_sql("events", &[("n", "bigint"), ("at", "timestamptz")]);
        assert!(sql.contains("(ledger, n, at)") && sql.contains("$2::bigint[], $3::timestamptz[]"), "{sql}");
    }
}
