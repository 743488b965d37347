//! Days and months of UTC.

use crate::config::BudgetPeriod;
use crate::economics::Timestamp;

/// The period around an instant: when it began, and when it ends. A lifetime has neither.
pub fn bounds(period: BudgetPeriod, now: Timestamp) -> (Timestamp, Option<Timestamp>) {
    let instant =
        i64::try_from(now.as_millis()).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    let today = jiff::tz::TimeZone::UTC.to_datetime(instant.unwrap_or_default()).date();
    let (first, next) = match period {
        BudgetPeriod::Day => (today, today.tomorrow()),
        BudgetPeriod::Month => (today.first_of_month(), today.last_of_month().tomorrow()),
        BudgetPeriod::Lifetime => return (Timestamp::ZERO, None),
    };
    (midnight(first).unwrap_or_default(), next.ok().and_then(midnight))
}

fn midnight(date: jiff::civil::Date) -> Option<Timestamp> {
    let instant = jiff::tz::TimeZone::UTC.to_timestamp(date.at(0, 0, 0, 0)).ok()?;
    u64::try_from(instant.as_millisecond()).ok().map(Timestamp::from_millis)
}

/// Its name in the configuration and on the command line.
pub const fn name(period: BudgetPeriod) -> &'static str {
    match period {
        BudgetPeriod::Day => "day",
        BudgetPeriod::Month => "month",
        BudgetPeriod::Lifetime => "lifetime",
    }
}

/// The period of a name.
pub fn named(name: &str) -> Option<BudgetPeriod> {
    [BudgetPeriod::Day, BudgetPeriod::Month, BudgetPeriod::Lifetime]
        .into_iter()
        .find(|period| self::name(*period) == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        let millis = text.parse::<jiff::Timestamp>().unwrap().as_millisecond();
        Timestamp::from_millis(u64::try_from(millis).unwrap())
    }

    #[test]
    fn days_and_months_are_those_of_utc_and_december_ends_with_the_year() {
        let now = at("2026-12-31T23:59:59.999Z");
        let new_year = at("2027-01-01T00:00:00Z");
        assert_eq!(bounds(BudgetPeriod::Day, now), (at("2026-12-31T00:00:00Z"), Some(new_year)));
        assert_eq!(bounds(BudgetPeriod::Month, now), (at("2026-12-01T00:00:00Z"), Some(new_year)));
        assert_eq!(bounds(BudgetPeriod::Lifetime, now), (Timestamp::ZERO, None));
        assert_eq!(bounds(BudgetPeriod::Day, new_year).0, new_year);
    }
}
