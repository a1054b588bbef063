"""The configuration files of the throwaway cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NODES = 4
GPUS = 2
# Long enough to save; a stage that requeues itself does not use it up.
GRACE_SECONDS = 60


@dataclass(frozen=True)
class Ports:
    """TCP ports of the daemons; MariaDB and munge talk over sockets in the folder."""

    slurmctld: int
    slurmdbd: int
    slurmd: int  # of the first node; the others follow


def slurm_conf(folder: Path, host: str, ports: Ports) -> str:
    last = ports.slurmd + NODES - 1
    return f"""\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports.slurmctld}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/spool/%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log

AuthType=auth/munge
# cred_expire avoids the two minutes that a requeued job otherwise waits for its old credential to expire.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports.slurmdbd}
AccountingStoragePass={folder}/munge.socket
# squeue's and sacct's comments carry the tokens by which submit finds its jobs again.
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/none

# All nodes are this host: no cgroups, and sizes as configured here, not as detected.
ProctrackType=proctrack/linuxproc
MpiDefault=none
MailProg=/bin/true
Prolog={folder}/prolog
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=5

# Two clusters at a time get different job ids, and so different ports.
FirstJobId={ports.slurmctld}

# Everything that takes minutes in production happens at once.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

GresTypes=gpu
NodeName=node[1-{NODES}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports.slurmd}-{last}] CPUs=8 RealMemory=20000 Gres=gpu:{GPUS}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=1
PartitionName=gpu Default=YES PreemptMode=OFF
PartitionName=low PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}
PartitionName=low-cancel PreemptMode=CANCEL GraceTime={GRACE_SECONDS}
PartitionName=low-now PreemptMode=REQUEUE
PartitionName=low-cancel-now PreemptMode=CANCEL
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=first Nodes=node[1-2] PreemptMode=OFF
PartitionName=last Nodes=node[3-4] PreemptMode=OFF
"""  # noqa: E501


def prolog(folder: Path) -> str:
    """A prolog that fails on a node for which there is a file."""
    return f'#!/bin/sh\ntest ! -e "{folder}/broken-$SLURMD_NODENAME"\n'


def gres_conf(folder: Path) -> str:
    return f"NodeName=node[1-{NODES}] Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n"


def slurmdbd_conf(folder: Path, ports: Ports) -> str:
    return f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports.slurmdbd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""
