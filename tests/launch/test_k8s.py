"""launch.k8s against the schema that JobSet publishes and the documented rules of Kubernetes."""

import json
from pathlib import Path

import jsonschema
import pytest

from launch.job import Job
from launch.k8s import K8sOptions, main, manifest
from launch.shell import LaunchError

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "jobset.json").read_text())
AWKWARD = ("--a=two words", "--b='\"$HOME`id` $(HOME) $$(HOME) $$", "--c=line\nbreak", "--d=")
GPU = K8sOptions(image="image:1", hosts=4, gpus=8)
TPU = K8sOptions(image="image:1", hosts=4, tpu="tpu-v5p-slice", topology="2x2x4")
ALL = K8sOptions(
    image="image:1",
    hosts=4,
    tpu="tpu-v5p-slice",
    topology="2x2x4",
    slices=2,
    queue="queue",
    namespace="ours",
    service_account="writer",
    claim="disk",
    spot=True,
    grace_seconds=30,
    max_restarts=7,
)


def pod_of(jobset):
    [job] = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("options", [GPU, TPU, ALL, K8sOptions(image="cpu")])
def test_the_published_schema_accepts_it(options):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest(Job("one", AWKWARD), options), SCHEMA)


def test_the_schema_refuses_what_is_wrong():
    jobset = manifest(Job("one", ()), GPU)
    pod_of(jobset)["terminationGracePeriod"] = 30
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        jsonschema.validate(jobset, SCHEMA)
    jobset = manifest(Job("one", ()), GPU)
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(jsonschema.ValidationError, match="'Fail' is not one of"):
        jsonschema.validate(jobset, SCHEMA)


def outcome(jobset, code, disrupted=False):
    """What Kubernetes and JobSet do after a pod's exit code, according to their documentation."""
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 0  # a failure that is counted fails the job
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            [condition] = rule["onPodConditions"]
            hit = disrupted and condition == {"type": "DisruptionTarget", "status": "True"}
        else:
            wanted = rule["onExitCodes"]
            assert wanted["operator"] in ("In", "NotIn")
            hit = (code in wanted["values"]) == (wanted["operator"] == "In")
        if hit:
            reason = {"FailJob": "PodFailurePolicy"}.get(rule["action"], reason)
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("options", [GPU, TPU])
def test_which_exit_codes_start_all_pods_again(options):
    jobset = manifest(Job("one", ()), options)
    found = {code: outcome(jobset, code) for code in (42, 134, 137, 143, 1, 3, 2, 127, 139)}
    again = {code for code, action in found.items() if action == "RestartJobSet"}
    assert again == {42, 134, 137, 143}
    assert {found[code] for code in found.keys() - again} == {"FailJobSet"}
    assert outcome(jobset, 255, disrupted=True) == "RestartJobSet"


def test_gpu_pods_know_each_other():
    pod = pod_of(manifest(Job("one", ()), GPU))
    [container] = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's documentation: <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>
    assert values["MOE_JAX_COORDINATOR"] == "one-train-0-0.one:8476"
    assert values["MOE_JAX_PROCESS_COUNT"] == "4"
    assert "job-completion-index" in json.dumps(container["env"][2])
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}


def test_a_tpu_job_asks_for_its_slices_queue_and_time():
    jobset = manifest(Job("one", ()), ALL)
    pod = pod_of(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert "env" not in container  # GKE sets process ids on TPU hosts
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "queue"}
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["terminationGracePeriodSeconds"] == 30
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {
        volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName")
        for volume in pod["volumes"]
    }
    assert claims[mounts["/workdir"]] == "disk"


def expanded(text, environment):
    """Expand by the rule of Kubernetes: $(NAME) is replaced if NAME is known, and $$ is one $."""
    out, rest = "", text
    while rest:
        name, closed, after = rest[2:].partition(")")
        if rest.startswith("$$"):
            out, rest = out + "$", rest[2:]
        elif rest.startswith("$(") and closed and name in environment:
            out, rest = out + environment[name], after
        else:
            out, rest = out + rest[0], rest[1:]
    return out


def test_arguments_arrive_as_they_were_given():
    [container] = pod_of(manifest(Job("one", AWKWARD), GPU))["containers"]
    arrived = [expanded(argument, {"HOME": "/root"}) for argument in container["command"]]
    assert arrived == ["python", "-m", "moe_jax", "train", *AWKWARD]


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("1one", {}, "begin with a letter"),
        ("o" * 41, {}, "at most 40"),
        ("one", {"gpus": 8, "tpu": "t", "topology": "2x2"}, "exclude each other"),
        ("one", {"tpu": "t"}, "belong together"),
        ("one", {"slices": 2}, "counts TPU slices"),
        ("one", {"tpu": "t", "topology": "8"}, "write it as"),
        (
            "one",
            {"tpu": "t", "topology": "2x4"},
            "has 8 chips, but --hosts=1 with --chips=4 have 4",
        ),
        ("one", {"hosts": 0}, "must be at least 1"),
        ("one", {"queue": "Bad Queue!"}, "--queue=Bad Queue! is not a name"),
    ],
)
def test_mistakes_are_one_sentence(name, changed, sentence):
    with pytest.raises(LaunchError, match=sentence):
        manifest(Job(name, ()), K8sOptions(image="image", **changed))


def test_printed_applied_and_dry(tmp_path, capfd, monkeypatch):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\nexec cat "${3#--filename=}"\n')
    kubectl.chmod(0o755)
    own = ["--name=one", "--image=image", f"--manifests={tmp_path}/m"]
    assert main([*own, "--", "--steps=1"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == manifest(Job("one", ("--steps=1",)), K8sOptions(image="image"))

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert main([*own, "--apply", "--dry_run", "--", "--steps=1"]) == 0
    path = tmp_path / "m" / "one.json"
    command = f"+ kubectl apply --validate=strict --filename={path}\n"
    assert capfd.readouterr().out.endswith(command) and not path.exists()
    assert main([*own, "--apply", "--", "--steps=1"]) == 0
    head, _, applied = capfd.readouterr().out.partition(command)
    assert "+ write" in head and json.loads(applied) == printed
