//! What the same usage would have cost elsewhere.
//!
//! Savings are against buying everything from the API. The rent of idle replicas counts in full, so they can
//! be negative, and are shown so.

use super::NanoUsd;

/// What was spent over a time, and the two ways of not choosing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spend {
    /// API charges of the calls that were served there.
    pub api: NanoUsd,
    /// Rent of all replicas, busy or idle, and fees paid per request.
    pub rent: NanoUsd,
    /// Every call at the API's price.
    pub all_api: NanoUsd,
    /// Every call on replicas held all the time, enough of them for the work; what would not fit at API price.
    pub all_self_hosted: NanoUsd,
}

impl Spend {
    pub fn actual(&self) -> NanoUsd {
        self.api + self.rent
    }

    /// Positive when choosing was cheaper than buying everything.
    pub fn net_savings(&self) -> NanoUsd {
        self.all_api - self.actual()
    }

    /// Positive when choosing was cheaper than renting for everything.
    pub fn against_self_hosted(&self) -> NanoUsd {
        self.all_self_hosted - self.actual()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_replica_makes_savings_negative() {
        let usd = |text: &str| text.parse::<NanoUsd>().unwrap();
        let spend =
            Spend { api: usd("1"), rent: usd("2.99"), all_api: usd("1.50"), all_self_hosted: usd("2.99") };
        assert_eq!(spend.net_savings(), usd("-2.49"));
        assert_eq!(spend.against_self_hosted(), usd("-1"));
    }
}
