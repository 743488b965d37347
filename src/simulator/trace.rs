//! Reads traces.
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use crate::economics::{Capacity, PriceCard, Tier, Usage};

/// Per-slot sums before scaling.
#[derive(Debug, Clone, Default)]
pub struct RawSlot {
    pub pico: i128,
    pub work: u64,
    pub requests: u64,
    pub tokens: u64,
}

pub fn read(path: &Path, slot: Duration, cap: &Capacity, card: &PriceCard) -> anyhow::Result<Vec<RawSlot>> {
    let file = std::fs::File::open(path)?;
    let gz: Box<dyn Read> = if path.extension().is_some_and(|e| e == "gz") {
        Box::new(flate2::read::GzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut out: Vec<RawSlot> = Vec::new();
    for line in BufReader::new(gz).lines().skip(1) {
        let line = line?;
        let mut f = line.split(',');
        let a: f64 = f.next().unwrap_or("").parse()?;
        let i: u64 = f.next().unwrap_or("").parse()?;
        let o: u64 = f.next().unwrap_or("").parse()?;
        let u = Usage::new(i, o);
        let idx = (a / slot.as_secs_f64()) as usize;
        if out.len() <= idx {
            out.resize(idx + 1, RawSlot::default());
        }
        let p = card.prices(&u, Tier::Standard);
        let s = &mut out[idx];
        s.pico += p.input.times(i) + p.output.times(o);
        s.work += cap.work(&u).0;
        s.requests += 1;
        s.tokens += i + o;
    }
    Ok(out)
}
