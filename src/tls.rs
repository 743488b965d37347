//! What every client that speaks TLS has in common: ring for cryptography, and whose certificates it believes.

use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt as _;
use rustls::crypto::{CryptoProvider, ring};
use rustls::{ClientConfig, RootCertStore};

/// Makes ring the process's implementation of cryptography, for the clients that do not bring their own.
pub fn install() {
    if CryptoProvider::get_default().is_none() {
        // An error says that another thread has just installed one.
        drop(ring::default_provider().install_default());
    }
}

/// A client that trusts these authorities or, without any, those that browsers trust; it has no certificate of its own.
pub fn client_config(authorities: Option<RootCertStore>) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the protocols of rustls");
    let trusting = match authorities {
        Some(roots) => builder.with_root_certificates(roots),
        None => builder.with_webpki_roots(),
    };
    trusting.with_no_client_auth()
}
