# shellcheck shell=bash disable=SC2034
# What the scripts that start runs share: their options, their errors and the command they start.
# Sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${COSMOS_VENV:-$root/.venv}

# How the main command says that SIGTERM stopped it before the run was finished: its status is 0.
stopped_early='^([0-9:]{8} )?stopped on request'

# Between launch/tpu_pod.sh and launch/tpu_worker.sh: where the storage is mounted, and how an ssh
# session that follows a run ends, apart from 0 and 2, which mean what they mean for the main
# command; gcloud itself ends with 1 when it fails.
storage=/mnt/cosmos
crashed=70
stopped=75

declare -A option=() # of the script: option[nodes]=2
flags=()             # of the main command
words=()             # what is neither

fail() {
    echo "error: $*" >&2
    exit 2
}

# "NAME..." "NAME..." ARGUMENT...: sorts the arguments of a script whose options have the first
# names with a value and the second ones without.
read_options() {
    local with_value=" $1 " alone=" $2 help dry-run " name
    shift 2
    while (($#)); do
        name=${1%%=*}
        name=${name#--}
        case $1 in
            --)
                flags+=("${@:2}")
                break
                ;;
            --config | --workdir | --stage)
                (($# > 1)) || fail "$1 needs a value"
                flags+=("$1" "$2")
                shift
                ;;
            --config[=.]* | --noconfig.* | --workdir=* | --stage=*) flags+=("$1") ;;
            --*)
                if [[ $1 != *=* && $alone == *" $name "* ]]; then
                    option[$name]=yes
                elif [[ $with_value != *" $name "* ]]; then
                    fail "unknown option '$1'; see --help (flags after -- go to the main command)"
                elif [[ $1 == *=?* ]]; then
                    option[$name]=${1#*=}
                elif [[ $1 != *=* && $# -gt 1 && $2 != -* ]]; then
                    option[$name]=$2
                    shift
                else
                    fail "--$name needs a value"
                fi
                ;;
            -*) fail "unknown option '$1'; see --help" ;;
            *) words+=("$1") ;;
        esac
        shift
    done
    if [[ ${option[help]:-} ]]; then
        awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
        exit
    fi
}

no_words() {
    ((${#words[@]} == 0)) || fail "unexpected argument '${words[0]}'; see --help"
}

# OPTION VALUE: a whole number above 0
need_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2'; it must be a whole number above 0"
}

is_dry_run() {
    [[ ${option[dry-run]:-} ]]
}

# A command as a line that can be pasted.
quoted() {
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line# }"
}

# Runs a command, or prints it with --dry-run.
run() {
    if is_dry_run; then
        quoted "$@"
    else
        "$@"
    fi
}

# ARGUMENT...: puts the main command, with these arguments of `env`, in the array `main_command`.
make_main_command() {
    # Not `cd`: relative paths in the flags are the caller's.
    main_command=(env "$@" "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
        "$venv/bin/python" -m cosmos_jax.main)
    if ! is_dry_run && [[ ! -x $venv/bin/python ]]; then
        fail "$venv has no bin/python; make the environment first: bash $root/launch/install.sh"
    fi
}

# For commands whose own complaint would come late and elsewhere.
need_config() {
    [[ " ${flags[*]}" == *" --config"[=\ ]* ]] || fail "no --config=FILE was given; see --help"
}
