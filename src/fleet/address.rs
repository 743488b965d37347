//! Where the replicas of a backend are.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use tracing::debug;

use crate::config::pattern::{expand, is_pattern};
use crate::config::{Addresses, Backend, Control};
use crate::economics::{Billing, PoolSpec};

/// What a host name's addresses are, in order. It may block. A test brings its own.
pub type Lookup = Arc<dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

/// Bound on one look-up, in real time.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
const HTTP_PORT: u16 = 80;

/// By the system's resolver.
pub(super) fn system() -> Lookup {
    Arc::new(|host, port| (host, port).to_socket_addrs().map(Iterator::collect))
}

/// The addresses of the name in a base URL, in order; none when it cannot be resolved.
pub(super) async fn resolve(lookup: &Lookup, base_url: &str) -> Option<Vec<SocketAddr>> {
    let uri: Uri = base_url.parse().ok()?;
    let (host, port) = (uri.host()?.to_owned(), uri.port_u16().unwrap_or(HTTP_PORT));
    let lookup = Arc::clone(lookup);
    let looking = tokio::task::spawn_blocking(move || lookup(&host, port));
    match tokio::time::timeout(LOOKUP_TIMEOUT, looking).await {
        Ok(Ok(Ok(mut found))) => {
            found.sort_unstable();
            found.dedup();
            Some(found)
        }
        Ok(Ok(Err(error))) => {
            debug!(base_url, %error, "the name in `{base_url}` cannot be resolved");
            None
        }
        Ok(Err(_)) | Err(_) => None,
    }
}

/// The base URL of each replica: as listed; or one pattern with `{replica}`; or one address that all share.
/// Replicas that others control behind one address count as one, unless they are paid for anyway.
pub(super) fn of_replicas(backend: &Backend, pool: &PoolSpec, control: &Control) -> Vec<String> {
    let max = usize::try_from(pool.max_replicas.max(1)).unwrap_or(usize::MAX);
    match backend.base_urls.as_slice() {
        [one] if backend.addresses == Addresses::Dns => vec![one.clone(); max],
        [one] if is_pattern(one) => (0..pool.max_replicas.max(1)).map(|index| expand(one, index)).collect(),
        [one] if *control == Control::None && pool.billing != Billing::Committed => vec![one.clone()],
        [one] => vec![one.clone(); max],
        many if *control == Control::None => many.to_vec(),
        many => many.iter().take(max).cloned().collect(),
    }
}
