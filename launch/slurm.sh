#!/usr/bin/env bash
# A job on the GPUs of a SLURM cluster:
#
#   bash launch/slurm.sh --nodes=2 --gpus-per-node=8 [OPTION...] FLAG...
#
#   --gpus-per-node=N   needed; a number, or TYPE:NUMBER
#   --nodes=N           default 1
#   --cpus-per-task=N --mem=SIZE --time=LIMIT --partition= --account= --qos= --constraint=
#                       --job-name=    as in sbatch; it reads others from variables, such as
#                                      SBATCH_RESERVATION
#   --logs=DIR          default: logs, here
#   --dry-run           print the commands, and with them the batch script; submit nothing
#   --help
#   FLAG...             of `python -m cosmos_jax.main`: --config=FILE --workdir=DIR ...; what
#                       comes after -- is passed on as it is
#
#   COSMOS_VENV         the environment; default: .venv in the repository
#
# The environment, once, where all nodes see it:
#   bash launch/install.sh && .venv/bin/python -m pip install "jax[cuda13]"
# The workdir must lie on a file system that all nodes share. One process drives the GPUs of a
# node. Two minutes before its time is up, or when it is preempted, the run saves a checkpoint,
# and the job goes back to the queue and goes on from there. `scancel JOB` ends it for good.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

passed_on=(cpus-per-task mem time partition account qos constraint)
read_options "nodes gpus-per-node job-name logs ${passed_on[*]}" "" "$@"
no_words
need_config
nodes=${option[nodes]:-1} logs=${option[logs]:-logs} job_name=${option[job-name]:-cosmos}
gpus=${option[gpus-per-node]:-}
[[ $gpus ]] || fail "say how many GPUs of each node to use: --gpus-per-node=N"
need_number --nodes "$nodes"
need_number --gpus-per-node "${gpus##*:}"
[[ $job_name =~ ^[A-Za-z0-9_.-]+$ ]] ||
    fail "--job-name is '$job_name'; it may have letters, digits, '_', '.' and '-' only"

# Under srun JAX would take one GPU for each process; here a process has all of its node.
make_main_command "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}" \
    "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${gpus##*:} - 1)))"

srun=(srun --kill-on-bad-exit=1)
if [[ ${option[cpus-per-task]:-} ]]; then
    srun+=("--cpus-per-task=${option[cpus-per-task]}") # srun does not take it from sbatch
fi

# --signal without "B:" signals the steps, not the batch script, which so learns from the log
# of this start of the job whether the run was stopped or finished.
batch_script() {
    cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$job_name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
END
    local name
    for name in "${passed_on[@]}"; do
        if [[ ${option[$name]:-} ]]; then
            echo "#SBATCH --$name=${option[$name]}"
        fi
    done
    cat <<END
#SBATCH --output=$logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

log=$(quoted "$logs")/\$SLURM_JOB_NAME-\$SLURM_JOB_ID.\${SLURM_RESTART_COUNT:-0}.log
$(quoted "${srun[@]}") --output="\$log" \\
    $(quoted "${main_command[@]}" "${flags[@]}")
if grep -Eq '$stopped_early' "\$log"; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
END
}

run mkdir -p "$logs"
if is_dry_run; then
    printf "sbatch <<'END'\n%s\nEND\n" "$(batch_script)"
else
    sbatch <<<"$(batch_script)"
fi
