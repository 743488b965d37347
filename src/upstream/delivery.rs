//! Whether an upstream may have begun with a request: then it may bill it, answer or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How far one attempt has come. It outlives the attempt's future, which a timeout or a client that leaves drops at
/// any point.
#[derive(Debug, Clone, Default)]
pub struct Delivery(Arc<AtomicBool>);

impl Delivery {
    /// The whole request is on its way.
    pub fn complete(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// It is known that the upstream has not begun with it: it never saw it, or has refused it.
    pub fn undo(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    pub fn is_complete(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
