//! How this proxy meets the others of its deployment.

use std::time::Duration;

use redis::IntoConnectionInfo as _;

use super::super::raw::RawShared;
use super::super::read::At;
use super::super::scalar::Time;
use super::super::{Backend, BackendKind, Control, PolicyParameters, Shared, defaults};
use super::{Checker, time};

impl Checker<'_> {
    pub(super) fn shared(&mut self, raw: &At<RawShared>, policy: &PolicyParameters) -> Option<Shared> {
        let table = &raw.value;
        let Some(reference) = &table.redis else {
            self.findings.missing(&raw.place, "redis", "write `redis = { env = \"REDIS_URL\" }`");
            return None;
        };
        let redis = self.secret(reference)?;
        // Why it is none is not said: the reason would quote the password.
        if redis.expose().into_connection_info().is_err() {
            self.findings.problem(
                &reference.place,
                "is not the URL of a Redis server",
                "set it to `redis://host:6379/0`, or with TLS `rediss://:password@host:6379/0`",
            );
        }
        let ca = table.ca.as_ref().and_then(|written| {
            let path = self.surroundings.folder.join(&written.value);
            self.file(&path, &written.place)?;
            Some(path)
        });
        let slots_part = policy.slot / defaults::SHARED_REFRESHES_A_SLOT;
        let refresh = self.bounded(
            table.refresh.as_ref(),
            defaults::SHARED_REFRESH.min(slots_part),
            (defaults::SHORTEST_SHARED_REFRESH, slots_part),
            "a quarter of `policy.slot`",
        );
        let lease = self.bounded(
            table.lease.as_ref(),
            defaults::SHARED_LEASE.max(refresh * defaults::SHARED_REFRESHES_A_LEASE),
            (refresh * defaults::SHARED_REFRESHES_A_LEASE, defaults::LONGEST_SHARED_LEASE),
            "5m, and six times `refresh` or longer",
        );
        Some(Shared {
            redis,
            ca,
            prefix: self.shared_prefix(table.prefix.as_ref()),
            refresh,
            lease,
            connect_timeout: self
                .time_above_zero(table.connect_timeout.as_ref(), defaults::SHARED_CONNECT_TIMEOUT),
            timeout: self.time_above_zero(table.timeout.as_ref(), defaults::SHARED_TIMEOUT),
        })
    }

    fn shared_prefix(&mut self, written: Option<&At<String>>) -> String {
        let Some(at) = written else { return defaults::SHARED_PREFIX.to_owned() };
        let is_plain = at.value.bytes().all(|byte| byte.is_ascii_graphic());
        if at.value.is_empty() || at.value.len() > defaults::LONGEST_SHARED_PREFIX || !is_plain {
            self.findings.problem(
                &at.place,
                "is empty, too long, or holds more than plain characters",
                "write what all keys begin with, as `breakeven:`",
            );
        }
        at.value.clone()
    }

    fn bounded(
        &mut self,
        written: Option<&At<Time>>,
        default: Duration,
        (least, most): (Duration, Duration),
        bound: &str,
    ) -> Duration {
        let value = time(written, default);
        if let Some(at) = written.filter(|_| value < least || value > most) {
            let what = format!("must be between {} ms and {bound}", least.as_millis());
            self.findings.problem(&at.place, what, "leave it out for the default");
            return default;
        }
        value
    }

    /// A start command that stays in the foreground can be ended only by the process that started it.
    pub(super) fn warn_if_only_the_starter_can_stop(
        &mut self,
        shared: Option<&At<RawShared>>,
        backends: &[Backend],
    ) {
        let Some(shared) = shared else { return };
        for backend in backends {
            let BackendKind::SelfHosted(own) = &backend.kind else { continue };
            if matches!(&own.control, Control::Command { stop, .. } if stop.is_empty()) {
                self.findings.warning(
                    &shared.place,
                    format!("only the proxy that started a replica of `{}` can stop it", backend.name),
                    "give its `control` a `stop` command that works from every proxy",
                );
            }
        }
    }
}
