#!/usr/bin/env bash
# A SLURM of three nodes on this one host, for tests/test_cluster.py: loopback only, everything below one folder.
#
#     apt-get install slurm-wlm munge     # Debian's packages; as root
#     bash tests/slurm-up.sh FOLDER       # starts it; then: export SLURM_CONF=FOLDER/slurm.conf
#     bash tests/slurm-up.sh FOLDER down  # ends the processes that it started
#
# /etc/hosts gets the names of the nodes, gan1 to gan3, for as long as it is up.
set -euo pipefail
folder=$1 host=$(hostname -s) cpus=$(nproc --all)
if [ "${2-}" = down ]; then
    for pid in "$folder"/*.pid; do kill "$(cat "$pid")" 2>/dev/null || true; done
    sed '/ # tests\/slurm-up.sh$/d' /etc/hosts >"$folder/hosts" && cat "$folder/hosts" >/etc/hosts
    exit
fi
mkdir -p "$folder"/state "$folder"/munge
[ -s "$folder/munge/key" ] || dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown -R munge: "$folder/munge"
chmod 755 "$folder" && chmod 711 "$folder/munge" && chmod 400 "$folder/munge/key"
for name in gan1 gan2 gan3; do grep -q " $name " /etc/hosts || echo "127.0.0.1 $name # tests/slurm-up.sh" >>/etc/hosts; done
cat >"$folder/slurm.conf" <<C
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPidFile=$folder/ctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/ctld.log
SlurmdLogFile=$folder/%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
ReturnToService=2
KillWait=30
OverTimeLimit=0
MinJobAge=3600
SchedulerParameters=sched_interval=5
NodeName=gan1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=$cpus RealMemory=1000 State=UNKNOWN
NodeName=gan2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=$cpus RealMemory=1000 State=UNKNOWN
NodeName=gan3 NodeHostname=$host NodeAddr=127.0.0.1 Port=16823 CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=p Nodes=gan[1-3] Default=YES MaxTime=INFINITE State=UP
C
export SLURM_CONF=$folder/slurm.conf
runuser -u munge -- munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
ln -sf munge/pid "$folder/munged.pid"
slurmctld
sleep 2
kill -0 "$(cat "$folder/ctld.pid")" || { tail -n 1 "$folder/ctld.log" >&2; exit 1; }
for name in gan1 gan2 gan3; do mkdir -p "$folder/spool.$name" && slurmd -N "$name"; done
for _ in $(seq 60); do [ "$(sinfo -h -t idle -o %D)" = 3 ] && break; sleep 0.5; done
sinfo
