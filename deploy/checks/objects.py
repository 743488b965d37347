"""Checks rendered Kubernetes objects strictly: types, required fields, no field that the cluster does not know; and
what Kubernetes' own schemas cannot say of a chart.

    objects.py RENDERED.yaml..
"""

import importlib
import json
import pathlib
import sys

import kubernetes_validate
import yaml

KUBERNETES = "1.33"
MODELS = {
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
}
# The pod security standard `restricted`, and what more we promise.
RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def lost(before, after, path):
    """Fields that a model did not know, and so does not give back."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is unknown"
    elif isinstance(before, list) and isinstance(after, list):
        for index, (one, other) in enumerate(zip(before, after)):
            yield from lost(one, other, f"{path}[{index}]")


def faults_of_custom(item):
    model = getattr(importlib.import_module(MODELS[item["apiVersion"]]), item["kind"])
    parsed = model.model_validate(item)
    yield from lost(item, parsed.model_dump(by_alias=True, exclude_unset=True, mode="json"), "")


def faults_of(item):
    try:
        if item["apiVersion"] in MODELS:
            yield from faults_of_custom(item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except (ValueError, kubernetes_validate.ValidationError) as error:
        yield " ".join(str(error).split())[:400]
    if item["kind"] == "StatefulSet":
        yield from faults_of_pod(item["spec"]["template"]["spec"])
    if item["kind"] == "ConfigMap":
        yield from faults_of_config_map(item)


def faults_of_pod(pod):
    missing = {k for k, v in RESTRICTED_POD.items() if pod.get("securityContext", {}).get(k) != v}
    for container in pod["containers"]:
        context = container.get("securityContext", {})
        missing |= {k for k, v in RESTRICTED_CONTAINER.items() if context.get(k) != v}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"ledger"}
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not 0 < pause < pod["terminationGracePeriodSeconds"]:
            yield "new connections are refused while its endpoint is still there"
        if mounts != volumes:
            yield f"volumes {sorted(volumes)} and mounts {sorted(mounts)} differ"
    for name in sorted(missing):
        yield f"securityContext.{name} is not as the restricted standard asks"


def faults_of_config_map(item):
    size = len(json.dumps(item["data"]))
    if size > 900_000:
        yield f"{size} bytes are too many for a ConfigMap"
    for name, text in item["data"].items():
        if name.endswith(".json"):
            json.loads(text)


def main(files):
    bad = 0
    for file in files:
        items = [item for item in yaml.safe_load_all(pathlib.Path(file).read_text()) if item]
        names = [(item["kind"], item["metadata"]["name"]) for item in items]
        if len(set(names)) != len(names):
            raise SystemExit(f"{file}: two objects have one name: {sorted(names)}")
        for item, (kind, name) in zip(items, names):
            for fault in faults_of(item):
                bad += 1
                print(f"{file}: {kind}/{name}: {fault}")
        config = next(item["data"]["breakeven.toml"] for item in items if "breakeven.toml" in item.get("data", {}))
        pathlib.Path(file).with_suffix(".toml").write_text(config)
        print(f"{file}: {len(items)} objects: {', '.join(sorted({kind for kind, _ in names}))}")
    sys.exit(bool(bad))


main(sys.argv[1:])
