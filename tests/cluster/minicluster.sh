#!/usr/bin/env bash
# A SLURM and ssh cluster of several nodes on one machine, made of Linux namespaces, for tests.
#   minicluster.sh install           apt-get the packages that are missing (root)
#   minicluster.sh check             exit status 1 and the reason where no cluster can come up
#   minicluster.sh up [N]            ctl and n1 ... nN (2); returns when every node is idle
#   minicluster.sh exec NODE CMD..   run CMD on ctl or a node, in this folder and environment
#   minicluster.sh node-down NODE    a node is lost: its processes die, its network goes
#   minicluster.sh node-up NODE      it is back, as after a reboot
#   minicluster.sh cut-off NODE      its link goes down, and nobody is told
#   minicluster.sh reconnect NODE    the link is back
#   minicluster.sh down              end everything
#
# Each node has network, hostname, mount and process namespaces of its own: a `pkill` on one node
# reaches no other, and no port can clash. Nothing listens outside. The file system is shared, as
# home folders on a cluster are. /etc/hosts, /etc/slurm and ~/.ssh are mounts inside the namespaces.
# The partition "high" preempts "main", whose jobs are requeued.
set -euo pipefail

SELF=$(readlink -f "${BASH_SOURCE[0]}")
MC_DIR=$(realpath -m "${MC_DIR:-/tmp/minicluster}")   # state, logs, keys
MC_CPUS=${MC_CPUS:-4}            # that a node claims to have; may be more than there are
MC_NET=${MC_NET:-10.77.0}        # first three parts of the addresses
MC_KILL_WAIT=${MC_KILL_WAIT:-20} # seconds from TERM to KILL
MC_GRACE=${MC_GRACE:-20}         # seconds that a preempted job is left
MC_TIMEOUT=${MC_TIMEOUT:-30}     # seconds until a silent node counts as down
MC_GREETING=${MC_GREETING:-}     # what every shell over ssh says first
MC_HOME=$(getent passwd "$(id -u)" | cut -d: -f6)   # where sshd looks, whatever HOME says
export MC_DIR MC_CPUS MC_NET PATH="$PATH:/usr/sbin:/sbin"

say() { echo "minicluster: $*" >&2; }

missing_tools() {
    for tool in slurmctld slurmd sbatch munged pdsh ip sshd ssh nsenter; do
        command -v "$tool" >/dev/null || printf '%s ' "$tool"
    done
}

check() {
    local missing
    missing=$(missing_tools)
    if [[ -n $missing ]]; then
        echo "not installed: $missing(as root: tests/cluster/minicluster.sh install)"
        return 1
    fi
    if ! unshare --net --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null; then
        echo "unshare is refused here: no namespaces to make nodes of"
        return 1
    fi
}

write_slurm_conf() {  # write_slurm_conf NODES
    cat <<CONF
ClusterName=mini
SlurmctldHost=ctl($MC_NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for one second more than this; the default is 120.
AuthInfo=cred_expire=5
MpiDefault=none
# No cgroups: a container has none to give away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_min_interval=100000
SlurmdParameters=config_overrides
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=$MC_KILL_WAIT
MinJobAge=3600
SlurmctldTimeout=$MC_TIMEOUT
SlurmdTimeout=$MC_TIMEOUT
StateSaveLocation=$MC_DIR/state
SlurmdSpoolDir=/run/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile=$MC_DIR/log/slurmctld.log
SlurmdLogFile=$MC_DIR/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=verbose
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$MC_GRACE
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
CONF
    for ((i = 1; i <= $1; i++)); do
        echo "NodeName=n$i NodeAddr=$MC_NET.$((10 + i)) CPUs=$MC_CPUS RealMemory=4000"
    done
}

write_ssh_files() {
    local ssh=$MC_DIR/ssh
    ssh-keygen -q -t ed25519 -N '' -f "$ssh/id_ed25519"
    ssh-keygen -q -t ed25519 -N '' -f "$ssh/host_ed25519"
    cp "$ssh/id_ed25519.pub" "$ssh/authorized_keys"
    cat >"$ssh/config" <<CONF
Host ctl n*
  User $(id -un)
  IdentityFile "$ssh/id_ed25519"
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONF
    cat >"$ssh/sshd_config" <<CONF
HostKey "$ssh/host_ed25519"
AuthorizedKeysFile "$ssh/authorized_keys"
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile none
CONF
}

write_files() {  # write_files NODES
    if [[ -e $MC_DIR && ! -e $MC_DIR/.minicluster ]]; then
        say "$MC_DIR exists and is no folder of a cluster"
        exit 1
    fi
    rm -rf "$MC_DIR"
    mkdir -p "$MC_DIR"/{slurm,ssh,log,state}
    : >"$MC_DIR/.minicluster"
    {
        echo "127.0.0.1 localhost"
        echo "$MC_NET.1 ctl"
        for ((i = 1; i <= $1; i++)); do echo "$MC_NET.$((10 + i)) n$i"; done
    } >"$MC_DIR/hosts"
    write_slurm_conf "$1" >"$MC_DIR/slurm/slurm.conf"
    write_ssh_files
    dd if=/dev/urandom of="$MC_DIR/munge.key" bs=128 count=1 status=none
    chmod 600 "$MC_DIR/munge.key"
}

furnish() {  # furnish NAME: what ctl and the nodes have in common; inside their namespaces
    hostname "$1"
    mount -t tmpfs none /run
    mount -t tmpfs none /dev/shm
    mkdir -p /run/sshd /run/munge /run/lock
    chmod 755 /run/munge
    mount --bind "$MC_DIR/hosts" /etc/hosts
    mkdir -p /etc/slurm "$MC_HOME/.ssh"
    mount --bind "$MC_DIR/slurm" /etc/slurm
    mount -t tmpfs -o mode=700 none "$MC_HOME/.ssh"
    cp "$MC_DIR/ssh/config" "$MC_HOME/.ssh/config"
    chmod 600 "$MC_HOME/.ssh/config"
    if [[ -n $MC_GREETING ]]; then
        [[ -e $MC_HOME/.bashrc ]] || : >"$MC_HOME/.bashrc"   # to mount on
        printf 'printf %%s %q\n' "$MC_GREETING" >/run/bashrc
        mount --bind /run/bashrc "$MC_HOME/.bashrc"
    fi
    ip link set lo up
    munged --force --key-file="$MC_DIR/munge.key" --pid-file=/run/munge/munged.pid \
        --seed-file=/run/munge/seed --log-file="$MC_DIR/log/munged-$1.log"
}

as_daemon() {  # a daemon knows nothing of the caller's environment
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$MC_HOME" LANG=C.UTF-8 "$@"
}

stay() {  # as the first process of a namespace, which adopts what is left behind
    trap 'exit 0' TERM
    while :; do
        wait || :
        sleep 1
    done
}

in_namespaces() {  # in_namespaces LOG ARGUMENTS: this script again, as a first process; its parent in $!
    local log=$1
    shift
    setsid unshare --net --uts --ipc --mount --pid --fork --mount-proc --kill-child \
        "$SELF" "$@" >>"$log" 2>&1 </dev/null &
}

first_child() { local c; c=$(cat "/proc/$1/task/$1/children" 2>/dev/null) && echo "${c%% *}"; }

start_node() {  # start_node NODE: from ctl
    local number=${1#n} parent init=
    in_namespaces "$MC_DIR/log/node-$1.out" __node "$1"
    parent=$!
    until init=$(first_child "$parent") && [[ -n $init ]] \
        && [[ $(readlink "/proc/$init/ns/net") != $(readlink /proc/self/ns/net) ]]; do
        sleep 0.05
    done
    echo "$init" >"$MC_DIR/state/$1.init"
    ip link del "v$number" 2>/dev/null || :
    # The same hardware address after a reboot: its peers remember it.
    ip link add "v$number" type veth peer name eth0 netns "$init" \
        address "$(printf '02:00:00:00:00:%02x' "$number")"
    ip link set "v$number" master br0 up
}

be_node() {  # be_node NODE
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
    ip addr add "$MC_NET.$((10 + ${1#n}))/24" dev eth0
    ip link set eth0 up
    furnish "$1"
    as_daemon /usr/sbin/sshd -f "$MC_DIR/ssh/sshd_config" -E "$MC_DIR/log/sshd-$1.log"
    as_daemon slurmd -D -N "$1" >>"$MC_DIR/log/slurmd-$1.out" 2>&1 &
    stay
}

be_controller() {  # be_controller NODES
    mount --make-rprivate /
    ip link add br0 type bridge
    ip addr add "$MC_NET.1/24" dev br0
    ip link set br0 up
    furnish ctl
    for ((i = 1; i <= $1; i++)); do start_node "n$i"; done
    as_daemon slurmctld -D >>"$MC_DIR/log/slurmctld.out" 2>&1 &
    stay
}

controller() { first_child "$(cat "$MC_DIR/pid")"; }
is_up() { [[ -e $MC_DIR/pid ]] && kill -0 "$(cat "$MC_DIR/pid")" 2>/dev/null; }
on_controller() { nsenter -t "$(controller)" -n -u -i -m -p --wd="$PWD" -- "$@"; }

up() {  # up NODES
    if is_up; then
        say "$MC_DIR is up already"
        exit 1
    fi
    write_files "$1"
    in_namespaces "$MC_DIR/log/controller.out" __controller "$1"
    echo $! >"$MC_DIR/pid"
    for ((tries = 0; tries < 300; tries++)); do
        sleep 0.2
        is_up || break
        if [[ $(on_controller sinfo -h -p main -t idle -o %D 2>/dev/null) == "$1" ]]; then
            return
        fi
    done
    say "the nodes did not come up"
    tail -n 20 "$MC_DIR"/log/* >&2
    down
    exit 1
}

down() {
    [[ -e $MC_DIR/pid ]] || return 0
    local parent
    parent=$(cat "$MC_DIR/pid")
    kill -9 "$parent" 2>/dev/null || :   # all its namespaces' processes go with it
    for ((tries = 0; tries < 100; tries++)); do
        kill -0 "$parent" 2>/dev/null || break
        sleep 0.1
    done
    rm -f "$MC_DIR/pid"
}

install() {
    [[ -n $(missing_tools) ]] || return 0
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 \
        slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 >/dev/null
}

command=${1:-}
node=${2:-}
case $command in
install | check | down) "$command" ;;
up) up "${2:-2}" ;;
exec)
    shift 2
    if [[ $node == ctl ]]; then
        exec nsenter -t "$(controller)" -n -u -i -m -p --wd="$PWD" -- "$@"
    fi
    init=$(cat "$MC_DIR/state/$node.init")   # a number in the controller's namespace
    exec nsenter -t "$(controller)" -m -p -- nsenter -t "$init" -n -u -i -m -p --wd="$PWD" -- "$@"
    ;;
node-down) nsenter -t "$(controller)" -m -p -- kill -9 "$(cat "$MC_DIR/state/$node.init")" ;;
node-up) on_controller "$SELF" __start_node "$node" ;;
cut-off) on_controller ip link set "v${node#n}" down ;;
reconnect) on_controller ip link set "v${node#n}" up ;;
__controller) be_controller "$2" ;;
__node) be_node "$2" ;;
__start_node) start_node "$2" ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$SELF" >&2
    exit 2
    ;;
esac
