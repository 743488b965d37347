//! The report for a terminal: aligned columns, amounts to a hundredth of a cent, and the total below.

use std::io::{self, Write};

use super::{Cell, cells};
use crate::commands::figures::grouped;
use crate::ledger::query::{Key, Row};

/// Headings, in the order of `cells`.
const HEADINGS: [&str; 11] = [
    "requests",
    "input",
    "cached",
    "output",
    "estimated",
    "cost $",
    "API alone $",
    "own at full use $",
    "rent $",
    "idle $",
    "net saved $",
];

pub(super) fn write(rows: &[Row], by: &[Key], out: &mut impl Write) -> io::Result<()> {
    if rows.is_empty() {
        return writeln!(out, "no calls and no rent are recorded in this range");
    }
    let mut lines = vec![heading(by)];
    lines.extend(rows.iter().map(|row| line(row, row.keys.clone())));
    if rows.len() > 1 {
        lines.push(total(rows, by));
    }
    let widths: Vec<_> = (0..lines[0].len()).map(|column| width(&lines, column)).collect();
    for line in &lines {
        writeln!(out, "{}", aligned(line, &widths, by.len()).trim_end())?;
    }
    Ok(())
}

fn heading(by: &[Key]) -> Vec<String> {
    by.iter().map(Key::to_string).chain(HEADINGS.map(str::to_owned)).collect()
}

fn line(row: &Row, keys: Vec<String>) -> Vec<String> {
    let values = cells(row).map(|(_, cell)| match cell {
        Cell::Count(count) => grouped(count),
        Cell::Amount(amount) => format!("{amount:.4}"),
    });
    // A name that a client made up must not steer the terminal.
    let keys = keys.into_iter().map(|key| key.replace(char::is_control, "?"));
    keys.map(|key| if key.is_empty() { "-".to_owned() } else { key }).chain(values).collect()
}

fn total(rows: &[Row], by: &[Key]) -> Vec<String> {
    let mut total = Row::default();
    for row in rows {
        total.add(row);
    }
    let mut keys = vec![" ".to_owned(); by.len()];
    if let Some(first) = keys.first_mut() {
        "total".clone_into(first);
    }
    line(&total, keys)
}

fn width(lines: &[Vec<String>], column: usize) -> usize {
    lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
}

/// Keys to the left, numbers to the right.
fn aligned(line: &[String], widths: &[usize], keys: usize) -> String {
    let pad = |(index, (cell, width)): (usize, (&String, &usize))| {
        if index < keys { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
    };
    line.iter().zip(widths).enumerate().map(pad).collect::<Vec<_>>().join("  ")
}
