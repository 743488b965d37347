//! Where the replicas of a backend are.

use crate::config::pattern::{expand, is_pattern};
use crate::config::{Backend, Control};
use crate::economics::{Billing, PoolSpec};

/// The base URL of each replica: as listed; or one pattern with `{replica}`; or one address that all share.
/// Replicas that others control behind one address count as one, unless they are paid for anyway.
pub(super) fn of_replicas(backend: &Backend, pool: &PoolSpec, control: &Control) -> Vec<String> {
    let max = usize::try_from(pool.max_replicas.max(1)).unwrap_or(usize::MAX);
    match backend.base_urls.as_slice() {
        [one] if is_pattern(one) => (0..pool.max_replicas.max(1)).map(|index| expand(one, index)).collect(),
        [one] if *control == Control::None && pool.billing != Billing::Committed => vec![one.clone()],
        [one] => vec![one.clone(); max],
        many if *control == Control::None => many.to_vec(),
        many => many.iter().take(max).cloned().collect(),
    }
}
