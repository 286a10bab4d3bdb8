"""Kubernetes: python -m launch.k8s --name=NAME --image=IMAGE [OPTIONS] -- ARGUMENTS

Prints a JobSet (jobset.sigs.k8s.io) as JSON for kubectl; --apply hands it to kubectl instead.
ARGUMENTS are those of python -m moe_jax train.  The image must have moe_jax installed and the
config files in its working directory.

  python -m launch.k8s --name=mixtral --image=IMAGE --apply --queue=tpu \\
      --tpu=tpu-v5p-slice --topology=4x4x8 --hosts=32 --chips=4 -- \\
      --config=configs/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral
  python -m launch.k8s --name=olmoe --image=IMAGE --gpus=8 --hosts=4 -- ...
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.job import AGAIN, Job
from launch.shell import (
    LaunchError,
    Shell,
    add_options,
    make_parser,
    option,
    read_options,
    run_main,
    split_arguments,
)

_PORT = 8476  # of the coordinator, process 0
_POD = "train"  # the name of the replicated job and of its container


@dataclasses.dataclass(frozen=True)
class K8sOptions:
    """The resources that a JobSet requests, and its restart policy."""

    image: str = option(..., "Container image with moe_jax.")
    hosts: int = option(1, "Hosts per slice; each runs one pod.", least=1)
    gpus: int = option(0, "NVIDIA GPUs per host.")
    tpu: str = option("", "GKE's name for the TPU type, such as tpu-v5p-slice.")
    topology: str = option("", "Chips per slice, such as 4x4x8.")
    chips: int = option(4, "TPU chips per host.", least=1)
    slices: int = option(1, "TPU slices; more than one is multislice.", least=1)
    queue: str = option("", "Kueue's local queue; empty: no Kueue.")
    namespace: str = option("", "Namespace; empty: kubectl's own.")
    service_account: str = option("", "Service account, for example to reach gs://.")
    claim: str = option("", "PersistentVolumeClaim to mount at /workdir.")
    spot: bool = option(False, "GKE spot nodes.")
    grace_seconds: int = option(120, "Seconds from SIGTERM to SIGKILL: time for a checkpoint.")
    max_restarts: int = option(100, "Times that all pods may be restarted.")
    python: str = option("python", "The Python in the image that has moe_jax.")
    manifests: str = option("runs/k8s", "Folder for the manifests that --apply writes.")


def manifest(job: Job, options: K8sOptions) -> dict[str, Any]:
    """Build the JobSet.

    Raises:
      LaunchError: the options contradict each other, or a name is not valid in Kubernetes.
    """
    _check(job, options)
    metadata: dict[str, Any] = {"name": job.name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if options.tpu:
        # In GKE a slice is a node pool, and each job of the set needs its own.
        topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        metadata["annotations"] = topology
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # A single process cannot rejoin the others, so a restart restarts all of them.
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "a-person-must-look",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": _POD,
                    "replicas": options.slices,
                    "template": {"spec": _job_spec(job, options)},
                }
            ],
        },
    }


def _job_spec(job: Job, options: K8sOptions) -> dict[str, Any]:
    return {
        "parallelism": options.hosts,
        "completions": options.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # The first rule that matches decides.  Count: the job fails and the JobSet restarts it.
        # FailJob: the JobSet ends.  If one process fails for good (1, 3), its peers abort (134)
        # minutes later, so FailJob decides first.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _POD,
                        "operator": "NotIn",
                        "values": list(AGAIN),
                    },
                },
            ]
        },
        "template": {"spec": _pod_spec(job, options)},
    }


def _pod_spec(job: Job, options: K8sOptions) -> dict[str, Any]:
    command = [options.python, "-m", "moe_jax", "train", *job.arguments]
    amount = {"google.com/tpu": options.chips} if options.tpu else {"nvidia.com/gpu": options.gpus}
    container: dict[str, Any] = {
        "name": _POD,
        "image": options.image,
        # Kubernetes would expand $(NAME); it replaces $$ by $.
        "command": [argument.replace("$", "$$") for argument in command],
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if any(amount.values()):
        container["resources"] = {"limits": {name: str(n) for name, n in amount.items()}}
    if not options.tpu:  # GKE sets process ids and the coordinator on TPU hosts
        container["env"] = _processes(job, options)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # else the pod's failure policy does not apply
        "terminationGracePeriodSeconds": options.grace_seconds,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.claim:
        container["volumeMounts"].append({"name": "workdir", "mountPath": "/workdir"})
        claim = {"claimName": options.claim}
        spec["volumes"].append({"name": "workdir", "persistentVolumeClaim": claim})
    selector = {}
    if options.tpu:
        selector["cloud.google.com/gke-tpu-accelerator"] = options.tpu
        selector["cloud.google.com/gke-tpu-topology"] = options.topology
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        spec["nodeSelector"] = selector
    return spec


def _processes(job: Job, options: K8sOptions) -> list[dict[str, Any]]:
    """The environment variables that moe_jax.parallel.distributed reads in a pod.

    JobSet makes the host name of the coordinator's pod from the names of job and pod.
    """
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "MOE_JAX_COORDINATOR", "value": f"{job.name}-{_POD}-0-0.{job.name}:{_PORT}"},
        {"name": "MOE_JAX_PROCESS_COUNT", "value": str(options.hosts)},
        {"name": "MOE_JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _check(job: Job, options: K8sOptions) -> None:
    # A pod's name, the longest that contains the job's, may have 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job.name):
        raise LaunchError(
            f"--name={job.name} cannot name a JobSet: begin with a letter, end with a letter or "
            f"digit, at most 40 characters."
        )
    if options.tpu and options.gpus:
        raise LaunchError("--tpu and --gpus exclude each other: give one.")
    if bool(options.tpu) != bool(options.topology):
        raise LaunchError("--tpu and --topology belong together: give both or neither.")
    if options.slices > 1 and not options.tpu:
        raise LaunchError("--slices counts TPU slices: for GPUs set --hosts.")
    if options.hosts < 1 or options.slices < 1:
        raise LaunchError("--hosts and --slices must be at least 1.")
    for name in ("queue", "namespace", "service_account", "claim"):
        value = getattr(options, name)
        if value and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", value):
            raise LaunchError(
                f"--{name}={value} is not a name in Kubernetes: use lower-case letters, digits, "
                f"'-' and '.'."
            )
    if options.tpu:
        if not re.fullmatch(r"\d+(x\d+)+", options.topology):
            raise LaunchError(
                f"--topology={options.topology} is not a topology: write it as 4x4x8."
            )
        chips = math.prod(map(int, options.topology.split("x")))
        if chips != options.hosts * options.chips:
            raise LaunchError(
                f"--topology={options.topology} has {chips} chips, but --hosts={options.hosts} "
                f"with --chips={options.chips} have {options.hosts * options.chips}: change one of "
                f"the three."
            )


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    own, trainers = split_arguments(argv)
    parser = make_parser("python -m launch.k8s", __doc__)
    parser.add_argument("--name", required=True, help="Name of the JobSet: [a-z0-9-]+.")
    parser.add_argument("--apply", action="store_true", help="Hand it to kubectl.")
    parser.add_argument("--dry_run", action="store_true", help="Print everything, run nothing.")
    add_options(parser, K8sOptions)
    given = parser.parse_args(own)
    if not trainers:
        raise LaunchError("There is nothing to run: give the trainer's arguments after `--`.")
    options = read_options(K8sOptions, given)
    text = json.dumps(manifest(Job(given.name, trainers), options), indent=2)
    if not given.apply:
        print(text)
        return 0
    shell = Shell(given.dry_run)
    path = Path(options.manifests, f"{given.name}.json")
    shell.write(path, f"{text}\n")
    shell.run("kubectl", "apply", "--validate=strict", f"--filename={path}", show=True)
    return 0


if __name__ == "__main__":
    run_main(main)
