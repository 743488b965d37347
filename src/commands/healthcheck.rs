//! `breakeven healthcheck`: whether a proxy on this machine is alive, for containers that have no `curl`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use crate::config::{self, Config};
use crate::tls;

/// A proxy that does not answer by then is not well.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Asks a proxy on this machine whether it is alive: status 0 if so, 1 if not.
///
/// The address is the configuration's `admin_listen`; with `admin_tls` it is asked over TLS, whatever the certificate says.
#[derive(Debug, Clone, Args)]
pub struct HealthcheckArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// Where the admin side listens, instead of what the configuration says.
    #[arg(long, value_name = "ADDRESS")]
    pub admin: Option<SocketAddr>,
    /// Also ask whether it takes calls: not while it drains, and not while it cannot record.
    #[arg(long)]
    pub ready: bool,
}

/// Asks once.
pub fn run(arguments: &HealthcheckArgs) -> anyhow::Result<ExitCode> {
    let (listen, has_tls) = configured(arguments)?;
    let scheme = if has_tls { "https" } else { "http" };
    let path = if arguments.ready { "readyz" } else { "livez" };
    let url = format!("{scheme}://{}/{path}", reachable(listen));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(ask(&url)) {
        Ok(status) if status.is_success() => Ok(ExitCode::SUCCESS),
        Ok(status) => {
            eprintln!("{url}: {status}");
            Ok(ExitCode::FAILURE)
        }
        Err(error) => {
            eprintln!("{url}: {error:#}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Where the admin side listens, and whether it speaks TLS.
fn configured(arguments: &HealthcheckArgs) -> anyhow::Result<(SocketAddr, bool)> {
    let server = config::find(arguments.config.as_deref()).map(|path| Config::load_without_secrets(&path));
    let server = match (server, arguments.admin) {
        // Who gives an address needs no configuration, unless it is named.
        (Some(Err(_)), Some(_)) if arguments.config.is_none() => None,
        (server, _) => server.transpose()?.map(|config| config.server),
    };
    let listen = match (arguments.admin, &server) {
        (Some(address), _) => address,
        (None, Some(server)) => server.admin_listen,
        (None, None) => config::defaults::ADMIN_LISTEN.parse().context("the default address is none")?,
    };
    Ok((listen, server.is_some_and(|server| server.admin_tls.is_some())))
}

/// Where a listener of this machine is reached: one on all addresses by loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

async fn ask(url: &str) -> anyhow::Result<reqwest::StatusCode> {
    tls::install();
    // It asks an address, and the certificate is for a name: who answers there is not the question.
    let client =
        reqwest::Client::builder().no_proxy().timeout(TIMEOUT).danger_accept_invalid_certs(true).build()?;
    Ok(client.get(url).send().await?.status())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_asked_by_loopback() {
        for (listen, asked) in [
            ("0.0.0.0:4001", "127.0.0.1:4001"),
            ("[::]:4001", "[::1]:4001"),
            ("10.0.0.7:4001", "10.0.0.7:4001"),
        ] {
            assert_eq!(reachable(listen.parse().unwrap()).to_string(), asked);
        }
    }
}
