//! The economics on whole traces: the optimum, the policies, and what must hold on any traffic.

use std::fs::File;
use std::time::Duration;

use breakeven::economics::adaptive::Adaptive;
use breakeven::economics::lcp::LazyCapacity;
use breakeven::economics::policy::policy_for;
use breakeven::economics::{
    Band, Billing, Capacity, NanoUsd, Policy, PolicyKind, PolicySettings, PoolSpec, PriceCard, Slot,
    Threshold, Timestamp, TokenPrice, Work,
};
use breakeven::simulator::engine::{self, Outcome};
use breakeven::simulator::hindsight::{Optimum, optimum};
use breakeven::simulator::{Demand, Tally, priced, trace};
use proptest::prelude::*;

const MINUTE: Duration = Duration::from_mins(1);

/// gpt-4o-mini against an 8B model on one H100.
fn pool() -> PoolSpec {
    PoolSpec {
        hourly: "2.99".parse().unwrap(),
        billing: Billing::WhileRunning,
        request_fee: NanoUsd::ZERO,
        capacity: Capacity {
            input_tokens_per_second: 15_000,
            output_tokens_per_second: 10_000,
            max_in_flight: 64,
        },
        startup: Duration::from_mins(5),
        minimum: MINUTE,
        max_replicas: 32,
    }
}

fn card(input: &str, output: &str) -> PriceCard {
    let price = |text| TokenPrice::from_usd_per_million(text).unwrap();
    PriceCard::flat(price(input), price(output))
}

/// A trace that the project carries, at a mean API bill of `rho` rents.
fn demand(name: &str, days: u64, rho: f64, pool: &PoolSpec, card: &PriceCard) -> Demand {
    let path = format!("{}/tests/data/traces/{name}.csv.gz", env!("CARGO_MANIFEST_DIR"));
    let mut tally = Tally::new(MINUTE);
    trace::read(File::open(path).unwrap(), |event| {
        tally.add(event.arrival, priced(card, &pool.capacity, &event.usage, event.requests))
    })
    .unwrap();
    let horizon = Some(Duration::from_hours(24 * days));
    tally.demand(tally.scale_for(rho, pool, horizon).unwrap(), horizon)
}

fn ratio(outcome: &Outcome, optimum: &Optimum) -> f64 {
    outcome.total().to_usd_f64() / optimum.total.to_usd_f64()
}

/// Geometric mean over rho 1, 3, 10 of a policy's cost over the optimum's.
fn mean_ratio(name: &str, days: u64, policy: impl Fn() -> Box<dyn Policy>) -> f64 {
    let logs = [1.0, 3.0, 10.0].map(|rho| {
        let demand = demand(name, days, rho, &pool(), &card("0.15", "0.60"));
        let pool = demand.capped(&pool());
        let outcome = engine::run(policy().as_mut(), &pool, &demand, Timestamp::ZERO);
        ratio(&outcome, &optimum(&pool, &demand)).ln()
    });
    (logs.iter().sum::<f64>() / 3.0).exp()
}

#[test]
fn the_optimum_is_known_to_the_cent() {
    for (name, dollars) in [
        ("sgfull_s31_diurnal_minutes", ["719.71", "1343.01", "3663.70"]),
        ("sgfull_l104_bursty_minutes", ["626.02", "1570.30", "5704.59"]),
    ] {
        for (rho, expected) in [1.0, 3.0, 10.0].into_iter().zip(dollars) {
            let demand = demand(name, 14, rho, &pool(), &card("0.15", "0.60"));
            let found = optimum(&demand.capped(&pool()), &demand);
            assert_eq!(
                (format!("{:.2}", found.total), found.exact),
                (expected.to_owned(), true),
                "{name} {rho}"
            );
        }
    }
}

#[test]
fn lazy_capacity_costs_what_the_reference_says() {
    for (name, days, expected) in [
        ("sgfull_s31_diurnal_minutes", 14, 1.035),
        ("sgfull_l104_bursty_minutes", 14, 1.220),
        ("sgfull_l20_campaign_minutes", 14, 1.503),
        ("sgfull_l91_drift_minutes", 14, 1.015),
        ("burstgpt_week1_minutes", 7, 1.185),
        ("syn_onoff30m_7d", 7, 1.427),
        ("syn_seed_ramp30d", 30, 1.003),
    ] {
        let found = mean_ratio(name, days, || Box::new(LazyCapacity::new(MINUTE)));
        assert!((found - expected).abs() < 0.002, "{name}: {found}");
    }
}

/// What was reached when this was written, and a thousandth: a change that costs more is seen here. Without
/// optimisation only the shortest is replayed.
#[test]
fn adaptive_does_not_get_worse_on_the_traces_it_is_judged_by() {
    let short = [("syn_onoff30m_7d", 7, 1.330)];
    let long = [
        ("sgfull_s31_diurnal_minutes", 14, 1.0235),
        ("sgfull_l104_bursty_minutes", 14, 1.1589),
        ("sgfull_l20_campaign_minutes", 14, 1.1899),
        ("sgfull_l91_drift_minutes", 14, 1.0143),
        ("burstgpt_week1_minutes", 7, 1.1247),
        ("syn_seed_ramp30d", 30, 1.003),
    ];
    let long = if cfg!(debug_assertions) { &[][..] } else { &long };
    for (name, days, most) in short.iter().chain(long) {
        let found = mean_ratio(name, *days, || Box::new(Adaptive::new(MINUTE)));
        assert!(found <= *most, "{name}: {found}");
    }
}

/// Before there is evidence the rule with a proof is followed, so a newcomer's first hours cost what it costs.
#[test]
fn the_first_hours_of_adaptive_cost_little_more_than_lazy_capacity() {
    let days = demand("sgfull_s31_diurnal_minutes", 2, 10.0, &pool(), &card("0.15", "0.60"));
    let (mut adaptive, mut lazy) = (0.0, 0.0);
    for hours in days.slots.chunks_exact(3 * 60).step_by(2) {
        let demand = Demand::new(MINUTE, hours.to_vec());
        let pool = demand.capped(&pool());
        let cost = |policy: &mut dyn Policy| {
            engine::run(policy, &pool, &demand, Timestamp::ZERO).total().to_usd_f64()
        };
        adaptive += cost(&mut Adaptive::new(MINUTE));
        lazy += cost(&mut LazyCapacity::new(MINUTE));
    }
    assert!(adaptive < 1.03 * lazy, "{adaptive} {lazy}");
}

#[test]
fn a_dear_model_on_two_slow_machines_stays_below_twice_the_optimum() {
    let pool = PoolSpec {
        hourly: "5.98".parse().unwrap(),
        capacity: Capacity {
            input_tokens_per_second: 10_000,
            output_tokens_per_second: 2_000,
            max_in_flight: 64,
        },
        startup: Duration::from_mins(10),
        ..pool()
    };
    for rho in [0.3, 1.0, 3.0] {
        let demand = demand("syn_onoff30m_7d", 7, rho, &pool, &card("2.50", "10.00"));
        let pool = demand.capped(&pool);
        let outcome = engine::run(&mut Adaptive::new(MINUTE), &pool, &demand, Timestamp::ZERO);
        let found = ratio(&outcome, &optimum(&pool, &demand));
        assert!(found < 2.0, "rho {rho}: {found}");
    }
}

#[test]
fn a_machine_that_can_never_pay_is_never_started() {
    let dear = PoolSpec { hourly: "29.90".parse().unwrap(), ..pool() };
    let demand = demand("sgfull_s31_diurnal_minutes", 14, 1.0, &dear, &card("0.15", "0.60"));
    assert!(demand.kappa(&dear).unwrap() < 1.0);
    let pool = demand.capped(&dear);
    for policy in [
        &mut Adaptive::new(MINUTE) as &mut dyn Policy,
        policy_for(&PolicyKind::Cheapest, &PolicySettings::default()).as_mut(),
    ] {
        let outcome = engine::run(policy, &pool, &demand, Timestamp::ZERO);
        assert_eq!((outcome.starts, outcome.total()), (0, demand.api_cost()), "{}", policy.name());
    }
}

/// A week in which output, which pays a full replica, and input, which does not, take turns for so many minutes each.
/// On average a full replica would lose.
fn turns(pool: &PoolSpec, replicas: u64, mut lengths: impl FnMut() -> [usize; 2]) -> Demand {
    let call = |input: u64, output: u64| {
        let usage = breakeven::economics::Usage::new(input * 60 * replicas, output * 60 * replicas);
        priced(&card("0.15", "0.60"), &pool.capacity, &usage, 1)
    };
    let kinds = [call(0, 10_000), call(15_000, 0)];
    let turn = |_| kinds.into_iter().zip(lengths()).flat_map(|(kind, length)| vec![kind; length]);
    let demand = Demand::new(MINUTE, (0..).flat_map(turn).take(7 * 1440).collect());
    assert!(demand.kappa(pool).unwrap() < 1.0);
    demand
}

#[test]
fn traffic_that_only_pays_at_times_costs_at_most_a_start_a_day_more_than_the_api() {
    let at = |hourly: &str| PoolSpec { hourly: hourly.parse().unwrap(), ..pool() };
    let random = |most: [usize; 2], seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        move || most.map(|most| random.usize(1..=most))
    };
    let mut starts = 0;
    for (pool, replicas, lengths) in [
        (at("18"), 2, Box::new(|| [120_usize, 600]) as Box<dyn FnMut() -> [usize; 2]>),
        (at("14"), 5, Box::new(|| [120_usize, 600])),
        (at("12"), 2, Box::new(random([14, 40], 2))),
        (at("12"), 5, Box::new(random([20, 120], 0))),
    ] {
        let demand = turns(&pool, replicas, lengths);
        let pool = demand.capped(&pool);
        let outcome = engine::run(&mut Adaptive::new(MINUTE), &pool, &demand, Timestamp::ZERO);
        let start_a_day = demand.slot_rent(&pool).mul_div_floor(7 * 5, 1);
        let most = demand.api_cost() + start_a_day;
        assert!(outcome.total() <= most, "{} > {most}, {} starts", outcome.total(), outcome.starts);
        starts += outcome.starts;
    }
    assert!(starts > 0, "what has not lost anything is tried");
}

#[test]
fn what_is_paid_by_use_is_held_while_it_is_cheaper() {
    let by_use = |hourly: &str| {
        let pool =
            PoolSpec { billing: Billing::PerUse, hourly: hourly.parse().unwrap(), max_replicas: 2, ..pool() };
        let demand = demand("syn_onoff30m_7d", 7, 3.0, &pool, &card("0.15", "0.60"));
        let pool = demand.capped(&pool);
        let outcome = engine::run(&mut Adaptive::new(MINUTE), &pool, &demand, Timestamp::ZERO);
        (ratio(&outcome, &optimum(&pool, &demand)), outcome.starts)
    };
    let (found, _) = by_use("2.99");
    assert!(found < 1.03, "{found}");
    assert_eq!(by_use("29.90"), (1.0, 0));
}

/// Slots of a minute with that many dollars of API bill and replica-seconds of work, in thousandths.
fn slots(worth: &[(u32, u32)]) -> Demand {
    let slot = |(dollars, seconds): &(u32, u32)| Slot {
        api_cost: NanoUsd::from_nanos(i64::from(*dollars) * 1_000_000),
        work: Work(u64::from(*seconds) * 1000),
        requests: 1,
        tokens: 1,
    };
    Demand::new(MINUTE, worth.iter().map(slot).collect())
}

/// The cheapest of all sequences of fleets that never stop and restart within the minimum, by trying each.
fn brute_force(pool: &PoolSpec, demand: &Demand) -> NanoUsd {
    let horizon = demand.slots.len();
    let choices = pool.max_replicas + 1;
    (0..choices.pow(u32::try_from(horizon).unwrap()))
        .map(|code| {
            let mut rest = code;
            let targets = (0..horizon).map(|_| {
                let target = rest % choices;
                rest /= choices;
                target
            });
            engine::run(&mut Scripted(targets.collect(), 0), pool, demand, Timestamp::ZERO).total()
        })
        .min()
        .unwrap()
}

/// Follows a schedule.
struct Scripted(Vec<u32>, usize);

impl Policy for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn decide(
        &mut self,
        _: &PoolSpec,
        _: Timestamp,
        _: &Slot,
        _: breakeven::economics::Fleet,
    ) -> breakeven::economics::Decision {
        self.1 += 1;
        breakeven::economics::Decision::hold(self.0[self.1 - 1], breakeven::economics::Reason::Pinned)
    }
}

fn any_pool() -> impl Strategy<Value = PoolSpec> {
    (0_u64..3, 0_u64..6, 1_u32..3).prop_map(|(startup, minimum, max_replicas)| PoolSpec {
        startup: MINUTE * u32::try_from(startup).unwrap(),
        minimum: MINUTE * u32::try_from(minimum).unwrap(),
        max_replicas,
        ..pool()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_optimum_is_that_of_trying_everything(
        pool in any_pool(), worth in prop::collection::vec((0_u32..400, 0_u32..150_000), 1..7)
    ) {
        let demand = slots(&worth);
        let (found, tried) = (optimum(&pool, &demand), brute_force(&pool, &demand));
        prop_assert!(found.total <= tried, "{found:?} {tried}");
        if found.exact {
            // Each slot's floors may differ by a nano-dollar between fleets.
            prop_assert!((tried - found.total).as_nanos() <= 20, "{found:?} {tried}");
        }
    }
}

/// Traffic in phases, with noise.
fn phases() -> impl Strategy<Value = Vec<(u32, u32)>> {
    prop::collection::vec((0_u32..600, 1_usize..60, 0_u32..100), 1..12).prop_map(|phases| {
        let slots = |(level, length, noise): (u32, usize, u32)| {
            (0..length).map(move |slot| {
                let wobble = u32::try_from(slot * 37 % 101).unwrap() * noise / 100;
                let level = level + wobble;
                (level, level * 250)
            })
        };
        phases.into_iter().flat_map(slots).collect()
    })
}

/// Machines of any rent and any way to pay it, with times of up to two hours, and the length of a slot.
fn any_machine() -> impl Strategy<Value = (PoolSpec, Duration)> {
    let billing = [Billing::WhileRunning, Billing::WhileRunning, Billing::Committed, Billing::PerUse];
    let seconds = |most: &'static [u64]| prop::sample::select(most).prop_map(Duration::from_secs);
    (
        prop::sample::select(&["0.50", "2.99", "6.00", "20.00"][..]),
        prop::sample::select(billing.to_vec()),
        prop::sample::select(&[0_i64, 0, 1_000_000, 100_000_000][..]),
        seconds(&[0, 30, 60, 300, 1800]),
        seconds(&[0, 60, 61, 600, 3600, 7200]),
        0_u32..6,
        seconds(&[10, 60, 300]),
    )
        .prop_map(|(hourly, billing, fee, startup, minimum, max_replicas, slot)| {
            let request_fee = NanoUsd::from_nanos(fee);
            let hourly = hourly.parse().unwrap();
            (PoolSpec { hourly, billing, request_fee, startup, minimum, max_replicas, ..pool() }, slot)
        })
}

/// All policies that the simulator knows.
fn every_policy(settings: &PolicySettings) -> Vec<Box<dyn Policy>> {
    let band = Band { up: 70.0, down: 60.0 };
    let threshold = Threshold { usd_per_day: Some(band), ..Threshold::default() };
    let kinds = [
        PolicyKind::Api,
        PolicyKind::Threshold(threshold),
        PolicyKind::Cheapest,
        PolicyKind::Adaptive,
        PolicyKind::SelfHosted,
        PolicyKind::Split { self_hosted_share: 0.5 },
    ];
    let lazy: Box<dyn Policy> = Box::new(LazyCapacity::new(settings.slot));
    kinds.iter().map(|kind| policy_for(kind, settings)).chain([lazy]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 100 } else { 1000 }))]

    #[test]
    fn no_policy_costs_less_than_the_optimum((machine, slot) in any_machine(), worth in phases(), is_capped: bool) {
        let demand = Demand { slot, ..slots(&worth) };
        let pool = if is_capped { demand.capped(&machine) } else { machine };
        let best = optimum(&pool, &demand);
        let settings = PolicySettings { slot, ..PolicySettings::default() };
        let run = |mut policy: Box<dyn Policy>| engine::run(policy.as_mut(), &pool, &demand, Timestamp::ZERO);
        let outcomes = every_policy(&settings).into_iter().map(run);
        for outcome in outcomes.chain([engine::best_fixed(&pool, &demand)]) {
            prop_assert!(outcome.total() >= best.total, "{}: {} < {}", outcome.name, outcome.total(), best.total);
            prop_assert_eq!(outcome.api_requests + outcome.self_hosted_requests, demand.arrivals.iter().sum::<u64>());
            prop_assert!(outcome.slots.iter().all(|slot| slot.target <= pool.max_replicas));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn lazy_capacity_without_delay_is_within_three_times(worth in phases()) {
        let demand = slots(&worth);
        let pool = demand.capped(&PoolSpec { startup: Duration::ZERO, minimum: Duration::ZERO, ..pool() });
        let best = optimum(&pool, &demand);
        let outcome = engine::run(&mut LazyCapacity::new(MINUTE), &pool, &demand, Timestamp::ZERO);
        // The theorem's policy knows the slot that it decides for. Ours knows a slot when it is over, so each
        // start misses one slot of API cost, and each stop pays one slot of rent.
        let dearest: NanoUsd = demand.slots.iter().map(|slot| slot.api_cost).max().unwrap();
        // A layer is started on gains that exceeded its rent by a slot's rent since it was stopped.
        let on_starts = demand.slot_rent(&pool).mul_div_floor(outcome.starts, 1);
        prop_assert!(on_starts <= demand.api_cost(), "{} starts", outcome.starts);
        let known_late = (dearest + demand.slot_rent(&pool)).mul_div_floor(outcome.starts + 1, 1);
        let bound = best.total.mul_div_floor(3, 1) + known_late;
        prop_assert!(outcome.total() <= bound, "{} > {bound}", outcome.total());
    }
}

/// A steady volume, in hundredths of the rent of one replica, with noise that is a share of it.
fn steady(hundredths: u32, minutes: usize, noise: impl Fn(usize) -> f64) -> Demand {
    let rent = 2.99 / 60.0;
    let slot = |minute| {
        let usd = rent * f64::from(hundredths) / 100.0 * (1.0 + noise(minute));
        Slot {
            api_cost: NanoUsd::from_usd_f64_estimate(usd),
            work: Work::from_replica_seconds(10),
            requests: 10,
            tokens: 10,
        }
    };
    Demand::new(MINUTE, (0..minutes).map(slot).collect())
}

#[test]
fn cheapest_holds_what_the_closed_form_says_outside_a_band_of_five_percent() {
    let settings = PolicySettings { margin: 0.0, ..PolicySettings::default() };
    for hundredths in (1..=300).filter(|hundredths| !(95..=105).contains(hundredths)) {
        // Four machines of different rent at each volume: over a thousand points.
        for (hourly, scale) in [("2.99", 100), ("5.98", 200), ("1.495", 50), ("29.90", 1000)] {
            let demand = steady(hundredths * scale / 100, 1500, |_| 0.0);
            let pool = PoolSpec { hourly: hourly.parse().unwrap(), max_replicas: 1, ..pool() };
            let outcome = engine::run(
                policy_for(&PolicyKind::Cheapest, &settings).as_mut(),
                &pool,
                &demand,
                Timestamp::ZERO,
            );
            let held = outcome.slots.last().unwrap().target;
            assert_eq!(held, u32::from(hundredths > 100), "{hundredths} at {hourly}");
        }
    }
}

#[test]
fn noise_of_a_fifth_around_break_even_changes_the_fleet_at_most_twice_a_day() {
    let pool = PoolSpec { max_replicas: 1, ..pool() };
    for (seed, every) in (0..20).flat_map(|seed| [1, 10, 60].map(|every| (seed, every))) {
        let noise = |minute: usize| {
            let mut random = fastrand::Rng::with_seed(seed * 1000 + u64::try_from(minute / every).unwrap());
            random.f64() * 0.4 - 0.2
        };
        let demand = steady(100, 1440, noise);
        let mut policy = policy_for(&PolicyKind::Cheapest, &PolicySettings::default());
        let outcome = engine::run(policy.as_mut(), &pool, &demand, Timestamp::ZERO);
        let changes = outcome.slots.windows(2).filter(|pair| pair[0].target != pair[1].target).count();
        assert!(changes <= 2, "seed {seed}, noise every {every} minutes: {changes} changes");
    }
}

#[test]
fn nothing_costs_nothing() {
    let demand = Demand::new(MINUTE, vec![Slot::default(); 100]);
    for kind in [PolicyKind::Adaptive, PolicyKind::Cheapest, PolicyKind::Api] {
        let outcome = engine::run(
            policy_for(&kind, &PolicySettings::default()).as_mut(),
            &pool(),
            &demand,
            Timestamp::ZERO,
        );
        assert_eq!((outcome.total(), outcome.starts), (NanoUsd::ZERO, 0), "{kind:?}");
    }
}

#[test]
fn a_machine_that_is_paid_anyway_serves_at_any_volume() {
    let pool = PoolSpec { billing: Billing::Committed, max_replicas: 1, ..pool() };
    let demand = steady(3, 60, |_| 0.0);
    let outcome = engine::run(
        policy_for(&PolicyKind::Cheapest, &PolicySettings::default()).as_mut(),
        &pool,
        &demand,
        Timestamp::ZERO,
    );
    assert_eq!((outcome.api, outcome.total()), (NanoUsd::ZERO, demand.slot_rent(&pool).mul_div_floor(60, 1)));
}

#[test]
fn pinned_to_the_api_nothing_is_served_by_what_is_paid_anyway() {
    let pool = PoolSpec { billing: Billing::Committed, max_replicas: 2, ..pool() };
    let demand = steady(3, 60, |_| 0.0);
    let mut policy = policy_for(&PolicyKind::Api, &PolicySettings::default());
    let outcome = engine::run(policy.as_mut(), &pool, &demand, Timestamp::ZERO);
    let rent = demand.slot_rent(&pool).mul_div_floor(120, 1);
    assert_eq!((outcome.api, outcome.rent), (demand.api_cost(), rent));
    assert_eq!((outcome.self_hosted_requests, outcome.slots[30].ready), (0, 0));
}

#[test]
fn the_same_trace_gives_the_same_run() {
    let demand = demand("syn_onoff30m_7d", 7, 1.0, &pool(), &card("0.15", "0.60"));
    let pool = demand.capped(&pool());
    let run = || engine::run(&mut Adaptive::new(MINUTE), &pool, &demand, Timestamp::ZERO);
    assert_eq!(run(), run());
}
