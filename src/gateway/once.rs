//! What may be billed once only, as far as this process knows: the ledger knows all of it, and is asked before.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tracing::warn;
use uuid::Uuid;

use super::Gateway;
use crate::ledger;

/// Remembered at once, by this process.
const MAX_REMEMBERED: usize = 4096;

/// Ids of what was billed lately.
#[derive(Debug, Default)]
pub struct Once(Mutex<VecDeque<Uuid>>);

impl Once {
    /// Whether an id comes for the first time. It is remembered.
    pub fn is_first(&self, id: Uuid) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.contains(&id) {
            return false;
        }
        if seen.len() >= MAX_REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(id);
        true
    }
}

impl Gateway {
    /// Looks up in the ledger what was billed before this process can remember, so that it is not counted again.
    pub async fn recall(&self, id: Uuid) {
        let path = self.state().config.ledger.path.clone();
        let looked_up = tokio::task::spawn_blocking(move || ledger::once::has(&path, id)).await;
        match looked_up {
            Ok(Ok(true)) => drop(self.billed.is_first(id)),
            // The ledger passes over a row that it has, whatever is counted here.
            Ok(Err(error)) => warn!(%error, "what was billed before cannot be read from the ledger"),
            Ok(Ok(false)) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_once_and_only_the_oldest_are_forgotten() {
        let once = Once::default();
        let ids: Vec<Uuid> = (0..=MAX_REMEMBERED as u128).map(Uuid::from_u128).collect();
        assert!(ids.iter().all(|id| once.is_first(*id)));
        assert!(!once.is_first(ids[1]));
        assert!(once.is_first(ids[0]));
    }
}
