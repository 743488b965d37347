//! Spend, tokens and savings, grouped.
//!
//! ```text
//! cost        = token charges + the rent attributed to calls
//! rent        = attributed + idle
//! spend       = cost + idle                         (token charges + rent)
//! net savings = all_api - spend                     (negative when renting did not pay)
//! ```
//! Rent belongs to a backend and an interval. Grouped by nothing but `day`, `hour` and `backend`, a row shows all
//! of its rent. Grouped by anything else, a row shows the rent attributed to its calls, and what nobody used
//! stands in a row of its own, whose other keys say [`IDLE`]: the rows add up to the same total either way.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use rusqlite::{Connection, params};

use super::super::database::signed;
use super::super::record::LABELS;
use super::super::spans::rows_between;
use super::{LedgerError, Reader, count, outcome, visit_query};
use crate::economics::{NanoUsd, Timestamp};
use crate::ledger::UsageSource;

/// Value of a key that idle rent has no value of.
pub const IDLE: &str = "(idle)";

const HOUR_MILLIS: u64 = 3_600_000;
const DAY_MILLIS: u64 = 24 * HOUR_MILLIS;

/// What rows may be grouped by. Days and hours are UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    Day,
    Hour,
    Backend,
    /// The name that the client asked for.
    Model,
    /// The name at the backend that served it.
    ServedModel,
    Route,
    /// Public id of the virtual key.
    VirtualKey,
    Team,
    /// The value of one tag; empty for calls without it.
    Tag(String),
    Endpoint,
    Outcome,
    Reason,
    Tier,
}

/// A key that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot group by `{0}`: use day, hour, backend, model, served_model, route, key, team, tag:NAME, endpoint, \
     outcome, reason or tier"
)]
pub struct ParseKeyError(String);

impl FromStr for Key {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        Ok(match text {
            "day" => Self::Day,
            "hour" => Self::Hour,
            "backend" => Self::Backend,
            "model" => Self::Model,
            "served_model" => Self::ServedModel,
            "route" => Self::Route,
            "key" => Self::VirtualKey,
            "team" => Self::Team,
            "endpoint" => Self::Endpoint,
            "outcome" => Self::Outcome,
            "reason" => Self::Reason,
            "tier" => Self::Tier,
            _ => match text.strip_prefix("tag:") {
                Some(name) if !name.is_empty() => Self::Tag(name.to_owned()),
                _ => return Err(ParseKeyError(text.to_owned())),
            },
        })
    }
}

/// As it is written in `--by`, and as the column is called in results.
impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Day => out.write_str("day"),
            Self::Hour => out.write_str("hour"),
            Self::Tag(name) => write!(out, "tag:{name}"),
            Self::Outcome => out.write_str("outcome"),
            label => out.write_str(label.label().unwrap_or_default()),
        }
    }
}

impl Key {
    /// The column of `labels` that it is, if it is one.
    const fn label(&self) -> Option<&'static str> {
        match self {
            Self::Backend => Some("backend"),
            Self::Model => Some("model"),
            Self::ServedModel => Some("served_model"),
            Self::Route => Some("route"),
            Self::VirtualKey => Some("key"),
            Self::Team => Some("team"),
            Self::Endpoint => Some("endpoint"),
            Self::Reason => Some("reason"),
            Self::Tier => Some("tier"),
            Self::Day | Self::Hour | Self::Tag(_) | Self::Outcome => None,
        }
    }

    fn label_index(&self) -> Option<usize> {
        let column = match self.label()? {
            "model" => "requested_model",
            other => other,
        };
        LABELS.iter().position(|label| *label == column)
    }

    const fn splits_rent(&self) -> bool {
        matches!(self, Self::Day | Self::Hour | Self::Backend)
    }
}

/// One group. All amounts are exact sums.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// Values of the keys, in the order they were asked for.
    pub keys: Vec<String>,
    pub requests: u64,
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    /// Calls whose tokens were counted here because the backend did not report them, or whose cost holds an
    /// estimate of what failed attempts cost.
    pub estimated_requests: u64,
    /// Token charges, and the rent attributed to the calls.
    pub cost: NanoUsd,
    /// The same usage on the API alone; a call that no API offers counts what it cost.
    pub all_api: NanoUsd,
    /// The same usage as its share of a fully used self-hosted backend; a call that none offers counts what it
    /// cost.
    pub all_self_hosted: NanoUsd,
    /// Rent that was due in the group's time. In a group of calls, what they cost on rented backends: their shares of the
    /// rent, and their fees.
    pub rent: NanoUsd,
    /// Rent that no call used. Negative where calls were attributed more than was due.
    pub idle: NanoUsd,
}

impl Row {
    /// Token charges and rent.
    pub fn spend(&self) -> NanoUsd {
        self.cost + self.idle
    }

    pub fn net_savings(&self) -> NanoUsd {
        self.all_api - self.spend()
    }

    /// Adds everything but the keys.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.input_tokens += other.input_tokens;
        self.cached_input_tokens += other.cached_input_tokens;
        self.output_tokens += other.output_tokens;
        self.estimated_requests += other.estimated_requests;
        self.cost += other.cost;
        self.all_api += other.all_api;
        self.all_self_hosted += other.all_self_hosted;
        self.rent += other.rent;
        self.idle += other.idle;
    }
}

impl Reader {
    /// One row per combination of `by` that has calls or rent in the range, sorted by its keys. Rent is in the
    /// range that its interval (a minute or less) begins in.
    pub fn totals(
        &self,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        by: &[Key],
    ) -> Result<Vec<Row>, LedgerError> {
        let millis = |at: Timestamp| signed(at.as_millis());
        let range = (since.map_or(0, millis), until.map_or(i64::MAX, millis));
        self.snapshot(|connection| group(connection, range, by))
    }
}

/// The sums of a ledger that is read once, see [`Reader::totals`].
pub fn totals(
    path: &Path,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    by: &[Key],
) -> Result<Vec<Row>, LedgerError> {
    Reader::open(path)?.totals(since, until, by)
}

fn group(connection: &Connection, range: (i64, i64), by: &[Key]) -> rusqlite::Result<Vec<Row>> {
    let calls = sum_calls(connection, range, by)?;
    // Names of all that ever called, which nobody asks for on a day without calls.
    let labels = if calls.is_empty() { HashMap::new() } else { read_labels(connection)? };
    let mut grouping = Grouping::new(by);
    if grouping.needs_rented_backends() {
        grouping.rented = rented_backends(connection)?;
    }
    for (group, row) in calls {
        let names = &labels[&group.label];
        grouping.add_calls(group, names, row);
    }
    add_rent(connection, range, &mut grouping)?;
    Ok(grouping.into_rows())
}

/// The rows of a report in the making, from whichever database the sums come.
#[derive(Debug)]
pub(in crate::ledger) struct Grouping<'a> {
    by: &'a [Key],
    splits_rent: bool,
    /// Backends that have any rent.
    pub(in crate::ledger) rented: HashSet<String>,
    groups: BTreeMap<Vec<String>, Row>,
}

impl<'a> Grouping<'a> {
    pub(in crate::ledger) fn new(by: &'a [Key]) -> Self {
        let splits_rent = by.iter().all(Key::splits_rent);
        Self { by, splits_rent, rented: HashSet::new(), groups: BTreeMap::new() }
    }

    /// Whether `rented` must be set before calls are added.
    pub(in crate::ledger) const fn needs_rented_backends(&self) -> bool {
        !self.splits_rent
    }

    /// Adds calls whose names, in the order of [`LABELS`], are the same. Their `rent` is what they cost without
    /// failed attempts: their share of the rent, if their backend is rented.
    pub(in crate::ledger) fn add_calls(&mut self, group: Group, names: &[String], mut row: Row) {
        if !self.rented.contains(&names[backend_index()]) {
            row.rent = NanoUsd::ZERO;
        }
        self.groups.entry(group.keys(self.by, names)).or_default().add(&row);
    }

    /// Adds the rent of a backend for an interval that begins at `from`.
    pub(in crate::ledger) fn add_rent(
        &mut self,
        backend: &str,
        from: Timestamp,
        rent: NanoUsd,
        idle: NanoUsd,
    ) {
        let from = from.as_millis();
        let value = |key: &Key| match key {
            Key::Day => bucket_name(key, from - from % DAY_MILLIS),
            Key::Hour => bucket_name(key, from - from % HOUR_MILLIS),
            Key::Backend => backend.to_owned(),
            _ => IDLE.to_owned(),
        };
        let group = self.groups.entry(self.by.iter().map(value).collect()).or_default();
        group.rent += if self.splits_rent { rent } else { idle };
        group.idle += idle;
    }

    pub(in crate::ledger) fn into_rows(self) -> Vec<Row> {
        self.groups.into_iter().map(|(keys, row)| Row { keys, ..row }).collect()
    }
}

/// What the calls of a group have in common before names are looked up.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ledger) struct Group {
    pub(in crate::ledger) label: i64,
    /// Start of the day or hour, or zero.
    pub(in crate::ledger) bucket: u64,
    pub(in crate::ledger) outcome: i64,
    /// Values of the tags that it is grouped by.
    pub(in crate::ledger) tags: Vec<String>,
}

impl Group {
    fn keys(self, by: &[Key], names: &[String]) -> Vec<String> {
        let (bucket, outcome_name) = (self.bucket, outcome(self.outcome).as_str());
        let mut tags = self.tags.into_iter();
        let mut value = |key: &Key| match key {
            Key::Day | Key::Hour => bucket_name(key, bucket),
            Key::Outcome => outcome_name.to_owned(),
            Key::Tag(_) => tags.next().unwrap_or_default(),
            label => label.label_index().map(|index| names[index].clone()).unwrap_or_default(),
        };
        by.iter().map(&mut value).collect()
    }
}

fn sum_calls(
    connection: &Connection,
    range: (i64, i64),
    by: &[Key],
) -> rusqlite::Result<HashMap<Group, Row>> {
    let sql =
        "SELECT label, closed_at, outcome, usage_source, input_tokens, cached_input_tokens, output_tokens,
               cost, api_cost, self_hosted_cost, attempts_cost, tags
               FROM calls WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND closed_at < ?4";
    let width = bucket_width(by);
    let by_outcome = by.contains(&Key::Outcome);
    let by_tags = by.iter().any(|key| matches!(key, Key::Tag(_)));
    let mut groups = HashMap::<Group, Row>::new();
    let read = |row: &rusqlite::Row<'_>| {
        let closed_at = count(row, 1)?;
        let tags = if by_tags {
            let tags: Option<String> = row.get(11)?;
            tag_values(tags.as_deref().unwrap_or_default(), by)
        } else {
            Vec::new()
        };
        let group = Group {
            label: row.get(0)?,
            bucket: width.map_or(0, |width| closed_at - closed_at % width),
            outcome: if by_outcome { row.get(2)? } else { 0 },
            tags,
        };
        let cost = NanoUsd::from_nanos(row.get(7)?);
        let elsewhere = |index| optional_amount(row, index).map(|amount| amount.unwrap_or(cost));
        let source: i64 = row.get(3)?;
        let attempts_cost = NanoUsd::from_nanos(row.get(10)?);
        let is_estimated = source == UsageSource::OwnTokenizer as i64
            || source == UsageSource::Estimate as i64
            || attempts_cost != NanoUsd::ZERO;
        let call = Row {
            keys: Vec::new(),
            requests: 1,
            input_tokens: count(row, 4)?,
            cached_input_tokens: count(row, 5)?,
            output_tokens: count(row, 6)?,
            estimated_requests: is_estimated.into(),
            cost,
            all_api: elsewhere(8)?,
            all_self_hosted: elsewhere(9)?,
            rent: cost - attempts_cost,
            idle: NanoUsd::ZERO,
        };
        groups.entry(group).or_default().add(&call);
        Ok(())
    };
    let rows = rows_between(connection, range.0, range.1)?;
    visit_query(connection, sql, params![rows.start, rows.end, range.0, range.1], read, drop)?;
    Ok(groups)
}

fn add_rent(connection: &Connection, range: (i64, i64), grouping: &mut Grouping<'_>) -> rusqlite::Result<()> {
    let sql = "SELECT backend, from_at, rent, idle FROM rent WHERE from_at >= ?1 AND from_at < ?2";
    let read = |row: &rusqlite::Row<'_>| {
        let (backend, from): (String, _) = (row.get(0)?, Timestamp::from_millis(count(row, 1)?));
        let (rent, idle) = (NanoUsd::from_nanos(row.get(2)?), NanoUsd::from_nanos(row.get(3)?));
        grouping.add_rent(&backend, from, rent, idle);
        Ok(())
    };
    visit_query(connection, sql, params![range.0, range.1], read, drop)
}

fn rented_backends(connection: &Connection) -> rusqlite::Result<HashSet<String>> {
    let mut backends = HashSet::new();
    let read = |row: &rusqlite::Row<'_>| row.get(0);
    visit_query(connection, "SELECT DISTINCT backend FROM rent", [], read, |name| {
        backends.insert(name);
    })?;
    Ok(backends)
}

fn read_labels(connection: &Connection) -> rusqlite::Result<HashMap<i64, Vec<String>>> {
    let columns = LABELS.join(", ");
    let mut labels = HashMap::new();
    let read = |row: &rusqlite::Row<'_>| {
        let names =
            (1..=LABELS.len()).map(|index| row.get(index)).collect::<rusqlite::Result<Vec<String>>>()?;
        Ok((row.get(0)?, names))
    };
    visit_query(connection, &format!("SELECT id, {columns} FROM labels"), [], read, |(id, names)| {
        labels.insert(id, names);
    })?;
    Ok(labels)
}

fn optional_amount(row: &rusqlite::Row<'_>, index: usize) -> rusqlite::Result<Option<NanoUsd>> {
    row.get::<_, Option<i64>>(index).map(|nanos| nanos.map(NanoUsd::from_nanos))
}

fn backend_index() -> usize {
    Key::Backend.label_index().expect("`backend` is one of the labels")
}

/// The finest bucket asked for: an hour lies in one day.
pub(in crate::ledger) fn bucket_width(by: &[Key]) -> Option<u64> {
    if by.contains(&Key::Hour) { Some(HOUR_MILLIS) } else { by.contains(&Key::Day).then_some(DAY_MILLIS) }
}

fn bucket_name(key: &Key, start: u64) -> String {
    let format = if *key == Key::Day { "%Y-%m-%d" } else { "%Y-%m-%dT%H:00Z" };
    jiff::Timestamp::from_millisecond(signed(start))
        .map_or_else(|_| start.to_string(), |start| start.strftime(format).to_string())
}

/// The values of the tags among the keys, in their order.
pub(in crate::ledger) fn tag_values(tags: &str, by: &[Key]) -> Vec<String> {
    let value = |key: &Key| if let Key::Tag(name) = key { Some(tag_value(tags, name)) } else { None };
    by.iter().filter_map(value).collect()
}

/// The value of `name` in `a=1,b=2`.
fn tag_value(tags: &str, name: &str) -> String {
    let value = |tag: &str| {
        tag.split_once('=').filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    tags.split(',').find_map(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_prints_as_it_is_written() {
        let names = [
            "day",
            "hour",
            "backend",
            "model",
            "served_model",
            "route",
            "key",
            "team",
            "tag:feature",
            "endpoint",
            "outcome",
            "reason",
            "tier",
        ];
        for name in names {
            assert_eq!(name.parse::<Key>().unwrap().to_string(), name);
        }
        assert!("tag:".parse::<Key>().is_err());
        assert!("colour".parse::<Key>().unwrap_err().to_string().contains("tag:NAME"));
    }

    #[test]
    fn every_label_key_has_its_column() {
        for name in ["backend", "model", "served_model", "route", "key", "team", "endpoint", "reason", "tier"]
        {
            assert!(name.parse::<Key>().unwrap().label_index().is_some(), "{name}");
        }
    }

    #[test]
    fn a_tag_is_found_by_its_whole_name() {
        assert_eq!(tag_value("feature=rank,user=x=y", "user"), "x=y");
        assert_eq!(tag_value("feature=rank", "feat"), "");
        assert_eq!(tag_value("", "user"), "");
    }
}
