//! TLS on our own listeners, with certificates that are read again when they change.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::Tls;

/// What the applications' listener speaks, the best first.
pub const ALL_HTTP: Protocols = &["h2", "http/1.1"];
/// What the admin side speaks.
pub const HTTP1: Protocols = &["http/1.1"];

/// Names of protocols as TLS has them (ALPN).
pub type Protocols = &'static [&'static str];

/// Accepts TLS connections with the certificate in force.
#[derive(Clone)]
pub struct Acceptor {
    current: Arc<ArcSwap<ServerConfig>>,
    protocols: Protocols,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

/// A certificate with its key, read and found to belong together.
pub struct Loaded(ServerConfig);

impl std::fmt::Debug for Loaded {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Loaded").finish_non_exhaustive()
    }
}

impl Acceptor {
    pub fn new(settings: &Tls, protocols: Protocols) -> anyhow::Result<Self> {
        let Loaded(current) = load(settings, protocols)?;
        Ok(Self { current: Arc::new(ArcSwap::from_pointee(current)), protocols })
    }

    /// Reads the files anew.
    pub fn load(&self, settings: &Tls) -> anyhow::Result<Loaded> {
        load(settings, self.protocols)
    }

    /// Puts a certificate in force for the connections that come.
    pub fn renew(&self, loaded: Loaded) {
        self.current.store(Arc::new(loaded.0));
    }

    /// Shakes hands, which may take so long.
    pub async fn accept(&self, stream: TcpStream, patience: Duration) -> io::Result<TlsStream<TcpStream>> {
        let handshake = TlsAcceptor::from(self.current.load_full()).accept(stream);
        match tokio::time::timeout(patience, handshake).await {
            Ok(shaken) => shaken,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time")),
        }
    }
}

fn load(settings: &Tls, protocols: Protocols) -> anyhow::Result<Loaded> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()));
    let certificates = CertificateDer::pem_slice_iter(&read(&settings.certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("`{}` is not a certificate in PEM", settings.certificate.display()))?;
    let key = PrivateKeyDer::from_pem_slice(&read(&settings.private_key)?)
        .with_context(|| format!("`{}` is not a private key in PEM", settings.private_key.display()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("TLS 1.2 and 1.3 are not available")?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .context("the certificate and the private key do not belong together")?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Loaded(config))
}
