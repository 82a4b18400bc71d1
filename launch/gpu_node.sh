#!/usr/bin/env bash
# All GPUs of this machine, driven by one process:
#
#   bash launch/gpu_node.sh [OPTION...] FLAG...
#
#   --gpus=N      use the first N of them only
#   --restarts=N  start again, up to N times, after a crash; the run goes on from its last
#                 checkpoint. A mistake in the flags (status 2) is not a crash. Default 0
#   --dry-run     print the command and run nothing
#   --help
#   FLAG...       of `python -m cosmos_jax.main`: --config=FILE --workdir=DIR ...; what comes
#                 after -- is passed on as it is
#
#   COSMOS_VENV   the environment; default: .venv in the repository
#
# The environment, once: bash launch/install.sh && .venv/bin/python -m pip install "jax[cuda13]"
# How the GPUs share the work is --config.mesh.{data,fsdp,tensor}; XLA_FLAGS is passed on as it
# is. SIGTERM and Ctrl-C make the run save a checkpoint and stop.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# One line for what JAX would hide in a traceback, or in a run on the CPU.
check_gpus() {
    local visible
    if ! visible=$(nvidia-smi -L 2>/dev/null) || [[ -z $visible ]]; then
        fail "nvidia-smi shows no GPU; install the NVIDIA driver, or run launch/quickstart.sh"
    fi
    if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
        visible=${CUDA_VISIBLE_DEVICES//,/$'\n'}
    fi
    visible=$(wc -l <<<"$visible")
    ((${option[gpus]:-1} <= visible)) || fail "--gpus=${option[gpus]}, but $visible are visible"
    "$venv/bin/python" -c 'if True:
        from importlib.util import find_spec
        raise SystemExit(not any(map(find_spec, ["jax_cuda13_plugin", "jax_cuda12_plugin"])))' ||
        fail "JAX in $venv has no CUDA: $venv/bin/python -m pip install -U 'jax[cuda13]'"
}

read_options "gpus restarts" "" "$@"
no_words
restarts=${option[restarts]:-0}
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts'; it must be a whole number"
# A run on the CPU instead would be a surprise. Without SLURM_JOB_ID, which a shell under srun
# has, JAX takes all GPUs, not one.
variables=("JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}")
if [[ ${option[gpus]:-} ]]; then
    need_number --gpus "${option[gpus]}"
    variables+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((option[gpus] - 1)))")
fi
make_main_command --unset=SLURM_JOB_ID "${variables[@]}"
if is_dry_run; then
    quoted "${main_command[@]}" ${flags[@]+"${flags[@]}"}
    exit
fi
check_gpus

stopping=
trap 'stopping=yes' TERM INT
for ((start = 1; ; start++)); do
    "${main_command[@]}" ${flags[@]+"${flags[@]}"} &
    pid=$!
    # A signal would end `wait` before the run.
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2 || true # Ctrl-C reaches it as well
        if [[ $stopping == yes ]]; then
            stopping=sent
            kill -s TERM "$pid" 2>/dev/null || true
        fi
    done
    status=0
    wait "$pid" || status=$?
    if [[ $stopping || $status == [02] ]] || ((start > restarts)); then
        exit "$status"
    fi
    echo "the run ended with status $status; restart $start of $restarts" >&2
    sleep 2 || true # for the driver to free what the dead process held
    [[ ! $stopping ]] || exit "$status"
done
