//! Fairness while places are scarce: one caller's flood leaves room for the others.
//!
//! A caller may hold at most `s / (1 − s)` times the places that are free, as switches share their buffers:
//! dynamic thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998. Of `n` callers
//! that flood, each comes to hold the share `s / (1 − s + n s)` of all places: a single one holds `s`, two hold
//! nearly a half each, and some places always stay free for whoever comes next. Nothing is set aside for
//! callers that are not there, and nothing is configured for each.
//!
//! Callers are counted in two rows of counters under a keyed hash, and the smaller of both counts is taken (a
//! count-min sketch): no lock, no growth, and no client can choose with whom it shares a counter.

use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Counters of a row: with as many callers at once, one in some sixty thousand shares both of its counters with
/// a given other one.
const COUNTERS: usize = 256;

/// Who is counted: the best that is known of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity<'a> {
    /// Public id of a virtual key.
    Key(&'a str),
    /// Credentials that somebody else checks.
    Credential(&'a [u8]),
    Address(IpAddr),
}

impl Identity<'_> {
    /// An address as far as it tells callers apart: whoever has one of IPv6 has 2⁶⁴ of them.
    pub fn address(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                Self::Address(IpAddr::V6(network.into()))
            }
            address @ IpAddr::V4(_) => Self::Address(address),
        }
    }
}

/// What each caller holds of one kind of places.
#[derive(Debug)]
pub struct Shares {
    rows: [[AtomicU32; COUNTERS]; 2],
    hasher: RandomState,
}

impl Default for Shares {
    fn default() -> Self {
        let row = || std::array::from_fn(|_| AtomicU32::new(0));
        Self { rows: [row(), row()], hasher: RandomState::new() }
    }
}

impl Shares {
    /// Counts a caller in, unless it holds its share already. `free`: places that nobody holds, the one it asks
    /// for included; `share`: of all places, for a caller that is alone.
    pub fn enter(self: &Arc<Self>, who: Identity<'_>, free: usize, share: f64) -> Option<Held> {
        let held = Held { columns: self.columns(who), shares: self.clone() };
        let counts = held.counters().map(|counter| counter.fetch_add(1, Ordering::Relaxed));
        // Dropping `held` takes it back.
        may_hold_another(counts[0].min(counts[1]), free, share).then_some(held)
    }

    fn columns(&self, who: Identity<'_>) -> [usize; 2] {
        let [first, second, ..] = self.hasher.hash_one(who).to_le_bytes();
        [usize::from(first), usize::from(second)]
    }
}

fn may_hold_another(holds: u32, free: usize, share: f64) -> bool {
    // In thousandths, because the places of a small proxy are counted one by one.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1000")]
    let share = (share.clamp(0.0, 1.0) * 1000.0).round() as u64;
    u64::from(holds) * (1000 - share) < share.saturating_mul(free as u64)
}

/// A place that a caller holds, counted out on drop.
#[derive(Debug)]
pub struct Held {
    shares: Arc<Shares>,
    columns: [usize; 2],
}

impl Held {
    fn counters(&self) -> [&AtomicU32; 2] {
        [&self.shares.rows[0][self.columns[0]], &self.shares.rows[1][self.columns[1]]]
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for counter in self.counters() {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lets callers take places in turns until none gets one any more. How many each has.
    fn flood(places: usize, callers: usize, share: f64) -> Vec<usize> {
        let mut holds = vec![0; callers];
        loop {
            let before = holds.clone();
            for caller in 0..callers {
                let free = places - holds.iter().sum::<usize>();
                if free > 0 && may_hold_another(u32::try_from(holds[caller]).unwrap(), free, share) {
                    holds[caller] += 1;
                }
            }
            if holds == before {
                return holds;
            }
        }
    }

    #[test]
    fn a_caller_that_is_alone_holds_its_share_and_several_hold_equal_parts() {
        assert_eq!(flood(1000, 1, 0.9), [900]);
        assert_eq!(flood(1000, 2, 0.9), [474, 474]);
        assert_eq!(flood(1000, 4, 0.9), [244, 243, 243, 243]);
        assert_eq!(flood(2, 1, 0.9), [2], "few places are not left empty");
        assert_eq!(flood(1000, 1, 1.0), [1000], "a share of 1 leaves all to who comes first");
    }

    #[test]
    fn who_comes_after_a_flood_gets_in_and_places_come_back() {
        let shares = Arc::new(Shares::default());
        let (flooder, other) = (Identity::Key("flooder"), Identity::Credential(b"other"));
        let mut held = Vec::new();
        while let Some(one) = shares.enter(flooder, 100 - held.len(), 0.9) {
            held.push(one);
        }
        assert_eq!(held.len(), 90);
        held.extend(shares.enter(other, 10, 0.9));
        assert_eq!(held.len(), 91);
        assert!(shares.enter(flooder, 9, 0.9).is_none());
        drop(held);
        assert!(shares.rows.iter().flatten().all(|counter| counter.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn addresses_of_one_network_of_ipv6_are_one_caller() {
        let of = |text: &str| Identity::address(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    proptest! {
        #[test]
        fn equal_floods_hold_equal_parts_and_leave_room(
            places in 1_usize..5_000, callers in 1_usize..9, thousandths in 100_u32..990,
        ) {
            let share = f64::from(thousandths) / 1000.0;
            let holds = flood(places, callers, share);
            let (most, least) = (holds.iter().max().unwrap(), holds.iter().min().unwrap());
            prop_assert!(most - least <= 1, "{holds:?}");
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let (n, part) = (callers as f64, *most as f64 / places as f64);
            let fair = share / (1.0 - share + n * share);
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let rounding = 2.0 / places as f64;
            prop_assert!((part - fair).abs() <= rounding, "{part} instead of {fair}");
        }
    }
}
