//! Control by the scale of a Kubernetes workload: the `scale` subresource of a Deployment, a StatefulSet or a
//! custom resource that has one.
//!
//! A scale is a count, and the state machine asks for the count that is to be: it is read, and written when it
//! differs, on the condition that nobody has changed it in between (`resourceVersion`). So an order that is
//! repeated changes nothing, and one that was overtaken by another writer looks again before it writes.
//!
//! Which pod goes is Kubernetes' choice. A StatefulSet takes the highest ordinal. A ReplicaSet takes pods that are
//! not ready first, then those with the lowest `controller.kubernetes.io/pod-deletion-cost`, which is written on
//! the drained ones before the count is lowered.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;
use tokio::sync::OnceCell;
use tracing::warn;

use crate::clock::Clock;
use crate::config::Workload;
use crate::health::probe::root_cause;
use crate::tls;

/// Tries of one order, the first included.
pub const ATTEMPTS: u32 = 5;
/// Pause before the second try; doubles.
pub const FIRST_RETRY: Duration = Duration::from_secs(1);
/// A longer `Retry-After` is cut to this.
pub const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Pause after somebody else has changed the scale between our reading and our writing.
pub const CONFLICT_RETRY: Duration = Duration::from_millis(100);
/// Bound on one try, in real time.
pub const TRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Who we are in `managedFields`.
const FIELD_MANAGER: &str = "breakeven";
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Below every pod whose cost nobody has written (0).
const COST_OF_A_DRAINED_POD: &str = "-1000";

/// What a scale says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scale {
    /// How many pods are to be (`spec.replicas`).
    pub(super) wanted: u32,
    /// How many there are, ready or not (`status.replicas`).
    pub(super) running: u32,
}

/// A workload and the connection to its API server, made when it is first needed.
#[derive(Debug)]
pub(super) struct Scaler {
    workload: Workload,
    client: OnceCell<Connected>,
}

struct Connected {
    client: Client,
    namespace: String,
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Connected").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// One try that failed.
struct Failure {
    reason: String,
    /// How long to wait before the next try; none: another would fail as well.
    retry_in: Option<Duration>,
}

impl Scaler {
    pub(super) fn new(workload: Workload) -> Self {
        Self { workload, client: OnceCell::new() }
    }

    /// Makes the workload's count `count`, or, without one, reads it. `leaving` are the addresses of the drained
    /// replicas, which had better be those that go.
    pub(super) async fn set(
        &self,
        count: Option<u32>,
        leaving: &[IpAddr],
        clock: &Clock,
    ) -> Result<Scale, String> {
        let mut pause = FIRST_RETRY;
        let mut attempt = 1;
        loop {
            let tried = tokio::time::timeout(TRY_TIMEOUT, self.set_once(count, leaving)).await;
            let failure = match tried {
                Ok(Ok(scale)) => return Ok(scale),
                Ok(Err(failure)) => failure,
                Err(_) => Failure::transient("the API server did not answer in time".to_owned()),
            };
            let Some(asked) = failure.retry_in.filter(|_| attempt < ATTEMPTS) else {
                return Err(failure.reason);
            };
            let wait = if asked == CONFLICT_RETRY { asked } else { asked.max(pause) };
            tokio::time::sleep(clock.real(wait.mul_f64(1.0 + fastrand::f64() / 4.0))).await;
            pause *= 2;
            attempt += 1;
        }
    }

    async fn set_once(&self, count: Option<u32>, leaving: &[IpAddr]) -> Result<Scale, Failure> {
        let Connected { client, namespace } = self.client.get_or_try_init(|| self.connect()).await?;
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), namespace, &api_resource(&self.workload));
        let name = &self.workload.name;
        let failed = |error| self.failure(&error, namespace);
        let found = api.get_scale(name).await.map_err(failed)?;
        let scale = read(&found);
        let Some(count) = count.filter(|count| *count != scale.wanted) else { return Ok(scale) };
        if count < scale.wanted {
            for address in leaving {
                prefer_to_delete(client, namespace, *address).await;
            }
        }
        let patch = json!({
            "metadata": { "resourceVersion": found.metadata.resource_version },
            "spec": { "replicas": count },
        });
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let written = api.patch_scale(name, &params, &Patch::Merge(patch)).await.map_err(failed)?;
        Ok(read(&written))
    }

    async fn connect(&self) -> Result<Connected, Failure> {
        tls::install();
        let config = match &self.workload.kubeconfig {
            None => Config::incluster().map_err(|error| {
                let cause = root_cause(&error);
                format!("there are no credentials of a pod ({cause}); outside a cluster write `kubeconfig`")
            }),
            Some(path) => match Kubeconfig::read_from(path) {
                Ok(file) => Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await,
                Err(error) => Err(error),
            }
            .map_err(|error| format!("`{}` cannot be used: {}", path.display(), root_cause(&error))),
        };
        // Files may be mounted a moment after we have started.
        let mut config = config.map_err(Failure::transient)?;
        config.default_retry = false;
        config.read_timeout = Some(TRY_TIMEOUT);
        let namespace = self.workload.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| Failure::transient(root_cause(&error)))?;
        Ok(Connected { client, namespace })
    }

    fn failure(&self, error: &kube::Error, namespace: &str) -> Failure {
        let kube::Error::Api(status) = error else {
            return Failure::transient(format!("the API server cannot be reached: {}", root_cause(error)));
        };
        let Workload { resource, name, .. } = &self.workload;
        let retry_after = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let retry_after = Duration::from_secs(u64::from(retry_after)).min(LONGEST_RETRY);
        match status.code {
            409 => Failure {
                reason: format!("`{resource}/{name}` was changed by somebody else again and again"),
                retry_in: Some(CONFLICT_RETRY),
            },
            401 => Failure::lasting("the API server does not know the credentials (401)".to_owned()),
            403 => Failure::lasting(format!(
                "the role lacks `get` or `patch` on `{resource}/scale` in namespace `{namespace}` (403)"
            )),
            404 => Failure::lasting(format!(
                "namespace `{namespace}` has no `{resource}/{name}` with a scale (404)"
            )),
            code @ (429 | 500..) => Failure {
                reason: format!("the API server answered {code}: {}", status.message),
                retry_in: Some(retry_after),
            },
            code => Failure::lasting(format!("the API server answered {code}: {}", status.message)),
        }
    }
}

impl Failure {
    fn transient(reason: String) -> Self {
        Self { reason, retry_in: Some(Duration::ZERO) }
    }

    fn lasting(reason: String) -> Self {
        Self { reason, retry_in: None }
    }
}

fn api_resource(workload: &Workload) -> ApiResource {
    let (group, version) = workload.api_version.split_once('/').unwrap_or(("", &workload.api_version));
    // The kind is not part of any URL.
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, ""), &workload.resource)
}

fn read(scale: &k8s_openapi::api::autoscaling::v1::Scale) -> Scale {
    let count = |count: i32| u32::try_from(count).unwrap_or(0);
    Scale {
        wanted: count(scale.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0)),
        running: count(scale.status.as_ref().map_or(0, |status| status.replicas)),
    }
}

/// Asks Kubernetes to delete the pod at this address before others. Without the right to say so another pod may
/// go, which the addresses then show; the count is right all the same.
async fn prefer_to_delete(client: &Client, namespace: &str, address: IpAddr) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let at_address = ListParams::default().fields(&format!("status.podIP={address}")).limit(2);
    let marked = async {
        let found = pods.list_metadata(&at_address).await?;
        // Pods on the host's network share its address, and then it says nothing.
        if let [pod] = found.items.as_slice()
            && let Some(name) = &pod.metadata.name
        {
            let patch = json!({ "metadata": { "annotations": { DELETION_COST: COST_OF_A_DRAINED_POD } } });
            pods.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        Ok::<_, kube::Error>(())
    };
    if let Err(error) = marked.await {
        warn!(
            %address,
            "the drained pod at {address} cannot be marked as the one to delete, so another may go; \
             the role needs `list` and `patch` on `pods`: {}",
            root_cause(&error)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_of_any_group_has_its_url() {
        for (api_version, resource, url) in [
            ("apps/v1", "deployments", "/apis/apps/v1/namespaces/models/deployments"),
            ("v1", "replicationcontrollers", "/api/v1/namespaces/models/replicationcontrollers"),
            ("argoproj.io/v1alpha1", "rollouts", "/apis/argoproj.io/v1alpha1/namespaces/models/rollouts"),
        ] {
            let workload = Workload {
                api_version: api_version.to_owned(),
                resource: resource.to_owned(),
                namespace: Some("models".to_owned()),
                name: "vllm".to_owned(),
                kubeconfig: None,
            };
            let resource = api_resource(&workload);
            let path = <DynamicObject as kube::Resource>::url_path(&resource, Some("models"));
            assert_eq!(path, url);
        }
    }
}
