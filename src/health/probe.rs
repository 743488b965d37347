//! Active health: one request to a server's health path.

use std::error::Error;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use crate::config::Secret;
use crate::tls;

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    Up,
    /// It did not answer in time. A server with calls in flight may only be busy: llama.cpp's `/health` has
    /// been seen to take six seconds under load.
    Silent,
    /// It refused, broke off, or answered that it is not well.
    Down(String),
}

/// Which answers mean that the server is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// A health path: success only.
    Success,
    /// Any other path: whatever is not a server error shows that somebody answers.
    AnyAnswer,
}

/// A client for probes and webhooks: no proxy from the environment, no redirects, and a new connection each
/// time, so that a stale one cannot pass for a dead server.
///
/// Without `tls` it loads no root certificates, which takes some twenty milliseconds and megabytes, and trusts
/// no `https://` server. `authorities` are trusted besides those of the system.
///
/// # Errors
/// When TLS cannot be set up.
pub fn client(
    connect_timeout: Duration,
    tls: bool,
    authorities: &[CertificateDer<'_>],
) -> Result<reqwest::Client, reqwest::Error> {
    tls::install();
    let builder = reqwest::Client::builder();
    let builder = if tls { trusting(builder, authorities)? } else { builder.tls_certs_only([]) };
    builder
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(connect_timeout)
        .pool_max_idle_per_host(0)
        .user_agent(concat!("breakeven/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// A client that trusts these authorities besides those of the system.
///
/// # Errors
/// When one of them is not a certificate.
pub fn trusting(
    builder: reqwest::ClientBuilder,
    authorities: &[CertificateDer<'_>],
) -> Result<reqwest::ClientBuilder, reqwest::Error> {
    let parsed = authorities.iter().map(|authority| reqwest::Certificate::from_der(authority));
    Ok(builder.tls_certs_merge(parsed.collect::<Result<Vec<_>, _>>()?))
}

/// Asks once. `timeout` is real time and bounds the whole request.
pub async fn probe(
    client: &reqwest::Client,
    url: &str,
    key: Option<&Secret>,
    timeout: Duration,
    expect: Expect,
) -> Probe {
    let mut request = client.get(url).timeout(timeout);
    if let Some(key) = key {
        request = request.bearer_auth(key.expose());
    }
    match request.send().await {
        Ok(answer) => judge(answer.status(), expect),
        Err(error) if error.is_timeout() && !error.is_connect() => Probe::Silent,
        Err(error) => Probe::Down(root_cause(&error)),
    }
}

fn judge(status: reqwest::StatusCode, expect: Expect) -> Probe {
    let up = match expect {
        Expect::Success => status.is_success(),
        Expect::AnyAnswer => !status.is_server_error(),
    };
    if up { Probe::Up } else { Probe::Down(format!("it answered {}", status.as_u16())) }
}

/// The innermost message: `connection refused` rather than `error sending request for url (..)`.
pub fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    #[test]
    fn a_health_path_must_succeed_and_any_other_must_only_answer() {
        let down = |status: u16| Probe::Down(format!("it answered {status}"));
        assert_eq!(judge(StatusCode::OK, Expect::Success), Probe::Up);
        assert_eq!(judge(StatusCode::UNAUTHORIZED, Expect::Success), down(401));
        assert_eq!(judge(StatusCode::UNAUTHORIZED, Expect::AnyAnswer), Probe::Up);
        assert_eq!(judge(StatusCode::SERVICE_UNAVAILABLE, Expect::AnyAnswer), down(503));
    }
}
