//! Virtual keys and budgets: who may call, how often, and for how much.
//!
//! Two snapshots answer a call: the directory of keys, found by the digest of their secret, and the accounts of
//! the budgets. [`Keys::refresh`] brings both up to date, once a second: from the file of keys, which the
//! command writes, from the configuration, and, for a budget that is new here, from the ledger. A budget that
//! stays keeps its account, so that nothing held or spent is forgotten.

pub mod account;
pub mod admission;
pub mod period;
pub mod rate;
pub mod reserved;
pub mod secret;
pub mod store;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use self::account::Account;
use self::rate::Rate;
use self::secret::Digest;
use self::store::{Record, Store, StoreError};
use crate::config::{AuthMode, Budget, BudgetPeriod, BudgetScope, Config};
use crate::economics::{NanoUsd, Timestamp};
use crate::ledger::LedgerError;
use crate::ledger::query::{self, CallerSpend};
use crate::metrics::BudgetState;

/// The keys and budgets in force.
#[derive(Debug, Default)]
pub struct Keys {
    directory: ArcSwap<HashMap<Digest, Arc<Key>>>,
    accounts: ArcSwap<Vec<Arc<Account>>>,
    file: Mutex<Option<(Store, i64)>>,
}

/// A key that may call, with its live limits.
#[derive(Debug)]
pub struct Key {
    pub record: Record,
    pub account: Option<Arc<Account>>,
    pub requests: Option<Rate>,
    pub tokens: Option<Rate>,
}

/// Why a secret opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    Missing,
    Invalid,
    Expired,
    Revoked,
}

#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read what was spent so far")]
    Ledger(#[from] LedgerError),
}

impl Keys {
    /// The key of a secret. Its cost does not depend on how many keys there are.
    pub fn find(&self, secret: &[u8], now: Timestamp) -> Result<Arc<Key>, Unknown> {
        let directory = self.directory.load();
        let key = directory.get(&Digest::of(secret)).ok_or(Unknown::Invalid)?;
        if key.record.revoked_at.is_some() {
            return Err(Unknown::Revoked);
        }
        if key.record.expires_at.is_some_and(|at| now >= at) {
            return Err(Unknown::Expired);
        }
        Ok(key.clone())
    }

    /// Whether there are budgets besides those of keys.
    pub fn has_budgets(&self) -> bool {
        !self.accounts.load().is_empty()
    }

    /// The budgets that count a call: its key's own, and the configured ones.
    fn accounts_of(&self, key: Option<&Key>, team: &str, route: &str, mut visit: impl FnMut(&Arc<Account>)) {
        if let Some(account) = key.and_then(|key| key.account.as_ref()) {
            visit(account);
        }
        for account in self.accounts.load().iter() {
            let counts = match &account.budget.scope {
                BudgetScope::All => true,
                BudgetScope::Team(name) => name == team,
                BudgetScope::Route(name) => name == route,
                BudgetScope::Key(id) => key.is_some_and(|key| key.record.id == *id),
            };
            if counts {
                visit(account);
            }
        }
    }

    /// Takes up what has changed in the file of keys and in the configuration. Reads files: not for the request
    /// path.
    pub fn refresh(&self, config: &Config, now: Timestamp) -> Result<(), RefreshError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut past = Past { ledger: &config.ledger.path, now, read: HashMap::new() };
        self.refresh_accounts(&config.budgets, &mut past)?;
        if config.auth.mode != AuthMode::Keys {
            self.directory.store(Arc::default());
            *file = None;
            return Ok(());
        }
        if file.is_none() {
            *file = Some((Store::open(&store::path_beside(&config.ledger.path))?, NEVER));
        }
        let Some((store, seen)) = file.as_mut() else { return Ok(()) };
        let version = store.version()?;
        if version != *seen {
            self.refresh_directory(store.all()?, &mut past)?;
            *seen = version;
        }
        Ok(())
    }

    fn refresh_accounts(&self, budgets: &[Budget], past: &mut Past<'_>) -> Result<(), LedgerError> {
        let before = self.accounts.load_full();
        if before.iter().map(|account| &account.budget).eq(budgets) {
            return Ok(());
        }
        let mut accounts = Vec::with_capacity(budgets.len());
        for budget in budgets {
            accounts.push(match before.iter().find(|account| account.budget == *budget) {
                Some(account) => account.clone(),
                None => past.account(budget.clone())?,
            });
        }
        self.accounts.store(Arc::new(accounts));
        Ok(())
    }

    fn refresh_directory(&self, records: Vec<Record>, past: &mut Past<'_>) -> Result<(), LedgerError> {
        let before = self.directory.load_full();
        let mut directory = HashMap::with_capacity(records.len());
        for record in records {
            let digest = record.digest;
            let key = match before.get(&digest) {
                Some(key) if key.record == record => key.clone(),
                old => Arc::new(Key::new(record, old.and_then(|key| key.account.clone()), past)?),
            };
            directory.insert(digest, key);
        }
        self.directory.store(Arc::new(directory));
        Ok(())
    }

    /// The budgets as they stand: the configured ones first, then those of keys.
    pub fn states(&self, now: Timestamp) -> Vec<BudgetState> {
        let directory = self.directory.load();
        let of_keys = directory.values().filter(|key| key.record.revoked_at.is_none());
        let mut of_keys: Vec<_> = of_keys.filter_map(|key| Some(key.account.as_ref()?.state(now))).collect();
        of_keys.sort_by(|one, other| one.name.cmp(&other.name));
        let mut states: Vec<_> = self.accounts.load().iter().map(|account| account.state(now)).collect();
        states.append(&mut of_keys);
        states
    }

    /// The accounts of all budgets: the configured ones, and those of keys in force.
    pub fn accounts(&self) -> Vec<Arc<Account>> {
        let directory = self.directory.load();
        let in_force = directory.values().filter(|key| key.record.revoked_at.is_none());
        let of_keys = in_force.filter_map(|key| key.account.clone());
        self.accounts.load().iter().cloned().chain(of_keys).collect()
    }

    /// The keys in force that have a rate limit.
    pub fn limited(&self) -> Vec<Arc<Key>> {
        let directory = self.directory.load();
        let is_limited = |key: &&Arc<Key>| {
            key.record.revoked_at.is_none() && (key.requests.is_some() || key.tokens.is_some())
        };
        directory.values().filter(is_limited).cloned().collect()
    }

    /// What calls under way hold of all budgets together.
    pub fn held(&self) -> NanoUsd {
        let directory = self.directory.load();
        let of_keys = directory.values().filter_map(|key| key.account.as_ref()).map(|account| account.held());
        let accounts = self.accounts.load();
        accounts
            .iter()
            .map(|account| account.held())
            .chain(of_keys)
            .fold(NanoUsd::ZERO, |sum, held| sum + held)
    }
}

/// No version of a file that was read.
const NEVER: i64 = -1;

impl Key {
    /// A key as it is in the file. One that was known keeps its account as long as its budget is the same.
    fn new(record: Record, old: Option<Arc<Account>>, past: &mut Past<'_>) -> Result<Self, LedgerError> {
        let budget = record.budget.map(|(limit, period)| account::of_key(&record.id, limit, period));
        let account = match (budget, old) {
            (Some(budget), Some(old)) if old.budget == budget => Some(old),
            (Some(budget), _) => Some(past.account(budget)?),
            (None, _) => None,
        };
        let requests = record.requests_per_minute.map(Rate::new);
        let tokens = record.tokens_per_minute.map(Rate::new);
        Ok(Self { record, account, requests, tokens })
    }
}

/// What the ledger has of the current periods, each read once and only when it is asked for.
struct Past<'a> {
    ledger: &'a Path,
    now: Timestamp,
    read: HashMap<BudgetPeriod, Vec<CallerSpend>>,
}

impl Past<'_> {
    fn account(&mut self, budget: Budget) -> Result<Arc<Account>, LedgerError> {
        let rows = match self.read.entry(budget.period) {
            Entry::Occupied(read) => read.into_mut(),
            Entry::Vacant(unread) => {
                let rows = spend_of_period(self.ledger, budget.period, self.now)?;
                unread.insert(rows)
            }
        };
        let counted = rows.iter().filter(|row| match &budget.scope {
            BudgetScope::All => true,
            BudgetScope::Team(team) => row.team == *team,
            BudgetScope::Route(route) => row.route == *route,
            BudgetScope::Key(key) => row.key == *key,
        });
        let spent = counted.fold(NanoUsd::ZERO, |sum, row| sum + row.cost);
        Ok(Account::new(budget, spent, self.now))
    }
}

/// What was spent in the current period, by key, team and route; nothing where there is no ledger yet.
pub fn spend_of_period(
    ledger: &Path,
    period: BudgetPeriod,
    now: Timestamp,
) -> Result<Vec<CallerSpend>, LedgerError> {
    match query::spend_by_caller(ledger, period::bounds(period, now).0) {
        Err(LedgerError::Missing { .. }) => Ok(Vec::new()),
        read => read,
    }
}
