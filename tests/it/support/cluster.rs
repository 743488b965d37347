//! A cluster in the test: an API server that answers as Kubernetes' own does for scales and pods, and pods that are
//! HTTP servers on loopback addresses of their own.
//!
//! It stands in for a `kube-apiserver`, and is strict where a client can go wrong: it speaks TLS with a certificate that
//! only its own authority vouches for, no credentials are 401, a verb that the role lacks is 403, an unknown object 404, a patch of another type than JSON merge 415, and a patch with
//! an old `resourceVersion` 409. Its errors are `Status` objects. Its controllers act at once: they make pods, and
//! delete first those that are not ready, then those of the lowest deletion cost, then the newest; or, for a
//! StatefulSet, the one with the highest ordinal.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use breakeven::fleet::Lookup;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

const TOKEN: &str = "a-service-accounts-token";
pub(crate) const NAMESPACE: &str = "models";
pub(crate) const NAME: &str = "vllm";

/// One fault, answered once in the place of what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Somebody else writes first.
    Overtaken,
    /// 429 with `Retry-After`.
    TooManyRequests,
    /// 500.
    Internal,
}

#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) pod_port: u16,
    /// Of the API server.
    pub(crate) api: SocketAddr,
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    resource: &'static str,
    spec: u32,
    version: u64,
    pods: BTreeMap<u32, Pod>,
    made: u32,
    pod_port: u16,
    /// What the role lacks, as `patch deployments/scale`.
    lacks: Vec<String>,
    faults: Vec<Fault>,
    /// Verb and path of each request, and the count of a patch.
    requests: Vec<String>,
}

#[derive(Debug)]
struct Pod {
    deletion_cost: i64,
    server: JoinHandle<()>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Makes a certificate for the API server, and writes the credentials of its clients: a kubeconfig, and what a pod has.
fn identify(api: &SocketAddr, folder: &Path) -> TlsAcceptor {
    let certified = rcgen::generate_simple_self_signed(vec![api.ip().to_string()]).unwrap();
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
         clusters: [{{name: test, cluster: {{server: \"https://{api}\", certificate-authority: ca.crt}}}}]\n\
         users: [{{name: test, user: {{token: {TOKEN}}}}}]\n\
         contexts: [{{name: test, context: {{cluster: test, user: test, namespace: {NAMESPACE}}}}}]\n"
    );
    let authority = certified.cert.pem();
    for (name, text) in [
        ("kubeconfig", kubeconfig.as_str()),
        ("ca.crt", &authority),
        ("token", TOKEN),
        ("namespace", NAMESPACE),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// Pods are at 127.0.1.1, 127.0.1.2, .. and all at the same port, as those of a headless service are.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 1, 1)) + number)
}

impl Cluster {
    /// An API server with one workload, without pods.
    pub(crate) async fn start(resource: &'static str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = listener.local_addr().unwrap();
        // Free on the first pod's address, and taken there for this test alone.
        let probe = std::net::TcpListener::bind((address(0), 0)).unwrap();
        let pod_port = probe.local_addr().unwrap().port();
        drop(probe);
        let state = Arc::new(Mutex::new(State {
            resource,
            spec: 0,
            version: 1000,
            pods: BTreeMap::new(),
            made: 0,
            pod_port,
            lacks: Vec::new(),
            faults: Vec::new(),
            requests: Vec::new(),
        }));
        let folder = tempfile::tempdir().unwrap();
        let tls = identify(&api, folder.path());
        let shared = Arc::clone(&state);
        let server =
            tokio::spawn(serve(listener, Some(tls), move |request| answer(Arc::clone(&shared), request)));
        Self { pod_port, api, state, folder, server }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// The folder that the kubelet mounts into a pod: the API server's authority, the token and the namespace of the
    /// pod's service account.
    pub(crate) fn service_account(&self) -> &Path {
        self.folder.path()
    }

    /// Replaces what the next requests are answered.
    pub(crate) fn fail_next(&self, faults: &[Fault]) {
        self.state().faults = faults.iter().rev().copied().collect();
    }

    /// Takes a right from the role: `patch deployments/scale`.
    pub(crate) fn forbid(&self, right: &str) {
        self.state().lacks.push(right.to_owned());
    }

    pub(crate) fn grant_all(&self) {
        self.state().lacks.clear();
    }

    /// Sets the count as `kubectl scale` does.
    pub(crate) fn scale_by_hand(&self, count: u32) {
        self.state().set(count);
    }

    pub(crate) fn spec(&self) -> u32 {
        self.state().spec
    }

    /// Addresses of the pods, in order.
    pub(crate) fn pods(&self) -> Vec<SocketAddr> {
        let state = self.state();
        state.pods.keys().map(|number| SocketAddr::from((address(*number), state.pod_port))).collect()
    }

    /// What was asked: `patch deployments/scale 2`.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    pub(crate) fn asked(&self, what: &str) -> usize {
        self.state().requests.iter().filter(|request| request.starts_with(what)).count()
    }

    /// The cluster's DNS: a headless service's name has the addresses of the pods, and none at all without any.
    pub(crate) fn dns(&self) -> Lookup {
        let state = Arc::clone(&self.state);
        Arc::new(move |host, port| {
            assert_eq!(host, "vllm.models.svc");
            let state = state.lock().unwrap();
            if state.pods.is_empty() {
                return Err(std::io::Error::other("Name or service not known"));
            }
            Ok(state.pods.keys().map(|number| SocketAddr::from((address(*number), port))).collect())
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn set(&mut self, count: u32) {
        self.spec = count;
        self.version += 1;
        let is_ordered = self.resource == "statefulsets";
        while self.pods.len() < count as usize {
            let number = if is_ordered { u32::try_from(self.pods.len()).unwrap() } else { self.made };
            self.made += 1;
            let listener = std::net::TcpListener::bind((address(number), self.pod_port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let server = tokio::spawn(serve(listener, None, |_| async { reply(StatusCode::OK, &json!({})) }));
            self.pods.insert(number, Pod { deletion_cost: 0, server });
        }
        while self.pods.len() > count as usize {
            let rank = |(number, pod): &(&u32, &Pod)| {
                (if is_ordered { 0 } else { pod.deletion_cost }, std::cmp::Reverse(**number))
            };
            let gone = *self.pods.iter().min_by_key(rank).unwrap().0;
            self.pods.remove(&gone);
        }
    }

    fn scale(&self, running: usize) -> Value {
        json!({
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": {
                "name": NAME, "namespace": NAMESPACE, "uid": "0f1e", "resourceVersion": self.version.to_string(),
                "creationTimestamp": "2025-11-24T09:00:00Z",
            },
            "spec": if self.spec == 0 { json!({}) } else { json!({ "replicas": self.spec }) },
            "status": { "replicas": running, "selector": "app=vllm" },
        })
    }

    fn pod(number: u32) -> Value {
        json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": { "name": format!("vllm-{number}"), "namespace": NAMESPACE, "labels": { "app": "vllm" } },
        })
    }
}

async fn serve<F, A>(listener: tokio::net::TcpListener, tls: Option<TlsAcceptor>, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    // Dropped with the listener, so that a pod that is deleted breaks its connections.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, answer) = (tls.clone(), answer.clone());
        connections.spawn(async move {
            match tls {
                None => converse(stream, answer).await,
                // A client that does not trust us has gone.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        converse(stream, answer).await;
                    }
                }
            }
        });
    }
}

async fn converse<S, F, A>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Full<Bytes>>>,
{
    let service = service_fn(move |request| {
        let answering = answer(request);
        async move { Ok::<_, Infallible>(answering.await) }
    });
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

fn reply(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

fn failure(status: StatusCode, reason: &str, message: &str) -> Response<Full<Bytes>> {
    let mut body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": status.as_u16(),
    });
    if status == StatusCode::TOO_MANY_REQUESTS {
        body["details"] = json!({ "retryAfterSeconds": 1 });
    }
    reply(status, &body)
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let patch: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut state = state.lock().unwrap();
    if head.headers.get("authorization").is_none_or(|value| value != &format!("Bearer {TOKEN}")) {
        return failure(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized");
    }
    let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    let workloads = format!("/apis/apps/v1/namespaces/{NAMESPACE}/{}", state.resource);
    let (verb, what) = match (&head.method, path) {
        (&Method::GET, path) if path == pods => ("list", "pods".to_owned()),
        (&Method::PATCH, path) if path.starts_with(&pods) => ("patch", "pods".to_owned()),
        (&Method::GET, path) if path.ends_with("/scale") => ("get", format!("{}/scale", state.resource)),
        (&Method::PATCH, path) if path.ends_with("/scale") => ("patch", format!("{}/scale", state.resource)),
        _ => {
            return failure(
                StatusCode::NOT_FOUND,
                "NotFound",
                "the server could not find the requested resource",
            );
        }
    };
    let count = patch["spec"]["replicas"].as_u64();
    let right = format!("{verb} {what}");
    state.requests.push(count.map_or_else(|| right.clone(), |count| format!("{right} {count}")));
    if state.lacks.contains(&right) {
        let message = format!(
            "{what} \"{NAME}\" is forbidden: User \"system:serviceaccount:llm:breakeven\" cannot {verb} resource"
        );
        return failure(StatusCode::FORBIDDEN, "Forbidden", &message);
    }
    if head.method == Method::PATCH && head.headers["content-type"] != "application/merge-patch+json" {
        return failure(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", "merge patches only");
    }
    if what == "pods" {
        return answer_about_pods(&mut state, path, query, &patch);
    }
    if path != format!("{workloads}/{NAME}/scale") {
        let message = format!("{what} of \"{path}\" not found");
        return failure(StatusCode::NOT_FOUND, "NotFound", &message);
    }
    match state.faults.last() {
        Some(Fault::TooManyRequests) => {
            state.faults.pop();
            return failure(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", "too many requests");
        }
        Some(Fault::Internal) => {
            state.faults.pop();
            return failure(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "etcdserver: leader changed");
        }
        Some(Fault::Overtaken) if verb == "patch" => {
            state.faults.pop();
            state.version += 1;
        }
        Some(Fault::Overtaken) | None => {}
    }
    let running = state.pods.len();
    if verb == "get" {
        return reply(StatusCode::OK, &state.scale(running));
    }
    let version = patch["metadata"]["resourceVersion"].as_str();
    if version.is_some_and(|version| version != state.version.to_string()) {
        let message = format!(
            "Operation cannot be fulfilled on {what} \"{NAME}\": the object has been modified; please apply your changes to the latest version and try again"
        );
        return failure(StatusCode::CONFLICT, "Conflict", &message);
    }
    let Some(count) = count.and_then(|count| u32::try_from(count).ok()) else {
        return failure(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", "spec.replicas: Invalid value");
    };
    state.set(count);
    // The status is that of before: controllers come after.
    reply(StatusCode::OK, &state.scale(running))
}

fn answer_about_pods(state: &mut State, path: &str, query: &str, patch: &Value) -> Response<Full<Bytes>> {
    let number = path.rsplit_once("/vllm-").and_then(|(_, number)| number.parse::<u32>().ok());
    if let Some(number) = number {
        let metadata = State::pod(number);
        let Some(pod) = state.pods.get_mut(&number) else {
            return failure(StatusCode::NOT_FOUND, "NotFound", "no such pod");
        };
        let cost = &patch["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"];
        pod.deletion_cost = cost.as_str().unwrap().parse().unwrap();
        return reply(StatusCode::OK, &metadata);
    }
    let wanted = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=status.podIP%3D"));
    let found: Vec<_> = state
        .pods
        .keys()
        .filter(|number| Some(address(**number).to_string().as_str()) == wanted)
        .map(|number| State::pod(*number))
        .collect();
    let list = json!({
        "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
        "metadata": { "resourceVersion": "1" }, "items": found,
    });
    reply(StatusCode::OK, &list)
}
