//! Replicas that are scaled through Kubernetes' API, and replicas found by DNS.
//!
//! The API server is the one of `support::cluster`: no `kube-apiserver` is in any package that CI could install. The
//! client, the requests and the connections are real.

use std::sync::Arc;
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::config::{self, Backend, BackendKind, Config, Control};
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::fleet::{Fleet, Lookup, ReplicaState};
use breakeven::upstream::delivery::Delivery;
use breakeven::upstream::pool::{Pool, PoolSettings};
use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body_util::BodyExt;

use crate::support::cluster::{Cluster, Fault, NAME, NAMESPACE};
use crate::support::proxy::Proxy;
use crate::support::stage::{START, Stage};
use crate::support::{Http, chat, free_ports, soon};

const ROUTE: &str = "[routes.chat]\nmodels = ['m']\npolicy = 'self_hosted'\noffers = [{ backend = 'gpu' }]\n";

/// A backend as an owner writes it, with the cluster's kubeconfig.
fn backend(cluster: &Cluster, base_url: &str, extra: &str) -> Backend {
    let kubeconfig = cluster.kubeconfig();
    let text = format!(
        "[backends.gpu]\nkind = 'self_hosted'\nserver = 'other'\nbase_url = '{base_url}'\n{extra}\n\
         hourly_usd = 3.6\nstartup = '1h'\nminimum = '0s'\nmax_replicas = 3\n\
         capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8 }}\n\
         [backends.gpu.control]\nkind = 'kubernetes'\nname = '{NAME}'\nresource = '{}'\nkubeconfig = '{}'\n{ROUTE}",
        if base_url.contains("{replica}") || base_url.contains("replica}") {
            "statefulsets"
        } else {
            "deployments"
        },
        kubeconfig.display(),
    );
    let config = parse(&text).unwrap_or_else(|problems| panic!("{problems}"));
    config.backends.into_iter().next().unwrap()
}

fn parse(text: &str) -> Result<Config, breakeven::config::Problems> {
    config::parse(text, "test", &config::variable)
}

fn headless(cluster: &Cluster) -> Stage {
    let url = format!("http://vllm.models.svc:{}/v1", cluster.pod_port);
    let backend = backend(cluster, &url, "addresses = 'dns'");
    Stage::with_lookup(&backend, cluster.dns())
}

fn no_dns() -> Lookup {
    Arc::new(|host, _| panic!("`{host}` needs no look-up"))
}

#[tokio::test]
async fn a_deployment_is_scaled_up_and_down_by_its_count() {
    let cluster = Cluster::start("deployments").await;
    let stage = headless(&cluster);
    stage.fleet.set_target(2);
    stage.until_count(ReplicaState::Ready, 2).await;
    assert_eq!(cluster.spec(), 2);
    let mut urls: Vec<_> = stage.fleet.snapshot().into_iter().map(|view| view.base_url).collect();
    urls.sort();
    let ours: Vec<_> = cluster.pods().iter().map(|pod| format!("http://{pod}/v1")).collect();
    assert_eq!(urls[..2], ours);
    stage.fleet.set_target(0);
    stage.until_count(ReplicaState::Stopped, 3).await;
    assert_eq!((cluster.spec(), cluster.pods().len()), (0, 0));
    // Written when it differed, and only then.
    assert_eq!(cluster.asked("patch deployments/scale"), 2, "{:?}", cluster.requests());
}

#[tokio::test]
async fn the_drained_pod_is_the_one_that_goes_and_a_call_in_flight_keeps_its_own() {
    let cluster = Cluster::start("deployments").await;
    let stage = headless(&cluster);
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Ready, 1).await;
    stage.clock.advance(Duration::from_secs(1));
    stage.fleet.set_target(2);
    stage.until_count(ReplicaState::Ready, 2).await;
    let leases = [(); 2].map(|()| stage.fleet.acquire().unwrap());
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Draining, 1).await;
    let started = stage.clock.now();
    stage.until(|_| stage.clock.now().since(started) > Duration::from_mins(1)).await;
    assert_eq!((cluster.spec(), cluster.pods().len()), (2, 2), "the stream holds its pod");
    let stays = leases.iter().find(|lease| lease.state() == ReplicaState::Ready).unwrap().address();
    drop(leases);
    stage.until_count(ReplicaState::Stopped, 2).await;
    assert_eq!(cluster.pods(), Vec::from_iter(stays));
    assert_eq!(cluster.asked("patch pods"), 1, "{:?}", cluster.requests());
}

#[tokio::test]
async fn conflicts_busy_servers_and_errors_are_tried_again_and_a_pod_that_cannot_be_marked_is_no_obstacle() {
    let cluster = Cluster::start("deployments").await;
    cluster.fail_next(&[Fault::TooManyRequests, Fault::Internal, Fault::Overtaken, Fault::Overtaken]);
    cluster.forbid("list pods");
    let stage = headless(&cluster);
    stage.fleet.set_target(2);
    stage.until_count(ReplicaState::Ready, 2).await;
    // Two that were overtaken, and the one that was not.
    assert_eq!(cluster.asked("patch deployments/scale 2"), 3, "{:?}", cluster.requests());
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Stopped, 2).await;
    assert_eq!((cluster.spec(), cluster.asked("list pods")), (1, 1));
    stage.until_count(ReplicaState::Ready, 1).await;
    assert!(
        stage.events.lock().unwrap().iter().all(|event| !event.kind.is_trouble()),
        "{:?}",
        stage.sentences()
    );
}

#[tokio::test]
async fn a_role_that_lacks_a_right_is_named_the_start_is_tried_again_and_its_rent_is_counted() {
    let cluster = Cluster::start("deployments").await;
    cluster.forbid("patch deployments/scale");
    let stage = headless(&cluster);
    stage.fleet.set_target(1);
    let wanted =
        "did not start: the role lacks `get` or `patch` on `deployments/scale` in namespace `models` (403)";
    stage.until(|_| stage.has_told(wanted)).await;
    assert_eq!(cluster.asked("patch deployments/scale"), 1, "a refusal is not repeated at once");
    stage.until(|_| cluster.asked("patch deployments/scale") >= 3).await;
    let refused = stage.clock.now().since(START);
    assert!(refused >= Duration::from_secs(5 + 10), "pauses of 5 s and 10 s, after {refused:?}");
    cluster.grant_all();
    stage.until_count(ReplicaState::Ready, 1).await;
    assert!(stage.fleet.accrue(stage.clock.now()).replica_millis > 0);
}

#[tokio::test]
async fn a_workload_that_is_not_there_is_named() {
    let cluster = Cluster::start("statefulsets").await;
    let stage = headless(&cluster);
    stage.fleet.set_target(1);
    stage.until(|_| stage.has_told("namespace `models` has no `deployments/vllm` with a scale (404)")).await;
    assert_eq!(stage.fleet.count(ReplicaState::Starting), 0, "nothing is begun before the count is known");
}

#[tokio::test]
async fn of_a_stateful_set_the_highest_pod_goes_first() {
    let cluster = Cluster::start("statefulsets").await;
    let url = format!("http://127.0.1.{{1+replica}}:{}/v1", cluster.pod_port);
    let stage = Stage::with_lookup(&backend(&cluster, &url, ""), no_dns());
    stage.fleet.set_target(3);
    stage.until_count(ReplicaState::Ready, 3).await;
    let leases = [(); 3].map(|()| stage.fleet.acquire().unwrap());
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Draining, 2).await;
    let [_first, second, third] = leases;
    drop(second);
    let started = stage.clock.now();
    stage.until(|_| stage.clock.now().since(started) > Duration::from_mins(1)).await;
    assert_eq!(cluster.spec(), 3, "the second waits for the third");
    drop(third);
    stage.until_count(ReplicaState::Stopped, 2).await;
    assert_eq!((cluster.spec(), cluster.pods().len()), (1, 1));
    assert_eq!(stage.fleet.replicas()[0].state(), ReplicaState::Ready);
    assert_eq!(cluster.asked("list pods"), 0);
}

/// The program is run where a mount of our own hides `/var/run`, as its path for credentials cannot be chosen.
#[tokio::test]
async fn in_a_pod_the_credentials_are_those_that_are_mounted() {
    const MOUNT: &str =
        "mount -t tmpfs tmpfs /var/run; mkdir -p $0; mount --bind \"$1\" $0; shift; exec \"$@\"";
    const AT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    let cluster = Cluster::start("statefulsets").await;
    let (folder, port) = (tempfile::tempdir().unwrap(), free_ports(2));
    let admin = format!("127.0.0.1:{}", port + 1);
    let config = format!(
        "[server]\nlisten = '127.0.0.1:{port}'\nadmin_listen = '{admin}'\n[ledger]\npath = '{}'\n\
         [backends.gpu]\nkind = 'self_hosted'\nserver = 'other'\nbase_url = 'http://127.0.1.{{1+replica}}:{}/v1'\n\
         hourly_usd = 3.6\nmax_replicas = 2\n\
         capacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 1000, max_in_flight = 8 }}\n\
         control = {{ kind = 'kubernetes', resource = 'statefulsets', name = '{NAME}' }}\n{ROUTE}",
        folder.path().join("breakeven.db").display(),
        cluster.pod_port
    );
    std::fs::write(folder.path().join("breakeven.toml"), config).unwrap();
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let _program = tokio::process::Command::new("unshare")
        .args((!rustix::process::geteuid().is_root()).then_some("--map-root-user"))
        .args(["--mount", "sh", "-euc", MOUNT, AT])
        .arg(cluster.service_account())
        .args([env!("CARGO_BIN_EXE_breakeven"), "serve", "--config"])
        .arg(folder.path().join("breakeven.toml"))
        .env("KUBERNETES_SERVICE_HOST", cluster.api.ip().to_string())
        .env("KUBERNETES_SERVICE_PORT", cluster.api.port().to_string())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let http = Http::new(&format!("http://{admin}"));
    let pinned = async || {
        let body = Bytes::from_static(br#"{"pool": "gpu", "backend": "gpu"}"#);
        let request = http.request(Method::POST, "/api/pin").header("content-type", "application/json");
        http.start(request, body).await.ok().filter(|reply| reply.status().is_success())
    };
    let is_ready = async || {
        let status = http.get("/api/status").await.json();
        (status["pools"][0]["replicas"]["ready"] == 1).then_some(())
    };
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap();
    let patience = Duration::from_secs(30);
    soon(patience, pinned).await.unwrap_or_else(|| panic!("it is not up: {}", log()));
    soon(patience, is_ready).await.unwrap_or_else(|| panic!("no replica is ready: {}", log()));
    assert_eq!(cluster.requests().last().unwrap(), "patch statefulsets/scale 1");
    assert_eq!((cluster.spec(), cluster.pods().len()), (1, 1), "{}", log());
}

#[tokio::test]
async fn pods_that_start_already_are_taken_over_and_a_count_changed_by_hand_is_put_right() {
    let cluster = Cluster::start("deployments").await;
    cluster.scale_by_hand(2);
    let stage = headless(&cluster);
    stage.until_count(ReplicaState::Ready, 2).await;
    stage.fleet.set_target(2);
    stage.until(|_| cluster.asked("get deployments/scale") > 0).await;
    cluster.scale_by_hand(3);
    stage.until(|_| cluster.spec() == 2).await;
    assert_eq!(cluster.asked("patch deployments/scale"), 1, "{:?}", cluster.requests());
    stage.until_count(ReplicaState::Ready, 2).await;
}

#[tokio::test]
async fn what_others_scale_is_found_by_dns_and_left_when_it_is_gone() {
    let cluster = Cluster::start("deployments").await;
    let url = format!("http://vllm.models.svc:{}/v1", cluster.pod_port);
    let mut backend = backend(&cluster, &url, "addresses = 'dns'");
    let BackendKind::SelfHosted(own) = &mut backend.kind else { unreachable!("it is rented") };
    own.control = Control::None;
    let clock = Clock::manual(START);
    let fleet = Fleet::with_lookup(&backend, clock.clone(), Box::new(|_| {}), cluster.dns());
    let stage = Stage { fleet, clock, events: Arc::default() };
    cluster.scale_by_hand(3);
    stage.until_count(ReplicaState::Ready, 3).await;
    let stream = stage.fleet.acquire().unwrap();
    cluster.scale_by_hand(1);
    let addresses =
        |fleet: &Fleet| fleet.replicas().iter().filter_map(|replica| replica.address()).collect::<Vec<_>>();
    stage.until(|fleet| addresses(fleet) == cluster.pods()).await;
    stage.until_count(ReplicaState::Ready, 1).await;
    drop(stream);
    assert_eq!(cluster.requests(), Vec::<String>::new(), "somebody else scales it");
}

#[tokio::test]
async fn connections_to_an_address_that_is_no_longer_ours_are_not_used_again() {
    let cluster = Cluster::start("deployments").await;
    cluster.scale_by_hand(2);
    let pods = cluster.pods();
    let endpoint = Arc::new(breakeven::fleet::Endpoint::from_pointee(pods[0]));
    let settings = PoolSettings {
        connect_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_mins(1),
        max_idle: 8,
    };
    let pool = Pool::at("http://vllm.models.svc:8000", settings, Some(Arc::clone(&endpoint))).unwrap();
    let ask = || async {
        let sent = pool
            .send(&Method::GET, "/health", &HeaderMap::new(), Bytes::new(), &Delivery::default())
            .await
            .unwrap();
        assert_eq!(sent.into_body().collect().await.unwrap().to_bytes(), "{}");
    };
    ask().await;
    assert_eq!((pool.address(), pool.idle_connections()), (Some(pods[0]), 1));
    endpoint.store(Some(Arc::new(pods[1])));
    // The first pod goes; had its connection been used again, the call would have failed or gone there.
    cluster.scale_by_hand(0);
    cluster.scale_by_hand(1);
    let fresh = cluster.pods()[0];
    endpoint.store(Some(Arc::new(fresh)));
    ask().await;
    assert_eq!((pool.address(), pool.idle_connections()), (Some(fresh), 1));
}

#[tokio::test]
async fn a_proxy_sends_calls_to_the_addresses_that_a_name_has() {
    let fake = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let proxy = Proxy::start(&format!(
        "[backends.gpu]\nkind = 'self_hosted'\nbase_url = 'http://localhost:{}/v1'\naddresses = 'dns'\n\
         max_replicas = 4\nhourly_usd = 1\nhealth = {{ path = '' }}\nmetrics = ''\n\
         capacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 1000, max_in_flight = 8 }}\n\
         [routes.chat]\nmodels = ['m']\npolicy = 'self_hosted'\noffers = [{{ backend = 'gpu' }}]\n",
        fake.address().port()
    ))
    .await
    .ready()
    .await;
    let reply = Http::new(&proxy.url()).post("/chat/completions", &chat("m")).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(fake.calls().len(), 1);
    assert_eq!(proxy.entries().await.len(), 1);
}

#[test]
fn what_does_not_fit_together_is_refused_with_a_remedy() {
    let refused = |base_url: &str, more: &str, expected: &str| {
        let text = format!(
            "[backends.gpu]\nkind = 'self_hosted'\nbase_url = '{base_url}'\nhourly_usd = 1\n{more}\n\
             [backends.gpu.capacity]\ninput_tokens_per_second = 1\noutput_tokens_per_second = 1\nmax_in_flight = 1\n"
        );
        let problems = parse(&text).expect_err(more).to_string();
        assert!(problems.contains(expected), "{more}:\n{problems}");
    };
    let (one, numbered) = ("http://vllm.models.svc:8000/v1", "http://vllm-{replica}.vllm:8000/v1");
    let dns = "addresses = 'dns'\nmax_replicas = 2";
    refused(one, "addresses = 'dns'", "write how many replicas there may be");
    refused(numbered, dns, "needs one plain base URL");
    refused("https://vllm.models.svc/v1", dns, "has no certificates for single addresses");
    let command = format!("{dns}\ncontrol = {{ kind = 'command', start = ['x'] }}");
    refused(one, &command, "does not tell which replica");
    refused(one, "control = 'kubernetes'", "`name`");
    refused(one, "control = { kind = 'kubernetes', name = 'VLLM' }", "is no name in Kubernetes");
    refused(
        one,
        "control = { kind = 'kubernetes', name = 'v', api_version = 'apps/V1' }",
        "is no API version",
    );
    refused(
        one,
        "control = { kind = 'command', start = ['x'], name = 'v' }",
        "belongs to `kind = \"kubernetes\"`",
    );
    refused(
        numbered,
        "control = { kind = 'kubernetes', name = 'v' }",
        "pods of a Deployment have no numbers",
    );
    let set = "control = { kind = 'kubernetes', name = 'v', resource = 'statefulsets' }";
    refused(one, set, "a StatefulSet stops its highest pod");
}

#[test]
fn the_defaults_are_those_of_a_deployment_in_our_own_namespace() {
    let text = "[backends.gpu]\nkind = 'self_hosted'\nbase_url = 'http://vllm.models.svc:8000/v1'\nhourly_usd = 1\n\
                control = { kind = 'kubernetes', name = 'vllm' }\n[backends.gpu.capacity]\n\
                input_tokens_per_second = 1\noutput_tokens_per_second = 1\nmax_in_flight = 1\n";
    let config = parse(&format!("{text}{ROUTE}")).unwrap();
    let BackendKind::SelfHosted(own) = &config.backends[0].kind else { unreachable!("it is rented") };
    let Control::Kubernetes(workload) = &own.control else { panic!("{:?}", own.control) };
    assert_eq!((workload.api_version.as_str(), workload.resource.as_str()), ("apps/v1", "deployments"));
    assert_eq!((&workload.namespace, &workload.kubeconfig), (&None, &None));
    assert_eq!(NAMESPACE, "models");
}
