#!/usr/bin/env python3
"""The bill of materials of the program, as CycloneDX 1.5 JSON on standard output.

From `cargo metadata` and Cargo.lock: every crate that is compiled into the binary, with version, licence, checksum
and what it depends on; crates for tests and builds of other platforms are left out. The output depends on nothing but
these two and the target, so two runs are equal.

    scripts/sbom.py [TARGET]
"""

import json
import subprocess
import sys
import tomllib


def main(target):
    arguments = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]
    metadata = json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)
    with open("Cargo.lock", "rb") as file:
        checksums = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.load(file)["package"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: normal(node) for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    reached = reach(nodes, root)
    order = sorted(reached - {root}, key=lambda each: purl(packages[each]))
    json.dump(
        {
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": {"component": component(packages[root], checksums, "application")},
            "components": [component(packages[each], checksums, "library") for each in order],
            "dependencies": [
                {"ref": purl(packages[each]), "dependsOn": sorted(purl(packages[other]) for other in nodes[each])}
                for each in [root, *order]
            ],
        },
        sys.stdout,
        indent=1,
    )
    print()


def normal(node):
    """What a crate links: not what its tests or build scripts need."""
    return {dep["pkg"] for dep in node["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])}


def reach(nodes, root):
    reached, waiting = {root}, [root]
    while waiting:
        new = nodes[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package, checksums, kind):
    one = {
        "type": kind,
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
        # Older crates write a slash for OR.
        "licenses": [{"expression": package["license"].replace(" / ", " OR ").replace("/", " OR ")}],
    }
    checksum = checksums.get((package["name"], package["version"]))
    if checksum:
        one["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package.get("repository"):
        one["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return one


main(sys.argv[1] if len(sys.argv) > 1 else "x86_64-unknown-linux-gnu")
