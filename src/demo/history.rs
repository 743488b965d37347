//! The demo's day, read back from the ledger as what the picture shows.

use std::path::Path;
use std::time::Duration;

use super::picture::Sample;
use crate::economics::time::millis;
use crate::economics::{NanoUsd, PoolSpec, Preference, Timestamp};
use crate::ledger::LedgerError;
use crate::ledger::query;

/// Time between two samples.
const STEP: Duration = Duration::from_mins(15);
/// Break-even goes by the mean call of so many steps.
const MEAN_STEPS: usize = 8;

/// What happened in one step.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    calls: u64,
    calls_on_api: u64,
    api_cost: NanoUsd,
    api_charges: NanoUsd,
    rent: NanoUsd,
}

/// Samples of the day from `midnight` until `end`, one a quarter of an hour.
pub fn samples(
    path: &Path,
    pool: &PoolSpec,
    api: &str,
    replicas_alone: u32,
    midnight: Timestamp,
    end: Timestamp,
) -> Result<Vec<Sample>, LedgerError> {
    let count = end.since(midnight).as_secs() / STEP.as_secs();
    let mut steps = vec![Step::default(); usize::try_from(count).unwrap_or(0)];
    let last = steps.len().saturating_sub(1);
    let position = |at: Timestamp| {
        usize::try_from(at.since(midnight).as_secs() / STEP.as_secs()).unwrap_or(last).min(last)
    };
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    for volume in query::volume_since(path, midnight)? {
        let step = &mut steps[position(volume.at)];
        step.calls += volume.requests;
        step.api_cost += volume.api_cost;
        if volume.backend == api {
            step.calls_on_api += volume.requests;
            step.api_charges += volume.api_cost;
        }
    }
    for rent in query::rent(path, midnight)? {
        steps[position(rent.from)].rent += rent.rent;
    }
    Ok(accumulate(&steps, pool, replicas_alone))
}

fn accumulate(steps: &[Step], pool: &PoolSpec, replicas_alone: u32) -> Vec<Sample> {
    let (mut spent, mut api_alone) = (NanoUsd::ZERO, NanoUsd::ZERO);
    let mut serves = Preference::Api;
    let mut samples = Vec::with_capacity(steps.len());
    for (index, step) in (0_u32..).zip(steps) {
        spent += step.api_charges + step.rent;
        api_alone += step.api_cost;
        if step.calls > 0 {
            let mostly_api = step.calls_on_api * 2 > step.calls;
            serves = if mostly_api { Preference::Api } else { Preference::SelfHosted };
        }
        let at = STEP * (index + 1);
        let recent = &steps[samples.len().saturating_sub(MEAN_STEPS - 1)..=samples.len()];
        samples.push(Sample {
            at,
            calls_per_hour: ratio(step.calls, 1) * 3600.0 / STEP.as_secs_f64(),
            break_even_per_hour: break_even(recent, pool),
            serves,
            spent,
            api_alone,
            self_hosted_alone: pool.hourly.mul_div_floor(millis(at) * u64::from(replicas_alone), 3_600_000),
        });
    }
    samples
}

/// Calls an hour that cost on the API what a replica costs, for calls like these.
fn break_even(recent: &[Step], pool: &PoolSpec) -> Option<f64> {
    let calls: u64 = recent.iter().map(|step| step.calls).sum();
    let cost: NanoUsd = recent.iter().map(|step| step.api_cost).sum();
    let nanos = u64::try_from(cost.as_nanos()).ok().filter(|nanos| *nanos > 0)?;
    Some(pool.hourly.to_usd_f64() * 1e9 * ratio(calls, nanos))
}

#[expect(clippy::cast_precision_loss, reason = "a level in a picture")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}
