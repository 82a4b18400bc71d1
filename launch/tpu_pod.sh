#!/usr/bin/env bash
# A TPU pod of Google Cloud, from this machine:
#
#   bash launch/tpu_pod.sh COMMAND [OPTION...] [FLAG...]
#
#   create        ask for the pod and wait for it
#   install       copy the current commit to all workers, make the environment, mount the storage
#   run FLAG...   start the run on all workers and show the log of the first one; if it is
#                 going on already, only show it. Ctrl-C stops showing, not running. Ends
#                 as the run does, but with 70 if it crashed, 75 if it was told to stop
#   watch FLAG... create, install and run; whenever the pod is preempted or broken, delete it
#                 and do it again, until the run is finished
#   stop          make the run save a checkpoint and stop
#   status        how the pod is
#   delete        give the pod back, whatever it does
#
#   --name=       default: cosmos             --zone=       needed
#   --type=       accelerator type: v5litepod-16, v6e-16, ...; needed to create
#   --runtime=    software version that fits it: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, ...; needed
#                 to create
#   --project=    default: gcloud's           --spot        cheaper, and may be preempted
#   --bucket=B    storage: the bucket B is mounted at /mnt/cosmos on all workers
#   --nfs=H:/P    storage: the share P of H (Filestore) is mounted at /mnt/cosmos instead
#   --dry-run     print the commands and run none
#   --help
#   FLAG...       of `python -m cosmos_jax.main`: --config=FILE --workdir=/mnt/cosmos/DIR ...;
#                 relative paths begin at the repository; what comes after -- is passed on
#
# Each option has a variable, COSMOS_TPU_NAME and so on, that stands where it is not given.
#
# gcloud must be installed and logged in, and the key it uses be known to the agent:
#   ssh-add ~/.ssh/google_compute_engine
# All workers need one workdir that outlives the pod, hence the storage. A bucket must have a
# hierarchical namespace, as checkpoints appear whole by renaming them, and the service account
# of the pod the role storage.objectUser on it:
#   gcloud storage buckets create gs://B --location=REGION --uniform-bucket-level-access \
#       --enable-hierarchical-namespace
# A worker has the repository in ~/cosmos-jax and the log of its process in run.log there.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

poll=${COSMOS_TPU_POLL:-30} # seconds between two looks at the pod

tpus() { # GROUP VERB ARGUMENT...
    run gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

worker_command() { # ARGUMENT...
    quoted bash cosmos-jax/launch/tpu_worker.sh "$@"
}

on_workers() { # all|0 ARGUMENT...
    tpus tpu-vm ssh "$name" "--worker=$1" "--command=$(worker_command "${@:2}")"
}

# GROUP FIELD: one word in capitals; ABSENT if there is no such thing, UNKNOWN if gcloud fails.
ask() {
    local answer
    answer=$(tpus "$1" describe "$name" "--format=value($2)" 2>&1) || true
    grep -xEm1 '[A-Z_]+' <<<"$answer" || {
        if [[ $answer == *NOT_FOUND* ]]; then
            echo ABSENT
        else
            echo "$answer" >&2
            echo UNKNOWN
        fi
    }
}

# The state of the request for the pod; once that is granted, of the pod.
state() {
    local state
    state=$(ask queued-resources state.state)
    if [[ $state == ACTIVE ]]; then
        state=$(ask tpu-vm state)
        [[ $state != ABSENT ]] || state=TERMINATED
    fi
    echo "$state"
}

is_lost() { # STATE
    [[ " SUSPENDING SUSPENDED FAILED PREEMPTED TERMINATED STOPPING STOPPED DELETING " == *" $1 "* ]]
}

request_pod() {
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
        "--runtime-version=$runtime" ${spot:+--spot}
}

delete_pod() {
    tpus queued-resources delete "$name" --force --quiet
}

# Succeeds when the pod is ready, fails when it will not be.
wait_for_pod() {
    local now last=
    if is_dry_run; then
        tpus queued-resources describe "$name" "--format=value(state.state)"
        tpus tpu-vm describe "$name" "--format=value(state)"
        return
    fi
    while now=$(state) && [[ $now != READY ]]; do
        [[ $now == "$last" ]] || echo "$name is $now"
        last=$now
        if is_lost "$now" || [[ $now == ABSENT ]]; then
            return 1
        fi
        sleep "$poll"
    done
}

check_bucket() {
    local command=(gcloud storage buckets describe "gs://$bucket" --raw
        "--format=value(hierarchicalNamespace.enabled)" ${project:+"--project=$project"})
    if is_dry_run; then
        quoted "${command[@]}"
    elif [[ $("${command[@]}") != [Tt]rue ]]; then
        fail "gs://$bucket has no hierarchical namespace; see --help for how to make one that has"
    fi
}

install_on_workers() {
    local commit archive
    if [[ $bucket ]]; then
        check_bucket
    fi
    commit=$(git -C "$root" rev-parse --short=12 HEAD) || fail "$root is not a git checkout"
    archive=${TMPDIR:-/tmp}/cosmos-jax-$commit.tar.gz
    if [[ $(git -C "$root" status --porcelain) ]]; then
        echo "note: the commit $commit is copied, without the changes since" >&2
    fi
    run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD &&
        tpus tpu-vm scp "$archive" "$name:cosmos-jax.tar.gz" --worker=all &&
        tpus tpu-vm ssh "$name" --worker=all "--command=mkdir -p cosmos-jax && tar -xzf\
 cosmos-jax.tar.gz -C cosmos-jax && $(worker_command install ${bucket:+"--bucket=$bucket"} \
            ${nfs:+"--nfs=$nfs"})"
}

# Ends as the run ends, or with 1.
run_on_workers() {
    on_workers all start "${flags[@]}" && on_workers 0 follow
}

# For some minutes: the pod's state may lag behind what happened to the run.
lost_soon() {
    local _
    for _ in 1 2 3 4 5 6; do
        if is_lost "$(state)"; then
            return
        fi
        sleep "$poll"
    done
    return 1
}

watch_pod() {
    local now ended
    if is_dry_run; then
        request_pod
        wait_for_pod
        install_on_workers
        run_on_workers
        echo "# whenever the pod is lost, this and then all of the above again:"
        delete_pod
        return
    fi
    while true; do
        now=$(state)
        if is_lost "$now"; then
            echo "$name is $now: making it again"
            delete_pod || echo "cannot delete $name yet; trying again"
            now=$(state)
        fi
        if [[ $now == ABSENT ]]; then
            request_pod
        fi
        if ! wait_for_pod; then
            sleep "$poll"
            continue
        fi
        # A run that goes on already keeps the code it has.
        ended=0
        on_workers 0 is-running || install_on_workers || ended=1
        ((ended)) || run_on_workers || ended=$?
        if ((ended == 0)); then
            return
        elif ! lost_soon; then
            case $ended in
                2 | "$crashed") return "$ended" ;;
                "$stopped")
                    echo "the run was stopped and saved; the same command goes on from there"
                    return
                    ;;
                *) echo "no connection to $name; trying again" ;;
            esac
        fi
    done
}

value() { # OPTION: what was given, or its variable
    local variable=COSMOS_TPU_${1^^}
    echo "${option[$1]:-${!variable:-}}"
}

has_workdir_in() { # FOLDER/
    [[ " ${flags[*]}" == *" --workdir"[=\ ]"$1"* ]]
}

read_options "name zone type runtime project bucket nfs" "spot" "$@"
task=${words[0]:-}
((${#words[@]} < 2)) || fail "unexpected argument '${words[1]}'; see --help"
name=$(value name) zone=$(value zone) type=$(value type) runtime=$(value runtime)
project=$(value project) spot=$(value spot) bucket=$(value bucket) nfs=$(value nfs)
name=${name:-cosmos} bucket=${bucket#gs://}
[[ ! $bucket || ! $nfs ]] || fail "give --bucket or --nfs, not both"

case $task in
    create | watch)
        [[ $type ]] || fail "--type is needed, such as v5litepod-16"
        [[ $runtime ]] || fail "--runtime is needed, such as v2-alpha-tpuv5-lite"
        ;;&
    run | watch)
        need_config
        if [[ $bucket$nfs ]]; then
            has_workdir_in "$storage/" ||
                fail "--workdir must be a folder of the storage: --workdir=$storage/DIR"
        else
            has_workdir_in / || fail "--workdir must be an absolute path, on storage that all" \
                "workers share; see --bucket and --nfs in --help"
        fi
        ;;&
    create | install | run | watch | stop | status | delete)
        [[ $zone ]] || fail "--zone is needed, such as us-west4-a"
        ;;&
    create)
        request_pod
        wait_for_pod || fail "$name will not become ready; see: launch/tpu_pod.sh status"
        ;;
    install) install_on_workers ;;
    run) run_on_workers ;;
    watch) watch_pod ;;
    stop) on_workers all stop ;;
    status)
        tpus queued-resources describe "$name" "--format=yaml(name,state)"
        tpus tpu-vm describe "$name" "--format=yaml(name,state,health)"
        ;;
    delete) delete_pod ;;
    "") fail "say what to do: create, install, run, watch, stop, status or delete; see --help" ;;
    *) fail "unknown command '$task'; see --help" ;;
esac
