"""Shortens JobSet's schema for our tests: python prune.py jobsets-crd.yaml > jobset.json

Removes descriptions, annotations of Kubernetes, the status and the parts of a pod that no launcher
writes.  Every object then refuses properties that it does not name.
"""

import json
import sys
from typing import Any

import yaml

UNUSED = {"affinity", "ephemeralContainers", "initContainers", "volumeClaimPolicies"}
UNUSED |= {"lifecycle", "livenessProbe", "readinessProbe", "startupProbe", "managedFields"}


def pruned(schema: Any) -> Any:
    """The pruned schema, as JSON Schema."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        key: value
        for key, value in schema.items()
        if key not in ("description", "properties", "items", "default", "format")
        and not key.startswith("x-")
    }
    if "items" in schema:
        kept["items"] = pruned(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = pruned(schema["additionalProperties"])
    if "properties" in schema:
        names = schema["properties"].items()
        kept["properties"] = {name: pruned(part) for name, part in names if name not in UNUSED}
        kept["additionalProperties"] = False
    return kept


with open(sys.argv[1]) as file:
    [version] = yaml.safe_load(file)["spec"]["versions"]
assert version["name"] == "v1alpha2"
schema = version["schema"]["openAPIV3Schema"]
del schema["properties"]["status"]
json.dump(pruned(schema), sys.stdout, indent=1, sort_keys=True)
print()
