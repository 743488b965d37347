//! How this proxy meets the others: tells them what it has seen and used, hears what they have, and knows who
//! plans.
//!
//! A task of its own makes an exchange every `shared.refresh`. The request path and the planner read what came
//! of the last one, and wait for none.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::volume::SharedVolume;
use super::{Gateway, Pool};
use crate::config;
use crate::economics::time::millis;
use crate::economics::{Slot, Timestamp};
use crate::keys::Key;
use crate::keys::account::Account;
use crate::keys::rate::{Rate, Standing};
use crate::shared::lease::{Beat, Booked, Wish, validity};
use crate::shared::rates::Unit;
use crate::shared::replicas::ReplicaNews;
use crate::shared::{Exchange, Identity, Link, SharedError, Store, budgets, rates};

/// Pauses before the next attempt to connect; the longest is within a takeover's ten seconds.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);
/// Slots of volume are kept for so long, or as long as the policy's window if that is longer.
const KEPT: Duration = Duration::from_hours(6);
/// And so many of them at most.
const MOST_SLOTS: u32 = 10_000;
/// Slots before the present one that are still exchanged, for clocks that differ and calls that add up late.
const RECENT_SLOTS: u64 = 3;
/// Slots asked for at once when catching up.
const SLOTS_AT_ONCE: u64 = 500;
/// Budgets and limits that have not changed are claimed in one of so many exchanges.
const IDLE_ROUNDS: usize = 2;
/// Claims in one exchange; more wait for the next.
const MOST_CLAIMS: usize = 1000;
/// An exchange is late for the planner after so many intervals.
const SETTLING_ROUNDS: u32 = 3;
/// What was said of a replica has come back as an answer after so many intervals.
const ROUND_TRIP_ROUNDS: u32 = 4;
/// A clock may differ from Redis's by this part of a slot before it is said.
const SKEW_PART: u32 = 4;

/// What is known of the others.
#[derive(Debug)]
pub struct Sharing {
    settings: config::Shared,
    identity: Identity,
    is_fresh: AtomicBool,
    proxies: AtomicU32,
    /// Of the lease that we hold; 0: we hold none.
    token: AtomicU64,
    /// Of the lease that we held last: orders bear it.
    last_token: Arc<AtomicU64>,
    /// Until when we may act as its holder, in milliseconds since the Unix epoch.
    valid_until: AtomicU64,
    /// Whether we held it last, as far as we know.
    was_holder: AtomicBool,
    has_told_skew: AtomicBool,
    /// How often anybody had told its past when we read it last.
    pasts: AtomicU64,
    booked: Mutex<HashMap<String, Booking>>,
}

/// Rent of a pool that is in a ledger.
#[derive(Debug, Clone, Copy)]
struct Booking {
    until: Timestamp,
    is_told: bool,
}

/// Who orders replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// There are no others.
    Alone,
    /// We do, until then.
    Holder(Timestamp),
    /// Another proxy, or nobody.
    Observer,
}

/// Who books a pool's rent, and up to when it is in a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RentDuty {
    Alone,
    Book { since: Option<Timestamp> },
    Leave { booked: Option<Timestamp> },
}

impl Sharing {
    pub fn new(settings: config::Shared, identity: Identity) -> Self {
        Self {
            settings,
            identity,
            is_fresh: AtomicBool::new(false),
            proxies: AtomicU32::new(1),
            token: AtomicU64::new(0),
            last_token: Arc::default(),
            valid_until: AtomicU64::new(0),
            was_holder: AtomicBool::new(false),
            has_told_skew: AtomicBool::new(false),
            pasts: AtomicU64::new(0),
            booked: Mutex::default(),
        }
    }

    /// How often the planner has to look.
    pub fn refresh(&self) -> Duration {
        self.settings.refresh
    }

    /// Real time after the end of a slot until the others' part of it is here.
    pub fn settling(&self) -> Duration {
        self.settings.refresh * SETTLING_ROUNDS
    }

    /// Whether the last exchange succeeded.
    pub fn is_fresh(&self) -> bool {
        self.is_fresh.load(Ordering::Relaxed)
    }

    /// Proxies of the deployment when last heard, this one included.
    pub fn proxies(&self) -> u32 {
        self.proxies.load(Ordering::Relaxed)
    }

    /// Token of the planner's lease, if we hold it.
    pub fn token(&self, now: Timestamp) -> Option<u64> {
        match self.authority(now) {
            Authority::Holder(_) => Some(self.token.load(Ordering::SeqCst)),
            Authority::Alone | Authority::Observer => None,
        }
    }

    /// Where the token of the lease is that we held last; 0: we never did.
    pub fn last_token(&self) -> Arc<AtomicU64> {
        self.last_token.clone()
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A lease that was not renewed in time is given up here, whoever looks first.
    pub fn authority(&self, now: Timestamp) -> Authority {
        let until = Timestamp::from_millis(self.valid_until.load(Ordering::SeqCst));
        if self.token.load(Ordering::SeqCst) == 0 {
            return Authority::Observer;
        }
        if now < until {
            return Authority::Holder(until);
        }
        self.lose("it could not be renewed in time");
        Authority::Observer
    }

    fn lose(&self, why: &str) {
        let token = self.token.swap(0, Ordering::SeqCst);
        if token > 0 {
            let process = &self.identity.process;
            warn!(
                token,
                process, "the planner's lease {token} is lost: {why}; replicas are not ordered here any more"
            );
        }
    }

    fn heard(&self, beat: &Beat, valid_until: Timestamp) {
        self.proxies.store(beat.proxies.max(1), Ordering::Relaxed);
        if let Some(token) = beat.token {
            // Before anybody can order anything under it.
            self.last_token.store(token, Ordering::SeqCst);
            self.valid_until.store(valid_until.as_millis(), Ordering::SeqCst);
            self.was_holder.store(true, Ordering::Relaxed);
            if self.token.swap(token, Ordering::SeqCst) != token {
                let process = &self.identity.process;
                info!(token, process, "holding the planner's lease {token}: replicas are ordered here");
            }
        } else {
            self.was_holder.store(false, Ordering::Relaxed);
            self.lose("another proxy may have it");
        }
        let mut booked = self.booked();
        for Booked { pool, until } in &beat.booked {
            let known = booked.entry(pool.clone()).or_insert(Booking { until: *until, is_told: true });
            known.until = known.until.max(*until);
        }
    }

    /// Who books the rent of a pool. At our end we book for a holder that we were last, if Redis is away.
    pub fn rent_duty(&self, pool: &str, is_closing: bool, now: Timestamp) -> RentDuty {
        let booked = self.booked().get(pool).map(|booking| booking.until);
        let is_holder = matches!(self.authority(now), Authority::Holder(_));
        if is_holder || (is_closing && self.was_holder.load(Ordering::Relaxed)) {
            RentDuty::Book { since: booked }
        } else {
            RentDuty::Leave { booked }
        }
    }

    /// Rent of a pool is in our ledger up to then.
    pub fn rent_booked(&self, pool: &str, until: Timestamp) {
        self.booked().insert(pool.to_owned(), Booking { until, is_told: false });
    }

    fn bookings_to_tell(&self) -> Vec<Booked> {
        let booked = self.booked();
        let untold = booked.iter().filter(|(_, booking)| !booking.is_told);
        untold.map(|(pool, booking)| Booked { pool: pool.clone(), until: booking.until }).collect()
    }

    fn bookings_told(&self, told: &[Booked]) {
        let mut booked = self.booked();
        for Booked { pool, until } in told {
            if let Some(booking) = booked.get_mut(pool).filter(|booking| booking.until == *until) {
                booking.is_told = true;
            }
        }
    }

    /// Tells all that is booked to a server that may have forgotten it.
    fn tell_bookings_again(&self) {
        self.booked().values_mut().for_each(|booking| booking.is_told = false);
    }

    fn booked(&self) -> MutexGuard<'_, HashMap<String, Booking>> {
        self.booked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_skew(&self, ours: Timestamp, theirs: Timestamp, slot: Duration) {
        let apart = ours.since(theirs).max(theirs.since(ours));
        if apart > slot / SKEW_PART && !self.has_told_skew.swap(true, Ordering::Relaxed) {
            warn!(
                "this machine's clock is {} ms off that of Redis: its calls are counted in other slots than the \
                 others' calls; synchronise the clocks",
                apart.as_millis()
            );
        }
    }
}

/// Exchanges until `shutdown`, and then once more to say goodbye. Returns at once where there is nothing shared.
pub async fn run(gateway: Arc<Gateway>, mut shutdown: watch::Receiver<bool>) {
    let Some(sharing) = &gateway.sharing else { return };
    gateway.metrics.shared_volume_stale(true);
    let link = Link::new(sharing.settings.clone(), sharing.identity.clone());
    let mut timer = tokio::time::interval(sharing.settings.refresh);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut state = Loop { store: None, backoff: FIRST_BACKOFF, retry_in: Duration::ZERO, round: 0 };
    loop {
        let turn = async {
            timer.tick().await;
            state.turn(&gateway, &link).await;
        };
        tokio::select! {
            _ = shutdown.wait_for(|asked| *asked) => break,
            () = turn => {}
        }
    }
    sharing.lose("this proxy stops");
    if let Some(store) = &mut state.store
        && let Err(error) = exchange(&gateway, store, Wish::Leave, 0).await
    {
        warn!(error = %anyhow::Error::new(error), "the other proxies were not told that this one stops");
    }
}

/// What the task keeps between two exchanges.
struct Loop {
    store: Option<Store>,
    backoff: Duration,
    /// Left of the pause before the next attempt to connect.
    retry_in: Duration,
    round: usize,
}

impl Loop {
    async fn turn(&mut self, gateway: &Gateway, link: &Link) {
        let Some(sharing) = &gateway.sharing else { return };
        if self.store.is_none() {
            go_on_alone(gateway);
            self.retry_in = self.retry_in.saturating_sub(sharing.settings.refresh);
            if !self.retry_in.is_zero() {
                return;
            }
            match link.connect().await {
                Ok(store) => {
                    self.store = Some(store);
                    sharing.tell_bookings_again();
                }
                Err(error) => return self.failed(gateway, error),
            }
        }
        let Some(store) = &mut self.store else { return };
        self.round = self.round.wrapping_add(1);
        match exchange(gateway, store, Wish::Take, self.round).await {
            Ok(()) => self.succeeded(gateway),
            Err(error) => self.failed(gateway, error),
        }
    }

    fn succeeded(&mut self, gateway: &Gateway) {
        let Some(sharing) = &gateway.sharing else { return };
        self.backoff = FIRST_BACKOFF;
        if !sharing.is_fresh.swap(true, Ordering::Relaxed) {
            let proxies = sharing.proxies();
            info!(proxies, "volume and budgets are shared by {proxies} proxies");
        }
        gateway.metrics.shared_volume_stale(false);
        gateway.metrics.shared(sharing.proxies(), sharing.token(gateway.now()).is_some());
    }

    fn failed(&mut self, gateway: &Gateway, error: SharedError) {
        let Some(sharing) = &gateway.sharing else { return };
        if sharing.is_fresh.swap(false, Ordering::Relaxed) || self.backoff == FIRST_BACKOFF {
            let error = anyhow::Error::new(error);
            warn!("nothing is shared: {error:#}; this proxy goes on with its own volume, and tries again");
        }
        gateway.metrics.shared_volume_stale(true);
        gateway.metrics.shared(sharing.proxies(), sharing.token(gateway.now()).is_some());
        for pool in &gateway.state().pools {
            pool.with_volume(SharedVolume::lose_touch);
            pool.backend.fleet.hear_others(&[], Duration::ZERO);
        }
        self.store = None;
        // Half of it, and up to as much again, so that proxies do not come back together.
        self.retry_in = self.backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
    }
}

/// Keeps limits that come back with time within our part of them, while nobody says more.
fn go_on_alone(gateway: &Gateway) {
    let now = gateway.now();
    for key in gateway.keys.limited() {
        for rate in [Unit::Requests, Unit::Tokens].into_iter().filter_map(|unit| rate_of(&key, unit)) {
            rate.go_on_alone(now);
        }
    }
}

/// One exchange: everything there is to tell, everything there is to hear.
async fn exchange(gateway: &Gateway, store: &mut Store, wish: Wish, round: usize) -> Result<(), SharedError> {
    let Some(sharing) = &gateway.sharing else { return Ok(()) };
    let (state, asked_at, proxies) = (gateway.state(), gateway.now(), sharing.proxies());
    let mut exchange = Exchange::default();
    let bookings = sharing.bookings_to_tell();
    exchange.ask_lease(store, wish, &bookings);
    exchange.ask_pasts(store);
    let recent: Vec<_> =
        state.pools.iter().map(|pool| exchange_volume(pool, store, &mut exchange, asked_at)).collect();
    let orders = matches!(sharing.authority(asked_at), Authority::Holder(_));
    for pool in &state.pools {
        exchange.tell_replicas(store, pool.name(), &replica_news(pool), orders);
    }
    let claims = claim(gateway, store, &mut exchange, round, asked_at);
    let mut answers = store.send(&exchange).await?;

    let beat = answers.lease()?;
    let pasts = answers.pasts()?;
    let validity = gateway.clock.scaled(validity(sharing.settings.lease));
    sharing.heard(&beat, asked_at + validity);
    sharing.bookings_told(&bookings);
    sharing.tell_skew(gateway.now(), beat.now, state.config.policy.slot);
    for (pool, slots) in state.pools.iter().zip(recent) {
        let mut heard = Vec::new();
        for slot in slots {
            heard.extend(answers.volume(store)?.map(|others| (slot, others)));
        }
        pool.with_volume(|volume| heard.iter().for_each(|(slot, others)| volume.hear(*slot, *others)));
    }
    let round_trip = match sharing.proxies() {
        1 => Duration::ZERO,
        _ => gateway.clock.scaled(sharing.settings.refresh * ROUND_TRIP_ROUNDS),
    };
    for pool in &state.pools {
        let news = answers.replicas()?;
        // Who orders knows itself which are to stop.
        let heard = news.iter().map(|news| (news.in_flight, news.is_leaving && !orders));
        pool.backend.fleet.hear_others(&heard.collect::<Vec<_>>(), round_trip);
    }
    for (account, claim) in &claims.budgets {
        account.allot(claim, answers.budget()?, proxies);
    }
    for (key, unit, standing) in &claims.rates {
        let allotment = answers.rate()?;
        if let Some(rate) = rate_of(key, *unit) {
            rate.allot(*standing, allotment, proxies, gateway.now());
        }
    }
    let has_missed_a_past = sharing.pasts.load(Ordering::Relaxed) != pasts;
    for pool in &state.pools {
        if has_missed_a_past {
            pool.with_volume(SharedVolume::miss_a_past);
        }
        if pool.with_volume(|volume| !volume.is_in_touch()) == Some(true) {
            catch_up(pool, store, gateway.now()).await?;
        }
    }
    sharing.pasts.store(pasts, Ordering::Relaxed);
    Ok(())
}

fn replica_news(pool: &Pool) -> Vec<ReplicaNews> {
    let news = pool.backend.fleet.news().into_iter();
    news.map(|(in_flight, is_leaving)| ReplicaNews { in_flight, is_leaving }).collect()
}

/// Tells our part of the last slots, and asks for the others'; the slots that were asked for.
fn exchange_volume(pool: &Pool, store: &Store, exchange: &mut Exchange, now: Timestamp) -> Vec<u64> {
    pool.note_demand(now);
    let present = pool.slot_of(now);
    let first = present.saturating_sub(RECENT_SLOTS);
    let own = pool.with_volume(|volume| {
        volume.keep_in_touch(first, present);
        volume.own_since(first)
    });
    let own = own.unwrap_or_default();
    for (slot, seen) in own {
        exchange.tell_volume(store, pool.name(), slot, &seen, kept(pool));
    }
    // One whose clock is ahead of ours is in the next slot already.
    let slots: Vec<u64> = (first..=present + 1).collect();
    for slot in &slots {
        exchange.ask_volume(store, pool.name(), *slot);
    }
    slots
}

/// After a time without an exchange, or when somebody else had one: tells and hears everything that is kept.
async fn catch_up(pool: &Pool, store: &mut Store, now: Timestamp) -> Result<(), SharedError> {
    let present = pool.slot_of(now);
    let kept = kept(pool);
    let has_untold = pool.with_volume(SharedVolume::begin_to_tell) == Some(true);
    let first = pool.slot_of(now.saturating_sub(kept));
    let mut others: BTreeMap<u64, Slot> = BTreeMap::new();
    let mut from = first;
    while from <= present {
        let to = (from + SLOTS_AT_ONCE - 1).min(present + 1);
        let own = pool.with_volume(|volume| volume.own_since(from)).unwrap_or_default();
        let mut exchange = Exchange::default();
        for (slot, seen) in own.iter().take_while(|(slot, _)| *slot <= to) {
            exchange.tell_volume(store, pool.name(), *slot, seen, kept);
        }
        (from..=to).for_each(|slot| exchange.ask_volume(store, pool.name(), slot));
        if has_untold && to >= present {
            exchange.past_is_told(store, kept);
        }
        let mut answers = store.send(&exchange).await?;
        for slot in from..=to {
            others.extend(answers.volume(store)?.map(|seen| (slot, seen)));
        }
        from = to + 1;
    }
    pool.with_volume(|volume| {
        volume.forget_before(first);
        volume.catch_up(others);
    });
    Ok(())
}

/// How long slots of a pool's volume are kept.
fn kept(pool: &Pool) -> Duration {
    KEPT.max(pool.settings.window).min(pool.settings.slot * MOST_SLOTS)
}

/// What was claimed, in the order of the answers.
#[derive(Default)]
struct Claims {
    budgets: Vec<(Arc<Account>, budgets::Claim)>,
    rates: Vec<(Arc<Key>, Unit, Standing)>,
}

fn claim(gateway: &Gateway, store: &Store, exchange: &mut Exchange, round: usize, now: Timestamp) -> Claims {
    let proxies = gateway.sharing.as_ref().map_or(1, Sharing::proxies);
    let mut claims = Claims::default();
    let accounts = gateway.keys.accounts();
    for (index, account) in in_turn(&accounts, round) {
        if claims.budgets.len() >= MOST_CLAIMS {
            break;
        }
        if let Some(claim) = account.claim((index + round).is_multiple_of(IDLE_ROUNDS), now) {
            exchange.claim_budget(store, &claim, proxies);
            claims.budgets.push((account.clone(), claim));
        }
    }
    let keys = gateway.keys.limited();
    for (index, key) in in_turn(&keys, round) {
        for unit in [Unit::Requests, Unit::Tokens] {
            let is_due = (index + round).is_multiple_of(IDLE_ROUNDS);
            let room = claims.rates.len() < MOST_CLAIMS;
            let Some(rate) = rate_of(key, unit).filter(|_| room) else { continue };
            let Some(standing) = rate.claim(is_due, now) else { continue };
            let Standing { taken, before, kept, is_busy } = standing;
            let (key_id, per_minute) = (key.record.id.clone(), rate.per_minute());
            let claim = rates::Claim { key: key_id, unit, per_minute, taken, before, kept, is_busy };
            exchange.claim_rate(store, &claim, proxies);
            claims.rates.push((key.clone(), unit, standing));
        }
    }
    claims
}

/// All of them with their numbers, beginning further on each time, so that a bound hits each in turn.
fn in_turn<T>(all: &[T], round: usize) -> impl Iterator<Item = (usize, &T)> {
    let first = if all.len() > MOST_CLAIMS { round.wrapping_mul(MOST_CLAIMS) % all.len() } else { 0 };
    all.iter().enumerate().cycle().skip(first).take(all.len())
}

fn rate_of(key: &Key, unit: Unit) -> Option<&Rate> {
    match unit {
        Unit::Requests => key.requests.as_ref(),
        Unit::Tokens => key.tokens.as_ref(),
    }
}

impl Gateway {
    pub fn authority(&self, now: Timestamp) -> Authority {
        self.sharing.as_ref().map_or(Authority::Alone, |sharing| sharing.authority(now))
    }

    /// Who books a pool's rent; `is_closing` when this process ends.
    pub fn rent_duty(&self, pool: &str, is_closing: bool, now: Timestamp) -> RentDuty {
        self.sharing.as_ref().map_or(RentDuty::Alone, |sharing| sharing.rent_duty(pool, is_closing, now))
    }

    /// Whether no other proxy was heard.
    pub fn is_alone(&self) -> bool {
        self.sharing.as_ref().is_none_or(|sharing| sharing.proxies() < 2)
    }
}

/// How many slots of a pool are kept.
pub fn kept_slots(pool: &Pool) -> u64 {
    millis(kept(pool)) / millis(pool.settings.slot).max(1)
}
