//! Replicas whose addresses are those of a name: which address is which replica.
//!
//! A replica keeps its address while the name has it. One whose address is gone has no calls to get, and a new
//! address goes to the replica that has waited for one longest. While we decide, an address that no replica waits
//! for is left alone: a rolling update has one more pod for a while.

use std::net::SocketAddr;
use std::time::Duration;

use super::super::event::FleetEventKind;
use super::super::slot::Phase;
use super::{Action, Roster};
use crate::economics::Timestamp;

/// How often a name is resolved: what has gone gets no new calls after this and the cache of the resolvers.
pub const DNS_INTERVAL: Duration = Duration::from_secs(5);

/// When the name is asked for its addresses.
#[derive(Debug)]
pub(super) struct Discovery {
    at: Timestamp,
    is_resolving: bool,
    /// It is known, and told, that there are more addresses than replicas.
    is_crowded: bool,
}

impl Discovery {
    pub(super) fn new(now: Timestamp) -> Self {
        Self { at: now, is_resolving: false, is_crowded: false }
    }
}

impl Roster {
    pub(super) fn resolve(&mut self, now: Timestamp, actions: &mut Vec<Action>) {
        if let Some(discovery) = &mut self.discovery
            && !discovery.is_resolving
            && discovery.at <= now
        {
            discovery.is_resolving = true;
            discovery.at = now + DNS_INTERVAL;
            actions.push(Action::Resolve);
        }
    }

    /// Hears which addresses the name has. None when it could not be resolved, which a name without addresses
    /// cannot be either: what is known stays, and its probes show whether it is still there.
    pub(super) fn resolved(&mut self, found: Option<&[SocketAddr]>, now: Timestamp) {
        if let Some(discovery) = &mut self.discovery {
            discovery.is_resolving = false;
        }
        if let Some(found) = found {
            for index in 0..self.slots.len() {
                if self.slots[index].replica.address().is_some_and(|address| !found.contains(&address)) {
                    self.departed(index, now);
                }
            }
            self.place(found, now);
        }
        for slot in &mut self.slots {
            if slot.phase == Phase::Unknown && !slot.replica.has_address() {
                slot.enter(Phase::Stopped);
            }
        }
    }

    fn place(&mut self, found: &[SocketAddr], now: Timestamp) {
        let mut homeless = 0;
        for address in found {
            if self.slots.iter().any(|slot| slot.replica.address() == Some(*address)) {
                continue;
            }
            match self.place_for_an_address() {
                Some(index) => {
                    let slot = &mut self.slots[index];
                    slot.replica.set_address(Some(*address));
                    slot.order += 1;
                    slot.probe_at = now;
                    slot.bad_probes = 0;
                }
                None => homeless += 1,
            }
        }
        let is_crowded = homeless > 0 && !self.decides();
        let Some(discovery) = &mut self.discovery else { return };
        let was_crowded = std::mem::replace(&mut discovery.is_crowded, is_crowded);
        if is_crowded && !was_crowded {
            self.tell(0, FleetEventKind::Crowded { addresses: found.len() });
        }
    }

    fn place_for_an_address(&self) -> Option<usize> {
        let decides = self.decides();
        let rank = |index: &usize| match self.slots[*index].phase {
            Phase::Starting { ordered_at } => Some((0, ordered_at, *index)),
            Phase::Unknown => Some((1, Timestamp::ZERO, *index)),
            Phase::Stopped if !decides => Some((2, Timestamp::ZERO, *index)),
            _ => None,
        };
        self.select(|slot| !slot.replica.has_address())
            .into_iter()
            .filter_map(|index| rank(&index))
            .min()
            .map(|(_, _, index)| index)
    }

    fn departed(&mut self, index: usize, now: Timestamp) {
        let decides = self.decides();
        let slot = &mut self.slots[index];
        slot.replica.set_address(None);
        // A probe that is under way is about an address that is no longer ours.
        slot.order += 1;
        match slot.phase {
            // The workload replaces it, as long as its count says so.
            Phase::Ready { .. } if decides => {
                slot.enter(Phase::Starting { ordered_at: now });
                self.tell(index, FleetEventKind::Departed);
            }
            Phase::Ready { .. } => {
                self.close_rent(index, now);
                self.slots[index].enter(Phase::Stopped);
                self.tell(index, FleetEventKind::Departed);
            }
            Phase::Draining { .. } => {
                slot.enter(Phase::Stopping { ordered: false, failures: 0, retry_at: now, clean_up: false });
            }
            Phase::Unknown | Phase::Stopped | Phase::Starting { .. } | Phase::Stopping { .. } => {}
        }
    }
}
