//! What the demo's day cost, and what it would have cost without a choice.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use crate::commands::figures::{grouped, plural};
use crate::economics::time::millis;
use crate::economics::{NanoUsd, PoolSpec, Timestamp, Work};
use crate::ledger::LedgerError;
use crate::ledger::query::{self, Key};

/// Replicas are counted by what this much time needs.
const SLOT: Duration = Duration::from_mins(1);

/// The day's account, read from the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bill {
    /// How much of the day passed.
    pub span: Duration,
    pub calls: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub calls_on_api: u64,
    pub api_charges: NanoUsd,
    pub rent: NanoUsd,
    /// Replica-time that was paid for.
    pub rented: Duration,
    /// Every call at the API's price.
    pub api_alone: NanoUsd,
    /// Replicas held all the time, enough of them for the busiest minute.
    pub self_hosted_alone: NanoUsd,
    pub replicas_alone: u32,
    /// How often the preferred side changed.
    pub changes: u64,
}

impl Bill {
    /// Reads it from the ledger at `path`, for a day that began at `midnight` and has passed until `end`.
    pub fn read(
        path: &Path,
        pool: &PoolSpec,
        api: &str,
        midnight: Timestamp,
        end: Timestamp,
    ) -> Result<Self, LedgerError> {
        let mut bill = Self { span: end.since(midnight), ..Self::default() };
        for row in query::totals(path, Some(midnight), None, &[Key::Backend])? {
            bill.calls += row.requests;
            bill.input_tokens += row.input_tokens;
            bill.output_tokens += row.output_tokens;
            bill.api_alone += row.all_api;
            bill.rent += row.rent;
            if row.keys.iter().any(|backend| backend == api) {
                bill.calls_on_api += row.requests;
                bill.api_charges += row.cost;
            }
        }
        let rented: u64 = query::rent(path, midnight)?.iter().map(|rent| rent.replica_millis).sum();
        bill.rented = Duration::from_millis(rented);
        let events = query::events(path, midnight)?;
        bill.changes = events.iter().filter(|event| event.kind == "preference").count() as u64;
        bill.replicas_alone = replicas_needed(path, midnight)?;
        bill.self_hosted_alone =
            pool.hourly.mul_div_floor(millis(bill.span) * u64::from(bill.replicas_alone), 3_600_000);
        Ok(bill)
    }

    pub fn total(&self) -> NanoUsd {
        self.api_charges + self.rent
    }

    /// Whether choosing was cheaper than either side alone.
    pub fn is_below_both(&self) -> bool {
        self.total() < self.api_alone.min(self.self_hosted_alone)
    }

    /// The table that the demo ends with.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let total = self.total();
        let own = self.calls - self.calls_on_api;
        let rows = [
            (
                "breakeven",
                total,
                format!(
                    "{} calls on the API for ${:.2}, {} self-hosted on {} of rent for ${:.2}",
                    grouped(self.calls_on_api),
                    self.api_charges,
                    grouped(own),
                    hours(self.rented),
                    self.rent
                ),
            ),
            (
                "API alone",
                self.api_alone,
                format!("every call at the API's price{}", more(self.api_alone, total)),
            ),
            (
                "self-hosted alone",
                self.self_hosted_alone,
                format!(
                    "{} rented for all {}{}",
                    plural(u64::from(self.replicas_alone), "replica"),
                    hours(self.span),
                    more(self.self_hosted_alone, total)
                ),
            ),
        ];
        writeln!(
            out,
            "{} of traffic: {} calls, {} tokens in, {} out; {} of side\n",
            hours(self.span),
            grouped(self.calls),
            grouped(self.input_tokens),
            grouped(self.output_tokens),
            plural(self.changes, "change")
        )?;
        for (name, amount, remark) in rows {
            writeln!(out, "  {name:<18} ${amount:>8.2}   {remark}")?;
        }
        Ok(())
    }
}

/// Replicas that the busiest slot keeps busy; at least one.
fn replicas_needed(path: &Path, since: Timestamp) -> Result<u32, LedgerError> {
    let mut slots = HashMap::<u64, Work>::new();
    query::trace(path, since, Timestamp::from_millis(i64::MAX.unsigned_abs()), |call| {
        *slots.entry(call.opened_at.as_millis() / millis(SLOT)).or_default() += call.work;
    })?;
    let most = slots.into_values().max().unwrap_or_default();
    let one = Work::from_replica_seconds(SLOT.as_secs());
    Ok(u32::try_from(most.0.div_ceil(one.0)).unwrap_or(u32::MAX).max(1))
}

/// `, 33% more` of an amount over another.
fn more(amount: NanoUsd, than: NanoUsd) -> String {
    let (amount, than) = (amount.to_usd_f64(), than.to_usd_f64());
    if than <= 0.0 {
        return String::new();
    }
    let share = (amount / than - 1.0) * 100.0;
    if share >= 0.0 { format!(", {share:.0}% more") } else { format!(", {:.0}% less", -share) }
}

fn hours(duration: Duration) -> String {
    let minutes = (duration.as_secs() + 30) / 60;
    format!("{} h {:02} min", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usd(text: &str) -> NanoUsd {
        text.parse().unwrap()
    }

    #[test]
    fn the_table_says_what_it_cost_and_what_each_side_alone_would_have_cost() {
        let bill = Bill {
            span: Duration::from_hours(24),
            calls: 8_143,
            input_tokens: 16_300_000,
            output_tokens: 2_000_123,
            calls_on_api: 2_101,
            api_charges: usd("15.76"),
            rent: usd("30.30"),
            rented: Duration::from_mins(608),
            api_alone: usd("61.20"),
            self_hosted_alone: usd("71.76"),
            replicas_alone: 1,
            changes: 2,
        };
        let mut table = Vec::new();
        bill.write(&mut table).unwrap();
        insta::assert_snapshot!(String::from_utf8(table).unwrap(), @r"
        24 h 00 min of traffic: 8,143 calls, 16,300,000 tokens in, 2,000,123 out; 2 changes of side

          breakeven          $   46.06   2,101 calls on the API for $15.76, 6,042 self-hosted on 10 h 08 min of rent for $30.30
          API alone          $   61.20   every call at the API's price, 33% more
          self-hosted alone  $   71.76   1 replica rented for all 24 h 00 min, 56% more
        ");
        assert!(bill.is_below_both());
    }

    #[test]
    fn a_demo_that_is_stopped_at_once_has_a_table_without_a_division_by_zero() {
        let mut table = Vec::new();
        Bill::default().write(&mut table).unwrap();
        let table = String::from_utf8(table).unwrap();
        assert!(!table.contains("NaN") && !table.contains("inf"), "{table}");
    }
}
