//! What of a message's head may cross the proxy.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::upstream::Backend;

/// Headers of one connection, not of the message (RFC 9110, 7.6.1).
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// Headers that carry the client's credentials or account: they go to the API, and only there.
fn is_credential(name: &str) -> bool {
    matches!(
        name,
        "authorization"
            | "cookie"
            | "api-key"
            | "x-api-key"
            | "openai-organization"
            | "openai-project"
            | "anthropic-beta"
    )
}

/// Headers between the client and us alone.
fn is_for_us(name: &str) -> bool {
    matches!(name, "host" | "content-length" | "expect" | "x-breakeven-backend" | "x-breakeven-tags")
}

pub const BACKEND: HeaderName = HeaderName::from_static("x-breakeven-backend");
pub const TAGS: HeaderName = HeaderName::from_static("x-breakeven-tags");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-breakeven-request-id");
pub const MODEL: HeaderName = HeaderName::from_static("x-breakeven-model");
pub const REASON: HeaderName = HeaderName::from_static("x-breakeven-reason");
pub const COST: HeaderName = HeaderName::from_static("x-breakeven-cost-usd");

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Removes what belongs to the connection: the fixed names and those that `Connection` lists.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let fields: Vec<_> = headers.get_all(header::CONNECTION).iter().cloned().collect();
        let named = fields.iter().flat_map(|field| field.as_bytes().split(|byte| *byte == b','));
        for name in named.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()) {
            headers.remove(name);
        }
    }
    take_all(headers, is_hop_by_hop, |_, _| {});
}

/// Takes out the headers whose name is `unwanted`. A look at each name that is there costs less than a lookup
/// of each that could be: nearly all are absent.
fn take_all(
    headers: &mut HeaderMap,
    unwanted: impl Fn(&str) -> bool,
    mut taken: impl FnMut(HeaderName, HeaderValue),
) {
    while let Some(name) = headers.keys().find(|name| unwanted(name.as_str())).cloned() {
        if let Some(value) = headers.remove(&name) {
            taken(name, value);
        }
    }
}

/// A client's head on its way to one backend after another: what belongs to the connection and to us is gone,
/// and the client's credentials are put in only where they may go.
#[derive(Debug)]
pub struct Head {
    headers: HeaderMap,
    credentials: Vec<(HeaderName, HeaderValue)>,
    /// There are credentials in `headers`.
    is_dressed: bool,
    /// What a backend's own headers have replaced, to be put back for the next.
    replaced: Vec<(HeaderName, Option<HeaderValue>)>,
}

impl Head {
    pub fn new(mut headers: HeaderMap) -> Self {
        strip_hop_by_hop(&mut headers);
        let mut credentials = Vec::new();
        let unwanted = |name: &str| is_for_us(name) || is_credential(name);
        take_all(&mut headers, unwanted, |name, mut value| {
            if is_credential(name.as_str()) {
                // Not printed, and not kept in the compression table of HTTP/2.
                value.set_sensitive(true);
                credentials.push((name, value));
            }
        });
        Self { headers, credentials, is_dressed: false, replaced: Vec::new() }
    }

    /// Asks for the answer as it is, so that its usage can be read.
    pub fn ask_unencoded(&mut self) {
        self.headers.remove(header::ACCEPT_ENCODING);
    }

    /// Makes our span the parent of what follows, if there is one.
    pub fn trace(&mut self, traceparent: Option<HeaderValue>) {
        if let Some(value) = traceparent {
            self.headers.insert(TRACEPARENT, value);
        }
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
        self.take_back();
        self.put(backend.credential(), backend.passes_credentials());
        self.add(backend.extra_headers());
    }

    /// Takes out a backend's own headers: they may be secret.
    fn take_back(&mut self) {
        for (name, before) in self.replaced.drain(..).rev() {
            match before {
                Some(value) => drop(self.headers.insert(name, value)),
                None => drop(self.headers.remove(name)),
            }
        }
    }

    fn add(&mut self, extra: &[(HeaderName, HeaderValue)]) {
        for (name, value) in extra {
            let before = self.headers.insert(name.clone(), value.clone());
            self.replaced.push((name.clone(), before));
        }
    }

    fn put(&mut self, credential: Option<&HeaderValue>, may_pass: bool) {
        if std::mem::replace(&mut self.is_dressed, true) {
            take_all(&mut self.headers, is_credential, |_, _| {});
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
    fn every_connection_field_counts_and_what_is_no_name_in_one_hides_nothing() {
        let mut headers = head(&[("x-one", "1"), ("x-two", "2"), ("x-three", "3"), ("x-kept", "1")]);
        for field in [&b"x-one"[..], b"keep-alive,\xe9, x-two", b"x-three"] {
            headers.append(header::CONNECTION, HeaderValue::from_bytes(field).unwrap());
        }
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
    fn one_backends_own_headers_do_not_reach_the_next() {
        let mut sent = Head::new(head(&[("x-both", "client")]));
        let secret = [
            (HeaderName::from_static("x-both"), HeaderValue::from_static("ours")),
            (HeaderName::from_static("x-secret"), HeaderValue::from_static("ours")),
        ];
        sent.add(&secret);
        assert_eq!(sent.headers(), &head(&[("x-both", "ours"), ("x-secret", "ours")]));
        sent.take_back();
        assert_eq!(sent.headers(), &head(&[("x-both", "client")]));
    }

    #[test]
    fn a_configured_key_replaces_the_clients() {
        let mut sent = Head::new(head(&[("authorization", "Bearer client"), ("openai-organization", "org")]));
        sent.put(Some(&HeaderValue::from_static("Bearer ours")), true);
        assert_eq!(sent.headers(), &head(&[("authorization", "Bearer ours")]));
    }
}
