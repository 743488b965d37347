//! How long replicas turn out to take to start.
//!
//! The fleet keeps a moving average of what was measured. The policy is told of it in steps of more than a slot,
//! because a smaller difference changes no plan for the better; each step is in the ledger, so that its replay
//! gives the same decisions.

use std::time::Duration;

use super::pool::STARTUP_EVENT;
use crate::ledger::Event;

/// Watches one pool.
#[derive(Debug)]
pub(super) struct StartupWatch {
    applied: Duration,
}

impl StartupWatch {
    pub(super) fn new(startup: Duration) -> Self {
        Self { applied: startup }
    }

    /// What the policy is told.
    pub(super) fn applied(&self) -> Duration {
        self.applied
    }

    /// Applies what was measured when it is more than `slot` off what was applied last; says so for the ledger.
    pub(super) fn follow(&mut self, measured: Option<Duration>, slot: Duration) -> Option<String> {
        let measured = measured.filter(|measured| measured.abs_diff(self.applied) > slot)?;
        let seconds = format!("{:.3}", measured.as_secs_f64());
        self.applied = parse(&seconds)?;
        Some(format!("{seconds} s from the order"))
    }
}

/// The start-up time that an event of [`STARTUP_EVENT`] tells of.
pub fn startup_in(event: &Event) -> Option<Duration> {
    (event.kind == STARTUP_EVENT).then(|| parse(event.detail.split(' ').next()?))?
}

fn parse(seconds: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: Duration = Duration::from_mins(1);

    #[test]
    fn what_is_measured_is_applied_in_steps_of_more_than_a_slot() {
        let mut startup = StartupWatch::new(SLOT * 5);
        let mut follow = |seconds: u64| {
            startup.follow(Some(Duration::from_secs(seconds)), SLOT).map(|_| startup.applied().as_secs())
        };
        assert_eq!(follow(360), None);
        assert_eq!(follow(361), Some(361));
        // The average goes back and forth over the edge at which the first step was made.
        assert_eq!([359, 362, 420].map(&mut follow), [None; 3]);
        assert_eq!(follow(300), Some(300));
    }

    #[test]
    fn nothing_is_applied_until_something_was_measured() {
        let mut startup = StartupWatch::new(SLOT * 5);
        assert_eq!((startup.follow(None, SLOT), startup.applied()), (None, SLOT * 5));
    }

    #[test]
    fn an_event_tells_exactly_what_was_applied() {
        let mut startup = StartupWatch::new(Duration::ZERO);
        let detail = startup.follow(Some(Duration::from_nanos(516_123_456_789)), SLOT).unwrap();
        let event = |kind: &str| Event {
            at: crate::economics::Timestamp::ZERO,
            kind: kind.to_owned(),
            subject: "gpu".to_owned(),
            detail: detail.clone(),
        };
        assert_eq!(startup_in(&event(STARTUP_EVENT)), Some(startup.applied()));
        assert_eq!(startup_in(&event("capacity")), None);
    }
}
