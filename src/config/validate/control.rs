//! Who starts and stops the replicas of a backend, and how they are found.

use super::super::pattern::is_pattern;
use super::super::raw::{ControlChoice, ControlKind, RawBackend, RawControl};
use super::super::read::At;
use super::super::{Addresses, Control, Place, Workload};
use super::backends::{is_on_loopback, is_plain_http_to_a_network, url_fault};
use super::{Checker, place_of};

/// What a Deployment is called in URLs and roles.
const DEPLOYMENTS: &str = "deployments";
const STATEFUL_SETS: &str = "statefulsets";

impl Checker<'_> {
    pub(super) fn control(&mut self, raw: Option<&At<ControlChoice>>) -> Control {
        let Some(At { value, place }) = raw else { return Control::None };
        let empty = RawControl::default();
        let (kind, table) = match value {
            ControlChoice::Kind(kind) => (*kind, &empty),
            ControlChoice::Table(table) => {
                let Some(kind) = &table.kind else {
                    let remedy = "write `kind = \"none\"`, `\"command\"`, `\"webhook\"` or `\"kubernetes\"`";
                    self.findings.missing(place, "kind", remedy);
                    return Control::None;
                };
                (kind.value, &**table)
            }
        };
        let (command_keys, webhook_keys) = (
            [place_of(table.start.as_ref()), place_of(table.stop.as_ref())],
            [place_of(table.url.as_ref()), place_of(table.secret.as_ref())],
        );
        let kubernetes_keys = [
            place_of(table.api_version.as_ref()),
            place_of(table.resource.as_ref()),
            place_of(table.name.as_ref()),
            place_of(table.namespace.as_ref()),
            place_of(table.kubeconfig.as_ref()),
        ];
        if kind != ControlKind::Command {
            self.refuse_control_keys(command_keys, "command");
        }
        if kind != ControlKind::Webhook {
            self.refuse_control_keys(webhook_keys, "webhook");
        }
        if kind != ControlKind::Kubernetes {
            self.refuse_control_keys(kubernetes_keys, "kubernetes");
        }
        match kind {
            ControlKind::None => Control::None,
            ControlKind::Command => Control::Command {
                start: self.command("start", table.start.as_ref(), place),
                // A start command that is the server itself needs none: it gets a signal.
                stop: match &table.stop {
                    None => Vec::new(),
                    written => self.command("stop", written.as_ref(), place),
                },
            },
            ControlKind::Webhook => self.webhook(table, place),
            ControlKind::Kubernetes => Control::Kubernetes(self.workload(table, place)),
        }
    }

    fn refuse_control_keys<const N: usize>(&mut self, places: [Option<Place>; N], kind: &str) {
        for place in places.into_iter().flatten() {
            let what = format!("belongs to `kind = \"{kind}\"`");
            self.findings.problem(&place, what, "remove it, or change the kind");
        }
    }

    fn command(&mut self, key: &str, written: Option<&At<Vec<At<String>>>>, table: &Place) -> Vec<String> {
        let words: Vec<String> =
            written.map_or_else(Vec::new, |at| at.value.iter().map(|word| word.value.clone()).collect());
        if words.first().is_none_or(String::is_empty) {
            let place = written.map_or(table, |at| &at.place);
            let remedy = format!("write the program and its arguments, as `{key} = [\"./gpu\", \"{key}\"]`");
            self.findings.problem(place, format!("`{key}` names no program"), remedy);
        }
        words
    }

    fn webhook(&mut self, table: &RawControl, place: &Place) -> Control {
        let url = table.url.as_ref();
        let fault = match url {
            None => Some("has no `url`".to_owned()),
            Some(url) => url_fault(&url.value, "are not sent: `secret` signs orders instead", true),
        };
        if let Some(fault) = fault {
            let place = url.map_or(place, |url| &url.place);
            self.findings.problem(place, fault, "write where to post, as `https://ops.example/gpu`");
        }
        if let Some(url) = url.filter(|url| table.secret.is_none() && !is_on_loopback(&url.value)) {
            let (what, remedy) = if is_plain_http_to_a_network(&url.value) {
                (
                    "orders go there unsigned and in the clear: whoever is on the way or reaches the receiver can \
                     start and stop machines that you pay",
                    "write an `https` URL and `secret = { env = \"BREAKEVEN_WEBHOOK_SECRET\" }`, and verify what is \
                     signed with it",
                )
            } else {
                (
                    "orders go there unsigned: the receiver cannot tell them from somebody else's",
                    "write `secret = { env = \"BREAKEVEN_WEBHOOK_SECRET\" }`, and verify what is signed with it",
                )
            };
            self.findings.warning(&url.place, what, remedy);
        }
        Control::Webhook {
            url: url.map(|url| url.value.clone()).unwrap_or_default(),
            secret: table.secret.as_ref().and_then(|reference| self.secret(reference)),
        }
    }

    fn workload(&mut self, table: &RawControl, place: &Place) -> Workload {
        if table.name.is_none() {
            self.findings.missing(place, "name", "write the workload's name, as `name = \"vllm\"`");
        }
        let text = |written: &Option<At<String>>, default: &str| {
            written.as_ref().map_or_else(|| default.to_owned(), |at| at.value.clone())
        };
        for written in [&table.resource, &table.name, &table.namespace].into_iter().flatten() {
            if !is_kubernetes_name(&written.value) {
                let remedy = "write lower-case letters, digits, `-` and `.`, as `kubectl get` shows it";
                self.findings.problem(&written.place, "is no name in Kubernetes", remedy);
            }
        }
        if let Some(written) = &table.api_version
            && !written.value.split('/').all(is_kubernetes_name)
        {
            let remedy = "write group and version, as `apps/v1`";
            self.findings.problem(&written.place, "is no API version in Kubernetes", remedy);
        }
        Workload {
            api_version: text(&table.api_version, "apps/v1"),
            resource: text(&table.resource, DEPLOYMENTS),
            namespace: table.namespace.as_ref().map(|at| at.value.clone()),
            name: text(&table.name, ""),
            kubeconfig: table.kubeconfig.as_ref().map(|at| self.surroundings.folder.join(&at.value)),
        }
    }

    /// How replicas are found must suit who controls them.
    pub(super) fn check_addresses(&mut self, raw: &RawBackend, base_urls: &[String], control: &Control) {
        let is_dns = raw.addresses.as_ref().is_some_and(|written| written.value == Addresses::Dns);
        let are_numbered = base_urls.len() > 1 || base_urls.iter().any(|url| is_pattern(url));
        if let Some(place) = place_of(raw.addresses.as_ref()).filter(|_| is_dns) {
            if are_numbered {
                let remedy = "write the one base URL whose host has all addresses";
                self.findings.problem(&place, "needs one plain base URL", remedy);
            }
            if base_urls.iter().any(|url| !url.starts_with("http://")) {
                let remedy = "write an `http://` base URL, or one URL for each replica";
                self.findings.problem(&place, "has no certificates for single addresses", remedy);
            }
            if raw.max_replicas.is_none() {
                let remedy = "write how many replicas there may be, as `max_replicas = 4`";
                self.findings.problem(&place, "says nothing of how many replicas there may be", remedy);
            }
            if matches!(control, Control::Command { .. } | Control::Webhook { .. }) {
                let remedy = "write one base URL for each replica, or `{replica}` in it";
                self.findings.problem(&place, "does not tell which replica a start or stop is for", remedy);
            }
        }
        let (Control::Kubernetes(workload), Some(place)) = (control, place_of(raw.control.as_ref())) else {
            return;
        };
        if workload.resource == DEPLOYMENTS && are_numbered {
            let remedy = "write a headless service's URL with `addresses = \"dns\"`, or use a StatefulSet";
            self.findings.problem(&place, "the pods of a Deployment have no numbers", remedy);
        }
        if workload.resource == STATEFUL_SETS && !are_numbered {
            let remedy = "number the replicas, as `http://vllm-{replica}.vllm.models.svc:8000/v1`, or use a Deployment";
            self.findings.problem(
                &place,
                "a StatefulSet stops its highest pod, whose address is not known",
                remedy,
            );
        }
    }
}

/// Labels and subdomains of RFC 1123.
fn is_kubernetes_name(text: &str) -> bool {
    let is_inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let is_edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    text.len() <= 253
        && text.bytes().all(is_inside)
        && is_edge(text.bytes().next())
        && is_edge(text.bytes().next_back())
}
