//! What of a message's head may cross the proxy.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::upstream::Backend;

/// Headers of one connection, not of the message (RFC 9110, 7.6.1).
static HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers that carry the client's credentials or account: they go to the API, and only there.
static CREDENTIALS: [HeaderName; 7] = [
    header::AUTHORIZATION,
    header::COOKIE,
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
    HeaderName::from_static("anthropic-beta"),
];

pub const BACKEND: HeaderName = HeaderName::from_static("x-breakeven-backend");
pub const TAGS: HeaderName = HeaderName::from_static("x-breakeven-tags");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-breakeven-request-id");
pub const MODEL: HeaderName = HeaderName::from_static("x-breakeven-model");
pub const REASON: HeaderName = HeaderName::from_static("x-breakeven-reason");
pub const COST: HeaderName = HeaderName::from_static("x-breakeven-cost-usd");

/// Removes what belongs to the connection: the fixed names and those that `Connection` lists.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if let Some(named) = headers.get(header::CONNECTION).cloned() {
        let named = named.to_str().unwrap_or_default();
        for name in named.split(',').filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok()) {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// A client's head on its way to one backend after another: what belongs to the connection and to us is gone,
/// and the client's credentials are put in only where they may go.
#[derive(Debug)]
pub struct Head {
    headers: HeaderMap,
    credentials: Vec<(HeaderName, HeaderValue)>,
}

impl Head {
    pub fn new(mut headers: HeaderMap) -> Self {
        strip_hop_by_hop(&mut headers);
        for name in [header::HOST, header::CONTENT_LENGTH, header::EXPECT, BACKEND, TAGS] {
            headers.remove(name);
        }
        let credentials = CREDENTIALS
            .iter()
            .filter_map(|name| headers.remove(name).map(|value| (name.clone(), value)))
            .collect();
        Self { headers, credentials }
    }

    /// Asks for the answer as it is, so that its usage can be read.
    pub fn ask_unencoded(&mut self) {
        self.headers.remove(header::ACCEPT_ENCODING);
    }

    /// Asks for a WebSocket, without compression.
    pub fn ask_upgrade(&mut self) {
        self.headers.remove(HeaderName::from_static("sec-websocket-extensions"));
        self.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        self.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The bearer token that the client came with.
    pub fn bearer(&self) -> Option<&str> {
        let (_, value) = self.credentials.iter().find(|(name, _)| *name == header::AUTHORIZATION)?;
        value.to_str().ok()?.strip_prefix("Bearer ")
    }

    /// Puts in what a backend may see, and takes out what was there for another.
    pub fn dress(&mut self, backend: &Backend) {
        self.put(backend.credential(), backend.passes_credentials());
        for (name, value) in backend.extra_headers() {
            self.headers.insert(name.clone(), value.clone());
        }
    }

    fn put(&mut self, credential: Option<&HeaderValue>, may_pass: bool) {
        for name in &CREDENTIALS {
            self.headers.remove(name);
        }
        match credential {
            Some(credential) => {
                self.headers.insert(header::AUTHORIZATION, credential.clone());
            }
            None if may_pass => self.headers.extend(self.credentials.iter().cloned()),
            None => {}
        }
    }
}

/// Makes an upstream's head fit for the client.
pub fn prepare_response(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn what_connection_names_is_removed() {
        let mut headers = head(&[
            ("connection", "close, x-secret"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("x-kept", "1"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, head(&[("x-kept", "1")]));
    }

    #[test]
    fn the_clients_key_does_not_reach_a_backend_that_may_not_have_it() {
        for name in ["authorization", "api-key", "x-api-key", "cookie", "openai-organization"] {
            let mut sent = Head::new(head(&[(name, "secret"), ("x-kept", "1")]));
            sent.put(None, true);
            assert_eq!(sent.headers(), &head(&[(name, "secret"), ("x-kept", "1")]), "{name}");
            sent.put(None, false);
            assert_eq!(sent.headers(), &head(&[("x-kept", "1")]), "{name}");
        }
    }

    #[test]
    fn a_configured_key_replaces_the_clients() {
        let mut sent = Head::new(head(&[("authorization", "Bearer client"), ("openai-organization", "org")]));
        sent.put(Some(&HeaderValue::from_static("Bearer ours")), true);
        assert_eq!(sent.headers(), &head(&[("authorization", "Bearer ours")]));
    }
}
