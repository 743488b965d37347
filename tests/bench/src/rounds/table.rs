//! Medians, ratios within a round, and the goals beside them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{BufRead, BufReader, Read};

use super::Measurement;
use crate::load::Report;

/// How a figure is judged.
#[derive(Clone, Copy)]
enum Goal {
    /// At most this many times nginx's of the same round.
    TimesNginx(f64),
    /// At least this many times nginx's.
    AtLeastTimesNginx(f64),
    /// At most this much more than without a proxy.
    MoreThanDirect(f64),
    AtMost(f64),
    None,
}

struct Figure {
    case: &'static str,
    label: &'static str,
    digits: usize,
    goal: Goal,
    of: fn(&Measurement) -> Option<f64>,
}

const fn figure(
    case: &'static str,
    label: &'static str,
    digits: usize,
    goal: Goal,
    of: fn(&Measurement) -> Option<f64>,
) -> Figure {
    Figure { case, label, digits, goal, of }
}

const FIGURES: [Figure; 18] = [
    figure("unary-1k", "CPU us a call", 2, Goal::TimesNginx(1.10), per_call),
    figure("unary-1k", "calls/s", 0, Goal::AtLeastTimesNginx(0.9), rate),
    figure("unary-16k", "CPU us a call", 2, Goal::TimesNginx(1.2), per_call),
    figure("unary-200k", "CPU us a call", 1, Goal::TimesNginx(0.6), per_call),
    figure("burst", "CPU us an event", 2, Goal::TimesNginx(1.0), per_event),
    figure("burst", "events/s", 0, Goal::None, |one| of(one, |report| Some(report.events_per_second))),
    figure("paced", "CPU us an event", 2, Goal::TimesNginx(1.05), per_event),
    figure("paced", "first event p99 us", 0, Goal::MoreThanDirect(500.0), |one| {
        of(one, |report| report.first_event.map(|times| times.p99))
    }),
    figure("paced", "gap p99 us", 0, Goal::MoreThanDirect(100.0), |one| {
        of(one, |report| report.gap.map(|times| times.p99))
    }),
    figure("paced", "transit p99 us", 0, Goal::None, |one| {
        of(one, |report| report.transit.map(|times| times.p99))
    }),
    figure("streams-1000", "CPU us an event", 2, Goal::None, per_event),
    figure("streams-1000", "resident MB", 1, Goal::AtMost(60.0), resident),
    figure("streams-5000", "resident MB", 1, Goal::AtMost(250.0), resident),
    figure("open-loop", "p50 us", 0, Goal::MoreThanDirect(200.0), |one| {
        of(one, |report| report.latency.map(|times| times.p50))
    }),
    figure("open-loop", "p99 us", 0, Goal::MoreThanDirect(500.0), |one| {
        of(one, |report| report.latency.map(|times| times.p99))
    }),
    figure("open-loop", "CPU us a call", 1, Goal::None, per_call),
    figure("idle", "resident MB", 1, Goal::AtMost(15.0), |one| one.idle_kb.map(megabytes)),
    figure("idle", "start ms", 1, Goal::AtMost(25.0), |one| one.startup_ms),
];

fn of(measurement: &Measurement, value: impl Fn(&Report) -> Option<f64>) -> Option<f64> {
    measurement.report.as_ref().and_then(value)
}

fn per_call(measurement: &Measurement) -> Option<f64> {
    of(measurement, |report| report.cpu_us_per_call)
}

fn per_event(measurement: &Measurement) -> Option<f64> {
    of(measurement, |report| report.cpu_us_per_event)
}

fn rate(measurement: &Measurement) -> Option<f64> {
    of(measurement, |report| Some(report.calls_per_second))
}

fn resident(measurement: &Measurement) -> Option<f64> {
    of(measurement, |report| (report.resident_kb > 0).then(|| megabytes(report.resident_kb)))
}

#[expect(clippy::cast_precision_loss, reason = "kilobytes of a process")]
fn megabytes(kilobytes: u64) -> f64 {
    kilobytes as f64 / 1024.0
}

pub fn read(file: impl Read) -> anyhow::Result<Vec<Measurement>> {
    BufReader::new(file).lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect()
}

/// A Markdown table: one row a figure, one column a target.
pub fn render(measurements: &[Measurement]) -> String {
    let mut targets: Vec<&str> = Vec::new();
    for measurement in measurements {
        if !targets.contains(&measurement.target.as_str()) {
            targets.push(&measurement.target);
        }
    }
    let columns = "---|".repeat(targets.len());
    let mut text = format!("| case | figure | {} | goal |\n|---|---|{columns}---|\n", targets.join(" | "));
    for figure in FIGURES.iter().filter(|figure| was_measured(measurements, figure)) {
        let cells: Vec<String> = targets.iter().map(|target| cell(measurements, figure, target)).collect();
        let (case, label, goal) = (figure.case, figure.label, figure.goal.sentence());
        let _ = writeln!(text, "| {case} | {label} | {} | {goal} |", cells.join(" | "));
    }
    text + &failures(measurements)
}

fn was_measured(measurements: &[Measurement], figure: &Figure) -> bool {
    measurements.iter().any(|one| one.case == figure.case && (figure.of)(one).is_some())
}

/// The median, and in brackets what the goal speaks of: a ratio or a difference, as the median over rounds.
fn cell(measurements: &[Measurement], figure: &Figure, target: &str) -> String {
    let own = by_round(measurements, figure, target);
    let Some(middle) = median(own.values().copied().collect()) else { return "–".to_owned() };
    let digits = figure.digits;
    let against = |reference: &str, compare: fn(f64, f64) -> f64| {
        let theirs = by_round(measurements, figure, reference);
        let both = own.iter().filter_map(|(round, value)| Some(compare(*value, *theirs.get(round)?)));
        median(both.collect())
    };
    let compared = match figure.goal {
        Goal::TimesNginx(_) | Goal::AtLeastTimesNginx(_) => {
            against("nginx", |own, theirs| own / theirs).map(|ratio| format!(" ({ratio:.2})"))
        }
        Goal::MoreThanDirect(_) => {
            against("direct", |own, theirs| own - theirs).map(|more| format!(" ({more:+.digits$})"))
        }
        Goal::AtMost(_) | Goal::None => None,
    };
    format!("{middle:.digits$}{}", compared.unwrap_or_default())
}

fn by_round(measurements: &[Measurement], figure: &Figure, target: &str) -> BTreeMap<u32, f64> {
    let of_target = measurements.iter().filter(|one| one.target == target && one.case == figure.case);
    of_target.filter_map(|one| Some((one.round, (figure.of)(one)?))).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { f64::midpoint(values[middle - 1], upper) })
}

impl Goal {
    fn sentence(self) -> String {
        match self {
            Self::TimesNginx(limit) => format!("at most {limit} times nginx"),
            Self::AtLeastTimesNginx(limit) => format!("at least {limit} times nginx"),
            Self::MoreThanDirect(limit) => format!("at most {limit} more than direct"),
            Self::AtMost(limit) => format!("at most {limit}"),
            Self::None => String::new(),
        }
    }
}

fn failures(measurements: &[Measurement]) -> String {
    let mut text = String::new();
    for one in measurements {
        let Some(report) = one.report.as_ref().filter(|report| report.failures > 0) else { continue };
        let why = report.first_failure.as_deref().unwrap_or_default();
        let _ = writeln!(text, "\n{} failures of `{}` in `{}`: {why}", report.failures, one.target, one.case);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(round: u32, target: &str, startup_ms: f64) -> Measurement {
        let (target, case) = (target.to_owned(), "idle".to_owned());
        Measurement {
            round,
            target,
            case,
            startup_ms: Some(startup_ms),
            idle_kb: Some(10 * 1024),
            report: None,
        }
    }

    #[test]
    fn the_table_shows_medians_of_what_was_measured() {
        let measurements = [idle(1, "a", 10.0), idle(2, "a", 30.0), idle(3, "a", 12.0), idle(1, "b", 5.0)];
        let text = render(&measurements);
        assert!(text.contains("| idle | start ms | 12.0 | 5.0 | at most 25 |"), "{text}");
        assert!(!text.contains("unary"), "{text}");
    }

    #[test]
    fn an_even_number_of_values_has_the_mean_of_the_middle_two_as_median() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
