#!/usr/bin/env bash
# Several processes on this machine as one cluster:
#
#   bash launch/local_processes.sh N [OPTION...] FLAG...
#
#   N             how many processes
#   --gpus=M      share M GPUs evenly among them; without it they run on the CPU
#   --dry-run     print the commands and run none
#   --help
#   FLAG...       of `python -m cosmos_jax.main`: --config=FILE --workdir=DIR ...; what comes
#                 after -- is passed on as it is
#
#   COSMOS_PORT   the port they meet at; default: a free one
#   COSMOS_GRACE  seconds the others have once one has failed, as they may be waiting for it
#                 forever; default 60
#   COSMOS_VENV   the environment that launch/install.sh made; default: .venv in the repository
#
# Lines of output begin with the number of their process. SIGTERM and Ctrl-C go on to all
# processes, which save a checkpoint and stop; a second Ctrl-C kills them.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

free_port() {
    local port
    while true; do
        port=$((20000 + RANDOM % 10000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

# NUMBER: puts the command of that process in the array `command`.
make_command() {
    local variables=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}")
    if ((gpus)); then
        local first=$(($1 * gpus / number))
        variables=("JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}"
            "JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + gpus / number - 1)))")
    fi
    make_main_command "${variables[@]}"
    command=("${main_command[@]}" "--coordinator=localhost:$port" "--num_processes=$number"
        "--process_id=$1" ${flags[@]+"${flags[@]}"})
}

running=()
send() {
    if ((${#running[@]})); then
        kill -s "$1" "${running[@]}" 2>/dev/null || true
    fi
}

read_options "gpus" "" "$@"
((${#words[@]} == 1)) || fail "say once how many processes: local_processes.sh N FLAG..."
number=${words[0]} gpus=${option[gpus]:-0} grace=${COSMOS_GRACE:-60}
need_number "the number of processes" "$number"
need_number COSMOS_GRACE "$grace"
if [[ ${option[gpus]:-} ]]; then
    need_number --gpus "$gpus"
    ((gpus % number == 0)) || fail "--gpus=$gpus cannot be shared evenly by $number processes"
fi
port=${COSMOS_PORT:-$(free_port)}

# Noted here and sent once all processes are started, so that none is left out.
interrupt=TERM signal=
trap 'signal=TERM' TERM
trap 'signal=$interrupt interrupt=KILL' INT

printers=()
for ((i = 0; i < number; i++)); do
    make_command "$i"
    if is_dry_run; then
        quoted "${command[@]}"
        continue
    fi
    # A printer ends with the output it prints, not with the signals a terminal sends to all.
    exec {output}> >(trap '' INT TERM && exec sed -u "s/^/[$i] /")
    printers+=("$!")
    "${command[@]}" >&"$output" 2>&1 &
    running+=("$!")
    exec {output}>&-
done

status=0
deadline=
while ((${#running[@]})); do
    sleep 0.2 || true # Ctrl-C reaches it as well
    if [[ $signal ]]; then
        now=$signal signal= # as one command, between whose parts no other signal can come
        send "$now"
    fi
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
            continue
        fi
        ended=0
        wait "$pid" || ended=$?
        if ((ended && !status)); then
            status=$ended
            deadline=$((SECONDS + grace))
            echo "error: a process ended with status $status; the others have $grace seconds" >&2
        fi
    done
    running=(${left[@]+"${left[@]}"})
    if [[ $deadline ]] && ((SECONDS >= deadline)); then
        exec 2>/dev/null # for what bash says of each process that is killed
        send KILL
    fi
done
if ((${#printers[@]})); then
    wait "${printers[@]}" || true
fi
exit "$status"
