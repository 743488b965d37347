//! Where a simulation's traffic comes from: trace files, or the ledger.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::economics::time::millis;
use crate::economics::{NanoUsd, PoolSpec, Slot, Timestamp};
use crate::ledger::Event;
use crate::ledger::query;
use crate::planner;
use crate::simulator::{Demand, Tally, priced, priced_sum, trace};

use super::super::economy::Economy;
use super::{SimulateArgs, output};

/// Where the ledger is when neither a flag nor a configuration says so.
const LEDGER: &str = "breakeven.db";

pub(super) struct Source {
    pub name: String,
    /// When the first slot begins; a trace file does not know and begins at midnight.
    pub start: Timestamp,
    kind: Kind,
}

enum Kind {
    Trace { path: PathBuf, rows_are_sums: bool },
    Ledger(PathBuf),
}

impl Source {
    /// The pool that the traffic is for. Of a ledger it is the one that was there, which did not know how much it would
    /// need; elsewhere no larger than the busiest slot can fill.
    pub(super) fn pool(&self, configured: &PoolSpec, demand: &Demand) -> PoolSpec {
        match self.kind {
            Kind::Trace { .. } => demand.capped(configured),
            Kind::Ledger(_) => configured.clone(),
        }
    }
}

pub(super) fn sources(arguments: &SimulateArgs, economy: &Economy) -> anyhow::Result<Vec<Source>> {
    if let Some(named) = &arguments.ledger {
        let configured = economy.ledger.clone().unwrap_or_else(|| PathBuf::from(LEDGER));
        let path = if named.as_os_str().is_empty() { configured } else { named.clone() };
        let slot = arguments.slot.unwrap_or(economy.settings.slot);
        let start = ledger_start(&path, economy, slot)?;
        return Ok(vec![Source { name: path.display().to_string(), start, kind: Kind::Ledger(path) }]);
    }
    let mut sources: Vec<Source> = Vec::with_capacity(arguments.traces.len());
    for path in &arguments.traces {
        let kind = Kind::Trace { path: path.clone(), rows_are_sums: arguments.rows_are_sums };
        sources.push(Source { name: new_name(&trace_name(path), &sources), start: Timestamp::ZERO, kind });
    }
    Ok(sources)
}

/// The name, with a number when another trace has it already: files are named after it.
fn new_name(name: &str, taken: &[Source]) -> String {
    let is_free = |name: &String| taken.iter().all(|source| source.name != *name);
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.to_owned()).chain(numbered).find(is_free).expect("numbers do not end")
}

/// `data/azure.csv.gz` → `azure`.
fn trace_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.strip_suffix(".csv").unwrap_or(name).to_owned()
}

pub(super) fn read(source: &Source, economy: &Economy, slot: Duration) -> anyhow::Result<Tally> {
    let mut tally = Tally::new(slot);
    match &source.kind {
        Kind::Trace { path, rows_are_sums } => read_file(path, *rows_are_sums, economy, &mut tally)?,
        Kind::Ledger(path) => read_ledger(path, economy, source.start, &mut tally)?,
    }
    Ok(tally)
}

fn read_file(path: &Path, rows_are_sums: bool, economy: &Economy, tally: &mut Tally) -> anyhow::Result<()> {
    let price = if rows_are_sums { priced_sum } else { priced };
    let file = File::open(path).context("cannot open it")?;
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let bar = output::progress(bytes, "reading");
    trace::read(bar.wrap_read(file), |event| {
        let slot = price(&economy.card, &economy.pool.capacity, &event.usage, event.requests);
        tally.add(event.arrival, slot)
    })?;
    bar.finish_and_clear();
    Ok(())
}

const END_OF_TIME: Timestamp = Timestamp::from_millis(i64::MAX.unsigned_abs());

/// Start of the slot in which the first call of the pool's traffic closed.
fn ledger_start(path: &Path, economy: &Economy, slot: Duration) -> anyhow::Result<Timestamp> {
    let mut first: Option<u64> = None;
    query::trace(path, Timestamp::ZERO, END_OF_TIME, |row| {
        if belongs(&row, economy) {
            let closed_at = row.closed_at.as_millis();
            first = Some(first.map_or(closed_at, |first| first.min(closed_at)));
        }
    })?;
    let Some(first) = first else { bail!("the ledger `{}` has no calls to replay", path.display()) };
    let slot = millis(slot).max(1);
    Ok(Timestamp::from_millis(first - first % slot))
}

/// A call that the pool could have taken: of the chosen route, or of any with both sides when none was chosen.
fn belongs(row: &query::TraceRow, economy: &Economy) -> bool {
    let has_sides = match &economy.route {
        Some(route) => row.route == *route,
        None => row.api_cost.is_some() && row.work.0 > 0,
    };
    has_sides && row.usage.total_tokens() > 0
}

/// What the planner saw: the calls of a slot are those that closed in it, with their own prices and work (whatever
/// flags say of other traffic), at the speed of the replicas, and with the start-up time, that were known then.
fn read_ledger(path: &Path, economy: &Economy, start: Timestamp, tally: &mut Tally) -> anyhow::Result<()> {
    let slot = millis(tally.slot()).max(1);
    let mut slots: BTreeMap<u64, Slot> = BTreeMap::new();
    query::trace(path, Timestamp::ZERO, END_OF_TIME, |row| {
        if belongs(&row, economy) {
            *slots.entry(row.closed_at.as_millis() / slot).or_default() += Slot {
                api_cost: row.api_cost.unwrap_or(NanoUsd::ZERO),
                work: row.work,
                requests: 1,
                tokens: row.usage.total_tokens(),
            };
        }
    })?;
    let events = query::events(path, Timestamp::ZERO)?;
    let events: Vec<_> = events.iter().filter(|event| event.subject == economy.pool_name).collect();
    let speeds = Speeds::of(&events);
    for (at, startup) in events.iter().filter_map(|event| Some((event.at, planner::startup_in(event)?))) {
        tally.note_startup(at.since(start), startup);
    }
    for (number, seen) in slots {
        let at = Timestamp::from_millis(number * slot);
        tally.add(at.since(start), planner::at_speed(seen, speeds.at(at)))?;
    }
    Ok(())
}

/// How fast the replicas turned out to be, from when on.
struct Speeds(Vec<(Timestamp, f64)>);

impl Speeds {
    fn of(events: &[&Event]) -> Self {
        Self(events.iter().filter_map(|event| Some((event.at, planner::speed_in(event)?))).collect())
    }

    fn at(&self, instant: Timestamp) -> f64 {
        self.0.iter().rev().find(|(from, _)| *from <= instant).map_or(1.0, |(_, speed)| *speed)
    }
}
