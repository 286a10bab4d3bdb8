#!/usr/bin/env bash
# Installs Slurm (Debian, root) and starts a cluster whose only node is this machine, for the tests
# of launch/slurm.py.  A second call restarts the daemons that have stopped.  launch/test.sh
# recognises the cluster by its name.
set -euo pipefail

if [ -e /etc/slurm/slurm.conf ] && ! grep -q '^ClusterName=moe-jax-test$' /etc/slurm/slurm.conf; then
  echo "[slurm.sh] /etc/slurm/slurm.conf belongs to another cluster and was not changed." >&2
  exit 1
fi
if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
  echo "[slurm.sh] installing slurm-wlm and munge"
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge >/dev/null
fi

host="$(hostname -s)"
mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd /run/munge
chown munge: /run/munge
# CPUs: at least two, even on a machine with one core, because a job of two processes must fit.
# cred_expire: a requeued job waits until its credential has expired, by default for two minutes.
cores="$(nproc)"
[ "$cores" -ge 2 ] || cores=2
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=moe-jax-test
SlurmctldHost=$host
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/var/spool/slurmd
StateSaveLocation=/var/spool/slurmctld
SlurmUser=root
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2
JobAcctGatherType=jobacct_gather/none
NodeName=$host CPUs=$cores RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

alive() { [ -e "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
alive /run/munge/munged.pid || runuser -u munge -- munged --force
alive /run/slurmctld.pid || slurmctld
alive /run/slurmd.pid || slurmd
for _ in $(seq 60); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|allocated'; then
    echo "[slurm.sh] Slurm runs on $host with $cores cores"
    exit 0
  fi
  sleep 1
done
sinfo >&2 || true
echo "[slurm.sh] Slurm did not start within 60 s.  See /var/log/slurm*." >&2
exit 1
