//! A plan as text and as CSV.

use std::io::{self, Write};

use super::advice::grouped;
use super::{Comparison, Plan};
use crate::economics::Billing;

pub(super) fn write(comparisons: &[Comparison], plans: &[Plan], out: &mut impl Write) -> io::Result<()> {
    for (index, (comparison, plan)) in comparisons.iter().zip(plans).enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        one(comparison, plan, out)?;
    }
    let best = plans.iter().find(|plan| plan.is_best == Some(true));
    if let Some(advice) = best.and_then(|best| best.advice.as_ref()).filter(|_| plans.len() > 1) {
        writeln!(out, "\nof these machines: {advice}")?;
    }
    Ok(())
}

fn one(comparison: &Comparison, plan: &Plan, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{} against {}, {} USD an hour", plan.api, plan.machine, comparison.pool.hourly)?;
    if let Some(note) = &plan.note {
        writeln!(out, "note: {note}")?;
    }
    let volume = |number: Option<f64>| number.map_or_else(|| "none".to_owned(), grouped);
    let break_even = match (comparison.pool.billing, plan.kappa) {
        (Billing::PerUse, Some(kappa)) if kappa >= 1.0 => "always cheaper, at any volume".to_owned(),
        (Billing::PerUse, Some(_)) => "never cheaper, at any volume".to_owned(),
        _ => format!("{} requests a day", volume(plan.break_even_requests_per_day)),
    };
    writeln!(
        out,
        "break-even: {break_even}; one machine does {}, worth {} times its rent on the API (kappa)",
        volume(plan.one_machine_requests_per_day),
        plan.kappa.map_or_else(|| "none".to_owned(), |kappa| format!("{kappa:.2}"))
    )?;
    writeln!(
        out,
        "{:>14}{:>14}{:>14}{:>10}{:>14}{:>10}  cheaper",
        "requests/day", "API USD", "own USD", "machines", "mix USD", "machines"
    )?;
    for row in &plan.rows {
        writeln!(
            out,
            "{:>14}{:>14.2}{:>14.2}{:>10}{:>14.2}{:>10}  {}",
            row.requests_per_day,
            row.api_usd,
            row.self_hosted_usd,
            row.replicas,
            row.mix_usd,
            row.mix_replicas,
            row.cheaper
        )?;
    }
    if let Some(advice) = &plan.advice {
        writeln!(out, "{advice}")?;
    }
    Ok(())
}

pub(super) fn csv(plans: &[Plan], out: &mut impl Write) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record([
        "machine",
        "break_even_requests_per_day",
        "requests_per_day",
        "api_usd",
        "self_hosted_usd",
        "cheaper",
        "replicas",
        "overflow_api_usd",
        "mix_usd",
        "mix_replicas",
        "note",
    ])?;
    for plan in plans {
        for row in &plan.rows {
            writer.write_record([
                plan.machine.clone(),
                plan.break_even_requests_per_day.map_or_else(String::new, |volume| volume.to_string()),
                row.requests_per_day.to_string(),
                row.api_usd.to_string(),
                row.self_hosted_usd.to_string(),
                row.cheaper.to_owned(),
                row.replicas.to_string(),
                row.overflow_api_usd.to_string(),
                row.mix_usd.to_string(),
                row.mix_replicas.to_string(),
                plan.note.clone().unwrap_or_default(),
            ])?;
        }
    }
    writer.flush()
}
