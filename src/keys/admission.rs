//! What a call has been let in with: it holds the most that it can cost and use, and settles what it did.

use std::sync::Arc;

use super::account::{Account, Hold, Spent};
use super::rate::RateView;
use super::{Key, Keys};
use crate::config::WhenSpent;
use crate::economics::{NanoUsd, Timestamp};

/// Holds of one call. Dropped without a settlement, it gives everything back.
#[derive(Debug, Default)]
pub struct Admission {
    holds: Vec<Hold>,
    tokens: Option<TokenHold>,
}

#[derive(Debug)]
struct TokenHold {
    key: Arc<Key>,
    taken: u64,
    at: Timestamp,
}

/// The bounds of a call before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The most that it can cost where it is dearest.
    pub cost: NanoUsd,
    /// Input and output tokens.
    pub tokens: u64,
}

/// Why a call is not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAdmitted {
    Budget { name: String, spent: Spent },
    Tokens { wait: std::time::Duration, limits: Limits },
}

/// The limits of a key as they stand, for the `x-ratelimit-*` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub requests: Option<RateView>,
    pub tokens: Option<RateView>,
}

impl Keys {
    /// Lets a call in, or says why not. A refusal beside the admission: a budget is spent that leaves the cheaper
    /// backend, so the call may go to self-hosted backends, and is refused where there is none.
    pub fn admit(
        &self,
        key: Option<&Arc<Key>>,
        (team, route): (&str, &str),
        bounds: Bounds,
        now: Timestamp,
    ) -> Result<(Admission, Option<NotAdmitted>), NotAdmitted> {
        let mut admission = Admission::default();
        let (mut restriction, mut refusal) = (None, None);
        self.accounts_of(key.map(AsRef::as_ref), team, route, |account| {
            match account.hold(bounds.cost, now) {
                Ok(hold) => admission.holds.push(hold),
                Err(spent) if account.budget.when_spent == WhenSpent::CheaperBackend => {
                    restriction = Some(refused(account, spent));
                    // What the cheaper backend costs is still counted.
                    admission.holds.push(Hold::of_nothing(account));
                }
                Err(spent) => refusal = Some(refused(account, spent)),
            }
        });
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        if let Some((key, rate)) = key.and_then(|key| Some((key, key.tokens.as_ref()?))) {
            let taken = rate.take(bounds.tokens, now);
            taken.map_err(|wait| NotAdmitted::Tokens { wait, limits: key.limits(now) })?;
            admission.tokens = Some(TokenHold { key: key.clone(), taken: bounds.tokens, at: now });
        }
        Ok((admission, restriction))
    }

    /// For what was bought before, and is read now: it is charged if it was not, and never refused.
    pub fn admit_bought(&self, key: Option<&Key>, team: &str) -> Admission {
        let mut admission = Admission::default();
        self.accounts_of(key, team, "", |account| admission.holds.push(Hold::of_nothing(account)));
        admission
    }
}

fn refused(account: &Account, spent: Spent) -> NotAdmitted {
    NotAdmitted::Budget { name: account.budget.name.clone(), spent }
}

impl Admission {
    /// Charges what the call did cost and use, and gives back the rest.
    pub fn settle(&mut self, cost: NanoUsd, tokens: u64, now: Timestamp) {
        for hold in self.holds.drain(..) {
            hold.settle(cost, now);
        }
        if let Some(mut hold) = self.tokens.take() {
            hold.settle(tokens, now);
        }
    }

    /// That of a part of a call which is billed by itself: it holds nothing, and charges what it settles.
    #[must_use]
    pub fn part(&self) -> Self {
        Self {
            holds: self.holds.iter().map(|hold| Hold::of_nothing(hold.account())).collect(),
            tokens: self.tokens.as_ref().map(|hold| TokenHold {
                key: hold.key.clone(),
                taken: 0,
                at: hold.at,
            }),
        }
    }
}

impl TokenHold {
    fn settle(&mut self, used: u64, now: Timestamp) {
        if let Some(rate) = &self.key.tokens {
            rate.correct(self.taken, used, now);
        }
        self.taken = 0;
    }
}

impl Drop for TokenHold {
    fn drop(&mut self) {
        if self.taken > 0 {
            let at = self.at;
            self.settle(0, at);
        }
    }
}

impl Key {
    pub fn limits(&self, now: Timestamp) -> Limits {
        Limits {
            requests: self.requests.as_ref().map(|rate| rate.view(now)),
            tokens: self.tokens.as_ref().map(|rate| rate.view(now)),
        }
    }

    /// Whether it may use a route; a key for certain routes may not use models that are on none.
    pub fn may_use_route(&self, route: &str) -> bool {
        self.record.routes.is_empty() || self.record.routes.iter().any(|name| name == route)
    }

    pub fn may_use_backend(&self, backend: &str) -> bool {
        self.record.backends.is_empty() || self.record.backends.iter().any(|name| name == backend)
    }
}
