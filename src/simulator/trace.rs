//! Reads traces: CSV with a header, plain or gzip.
//!
//! Columns, in any order: `arrival_s`, `prompt_tokens` (or `input_tokens`), `completion_tokens` (or
//! `output_tokens`); optional `cached_prompt_tokens` (or `cached_input_tokens`) and `requests`, the number of
//! requests that a row stands for. Columns of other names are ignored, and so is a byte order mark.

use std::io::Read;
use std::time::Duration;

use crate::economics::Usage;

/// One row of a trace: a request, or the sum of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEvent {
    /// Since the start of the trace.
    pub arrival: Duration,
    pub usage: Usage,
    pub requests: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read the trace")]
    Csv(#[from] csv::Error),
    #[error("the trace has no column `{0}`; it needs `arrival_s`, `prompt_tokens` and `completion_tokens`")]
    MissingColumn(&'static str),
    #[error("a row arrives {} days after the start; write seconds since the start, use longer slots, or cut the trace", arrival.as_secs() / 86_400)]
    TooLong { arrival: Duration },
    #[error("its cost or its work is too large to be counted")]
    TooLarge,
    #[error("line {line}: `{value}` is not a {expected}")]
    Value { line: u64, value: String, expected: &'static str },
}

/// Where the columns are.
struct Columns {
    arrival: usize,
    input: usize,
    output: usize,
    cached: Option<usize>,
    requests: Option<usize>,
}

/// The two bytes that begin every gzip file.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// What some programs put before UTF-8.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// Most tokens, and requests, of one row: at no price does its cost go beyond what an amount can hold.
const MOST_OF_A_ROW: u64 = 100_000_000_000;

/// Visits the rows of a CSV trace in their order; gzip is recognised by its first bytes.
pub fn read(
    mut source: impl Read,
    mut visit: impl FnMut(TraceEvent) -> Result<(), TraceError>,
) -> Result<(), TraceError> {
    let mut magic = [0; GZIP_MAGIC.len()];
    let got = read_up_to(&mut source, &mut magic).map_err(csv::Error::from)?;
    let rest = magic[..got].chain(source);
    if magic == GZIP_MAGIC {
        read_csv(flate2::read::MultiGzDecoder::new(rest), &mut visit)
    } else {
        read_csv(rest, &mut visit)
    }
}

fn read_up_to(source: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match source.read(&mut buffer[got..])? {
            0 => break,
            more => got += more,
        }
    }
    Ok(got)
}

fn read_csv(
    mut source: impl Read,
    visit: &mut dyn FnMut(TraceEvent) -> Result<(), TraceError>,
) -> Result<(), TraceError> {
    let mut mark = [0; BYTE_ORDER_MARK.len()];
    let got = read_up_to(&mut source, &mut mark).map_err(csv::Error::from)?;
    let first: &[u8] = if mark == BYTE_ORDER_MARK { &[] } else { &mark[..got] };
    let mut reader = csv::ReaderBuilder::new().buffer_capacity(1 << 16).from_reader(first.chain(source));
    let columns = columns(reader.byte_headers()?)?;
    let mut row = csv::ByteRecord::new();
    while reader.read_byte_record(&mut row)? {
        visit(event(&columns, &row)?)?;
    }
    Ok(())
}

fn columns(header: &csv::ByteRecord) -> Result<Columns, TraceError> {
    let find = |names: &[&str]| {
        header.iter().position(|cell| names.iter().any(|name| cell.trim_ascii() == name.as_bytes()))
    };
    Ok(Columns {
        arrival: find(&["arrival_s"]).ok_or(TraceError::MissingColumn("arrival_s"))?,
        input: find(&["prompt_tokens", "input_tokens"]).ok_or(TraceError::MissingColumn("prompt_tokens"))?,
        output: find(&["completion_tokens", "output_tokens"])
            .ok_or(TraceError::MissingColumn("completion_tokens"))?,
        cached: find(&["cached_prompt_tokens", "cached_input_tokens"]),
        requests: find(&["requests"]),
    })
}

fn event(columns: &Columns, row: &csv::ByteRecord) -> Result<TraceEvent, TraceError> {
    let wrong = |index: usize, expected| TraceError::Value {
        line: row.position().map_or(0, csv::Position::line),
        value: String::from_utf8_lossy(row.get(index).unwrap_or_default()).into_owned(),
        expected,
    };
    let count = |index: usize| {
        number(row.get(index).unwrap_or_default())
            .filter(|count| *count <= MOST_OF_A_ROW)
            .ok_or_else(|| wrong(index, "whole number of tokens, at most 100,000,000,000"))
    };
    let optional = |index: Option<usize>, default| index.map_or(Ok(default), count);
    let arrival = millis(row.get(columns.arrival).unwrap_or_default())
        .ok_or_else(|| wrong(columns.arrival, "number of seconds since the start"))?;
    let usage = Usage::new(count(columns.input)?, count(columns.output)?)
        .with_cached(optional(columns.cached, 0)?)
        .normalised();
    Ok(TraceEvent {
        arrival: Duration::from_millis(arrival),
        usage,
        requests: optional(columns.requests, 1)?,
    })
}

/// A whole number; also one written as `12.0`, as spreadsheets do.
fn number(cell: &[u8]) -> Option<u64> {
    let cell = cell.trim_ascii();
    let whole = match cell.iter().position(|byte| *byte == b'.') {
        Some(point) if cell[point + 1..].iter().all(|byte| *byte == b'0') => &cell[..point],
        Some(_) => return None,
        None => cell,
    };
    digits(whole)
}

fn digits(cell: &[u8]) -> Option<u64> {
    if cell.is_empty() {
        return None;
    }
    cell.iter().try_fold(0_u64, |sum, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// Seconds with decimals, in whole milliseconds, rounded down: a row stays in the slot of its arrival.
fn millis(cell: &[u8]) -> Option<u64> {
    let cell = cell.trim_ascii();
    let (whole, fraction) = match cell.iter().position(|byte| *byte == b'.') {
        Some(point) => (&cell[..point], &cell[point + 1..]),
        None => (cell, &[][..]),
    };
    let plain = cell.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.');
    if !plain {
        return exponent_millis(cell);
    }
    let mut thousandths = 0;
    for place in 0..3 {
        thousandths = thousandths * 10
            + fraction
                .get(place)
                .map_or(Some(0), |byte| byte.is_ascii_digit().then(|| u64::from(byte - b'0')))?;
    }
    digits(whole)?.checked_mul(1000)?.checked_add(thousandths)
}

/// `1.5e3` and the like, which some writers produce.
fn exponent_millis(cell: &[u8]) -> Option<u64> {
    let seconds: f64 = std::str::from_utf8(cell).ok()?.parse().ok()?;
    let duration = Duration::try_from_secs_f64(seconds).ok()?;
    u64::try_from(duration.as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn events(text: &[u8]) -> Result<Vec<TraceEvent>, TraceError> {
        let mut events = vec![];
        read(text, |event| {
            events.push(event);
            Ok(())
        })?;
        Ok(events)
    }

    #[test]
    fn a_row_keeps_its_arrival_and_tokens() {
        let rows = events(b"arrival_s,prompt_tokens,completion_tokens,cached_prompt_tokens\n1.2349,10,3,4\n")
            .unwrap();
        let usage = Usage::new(10, 3).with_cached(4);
        assert_eq!(rows, [TraceEvent { arrival: Duration::from_millis(1234), usage, requests: 1 }]);
    }

    #[test]
    fn gzip_and_plain_read_the_same() {
        let plain = b"arrival_s,input_tokens,output_tokens,requests\n0,1,2,3\n60,4.0,5,6\n";
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gzip.write_all(plain).unwrap();
        assert_eq!(events(plain).unwrap(), events(&gzip.finish().unwrap()).unwrap());
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_name() {
        let marked = b"\xef\xbb\xbfarrival_s,input_tokens,output_tokens\n0,1,2\n";
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gzip.write_all(marked).unwrap();
        assert_eq!(events(marked).unwrap(), events(&marked[3..]).unwrap());
        assert_eq!(events(&gzip.finish().unwrap()).unwrap(), events(&marked[3..]).unwrap());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let message = |text: &[u8]| events(text).unwrap_err().to_string();
        assert!(message(b"when,prompt_tokens\n1,2\n").contains("`arrival_s`"));
        let bad = b"arrival_s,prompt_tokens,completion_tokens\n0,1,1\n1,-5,1\n";
        assert_eq!(message(bad), "line 3: `-5` is not a whole number of tokens, at most 100,000,000,000");
        let huge = message(b"arrival_s,prompt_tokens,completion_tokens\n0,18446744073709551615,1\n");
        assert!(huge.contains("at most 100,000,000,000"), "{huge}");
        assert!(message(b"arrival_s,prompt_tokens,completion_tokens\nNaN,1,1\n").contains("`NaN`"));
        assert!(message(b"arrival_s,prompt_tokens,completion_tokens\n-1,1,1\n").contains("`-1`"));
    }

    #[test]
    fn an_empty_trace_has_no_columns() {
        assert!(matches!(events(b""), Err(TraceError::MissingColumn("arrival_s"))));
    }

    #[test]
    fn an_arrival_is_cut_to_the_millisecond() {
        for (text, expected) in [("59.9999", 59_999), ("60", 60_000), ("1e2", 100_000), ("0.5", 500)] {
            assert_eq!(millis(text.as_bytes()), Some(expected), "{text}");
        }
    }
}
