#!/usr/bin/env bash
# What launch/tpu_pod.sh has the workers of a pod do, in the copy of the repository they have:
#
#   bash launch/tpu_worker.sh COMMAND
#
#   install [--bucket=B | --nfs=H:/P]
#                   mount the storage, make the environment
#   start FLAG...   start this worker's process of the run, unless one is going on already
#   is-running      succeed if one is
#   follow          show its log until it ends, and end as launch/tpu_pod.sh run does
#   stop            make it save a checkpoint and stop
#
# run.log, run.pid and run.status in the repository are of the process started last.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_running() {
    [[ -e run.pid && ! -e run.status ]] && kill -0 "$(<run.pid)" 2>/dev/null
}

apt_install() { # PACKAGE...; a fresh machine may be busy with updates of its own
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a \
        apt-get -o DPkg::Lock::Timeout=600 -qq -y install "$@" >/dev/null
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
    curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -c -s) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_install gcsfuse
}

mount_storage() { # --bucket=B|--nfs=H:/P
    local type options=rw,_netdev unit=${storage#/}
    if mountpoint -q "$storage"; then
        return
    fi
    case $1 in
        --bucket=*)
            type=gcsfuse
            command -v gcsfuse >/dev/null || install_gcsfuse
            # What one worker writes, the others must see at once, also where they have seen
            # nothing a moment ago: no metadata cache.
            options+=",allow_other,uid=$(id -u),gid=$(id -g)"
            options+=",metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0"
            ;;
        --nfs=*)
            type=nfs
            apt_install nfs-common
            ;;
        *) fail "unknown storage '$1'" ;;
    esac
    # By systemd: when the machine is told to stop, it unmounts after the run has saved, not
    # before, and after a restart the storage is there again.
    sudo mkdir -p "$storage"
    sudo sed -i "\\| $storage |d" /etc/fstab
    echo "${1#*=} $storage $type $options 0 0" | sudo tee -a /etc/fstab >/dev/null
    sudo systemctl daemon-reload
    sudo systemctl start "${unit//\//-}.mount"
    if [[ $type == nfs ]]; then
        sudo chmod go+rw "$storage"
    fi
}

make_environment() {
    # The Python of TPU machines may be older than this package needs, or without venv.
    if [[ ! -x $venv/bin/python ]] && ! python3 -c 'if True:
        import ensurepip, sys, venv
        raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        curl -LsSf https://astral.sh/uv/install.sh | sh
        "$HOME/.local/bin/uv" python install 3.12
        PYTHON=$("$HOME/.local/bin/uv" python find 3.12)
        export PYTHON
    fi
    bash launch/install.sh
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -U "jax[tpu]"
}

start() { # FLAG...
    if is_running; then
        echo "a run is going on already; not starting another"
        return
    fi
    make_main_command "JAX_PLATFORMS=${JAX_PLATFORMS:-tpu}" # no run on the CPU by mistake
    rm -f run.status
    # It outlives the ssh session, and as bash waits, TERM leaves it time to note the status.
    # shellcheck disable=SC2016
    nohup bash -c 'trap : TERM; "$@"; echo $? >run.status' run "${main_command[@]}" "$@" \
        >run.log 2>&1 </dev/null &
    echo "$!" >run.pid
}

follow() {
    local status=none
    # Unlike the process itself, which is not our child, this is gone as soon as it ends.
    while is_running && kill -0 "$$"; do
        sleep 0.2
    done &
    tail -n 100 -s 0.2 -F --pid="$!" run.log 2>/dev/null
    if [[ -e run.status ]]; then
        status=$(<run.status)
    fi
    if [[ $status == 0 ]] && grep -Eq "$stopped_early" run.log; then
        exit "$stopped"
    elif [[ $status != [02] ]]; then
        echo "the run ended with status $status"
        exit "$crashed"
    fi
    exit "$status"
}

cd "$root"
case ${1:-} in
    install)
        [[ ! ${2:-} ]] || mount_storage "$2"
        make_environment
        ;;
    start) start "${@:2}" ;;
    is-running) is_running ;;
    follow) follow ;;
    stop)
        is_running || fail "no run is going on"
        pkill -TERM -P "$(<run.pid)"
        ;;
    *) fail "unknown command '${1:-}'; launch/tpu_pod.sh calls this script on the workers" ;;
esac
