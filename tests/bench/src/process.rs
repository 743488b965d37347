//! CPU time and memory of a process and its descendants, from `/proc`.

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

/// The process and everything it started.
pub fn tree(root: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: BTreeMap<u32, u32> = pids.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let above = found[next];
        found.extend(parents.iter().filter(|(_, parent)| **parent == above).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = &stat[stat.rfind(')')? + 2..];
    after_name.split_whitespace().nth(1)?.parse().ok()
}

/// Nanoseconds on a CPU since the start, by live threads.
pub fn cpu_ns(pids: &[u32]) -> u64 {
    let tasks = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten());
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|schedstat| schedstat.split(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// Resident kilobytes.
pub fn resident_kb(pids: &[u32]) -> u64 {
    let status = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/status")).ok();
    let resident = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    pids.iter().filter_map(status).filter_map(resident).sum()
}

/// Share of a core that the hypervisor gave to others, in clock ticks since boot.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Core {
    pub busy_ticks: u64,
    pub stolen_ticks: u64,
}

pub fn core(index: usize) -> Core {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix(&format!("cpu{index} "))).unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let at = |field: usize| ticks.get(field).copied().unwrap_or(0);
    // user, nice, system, idle, iowait, irq, softirq, steal
    Core { busy_ticks: at(0) + at(1) + at(2) + at(5) + at(6), stolen_ticks: at(7) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_time() {
        let pids = tree(std::process::id());
        assert!(resident_kb(&pids) > 100);
        assert!(cpu_ns(&pids) > 0);
    }
}
