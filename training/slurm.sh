#!/bin/bash
# Train under Slurm: one task a node, which starts one process for each of the node's GPUs.
#
#     sbatch --nodes 2 --gpus-per-node 4 training/slurm.sh RUN --config training/recipes/NAME.yaml
#
# From the project's root, in its environment. RUN is the run folder, where all nodes see it; what
# follows it goes to train.py. Two minutes before its time is up the job queues itself again, and
# goes on from its last state, as after a node's failure: --time must hold an epoch, or the recipe's
# save_steps, or more.
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

run=${1:?expected the run folder as the first argument}
shift
if compgen -G "$run/state/epoch-*" >/dev/null; then
    set -- "$@" --resume
elif ((${SLURM_RESTART_COUNT:-0})) && [[ ! -e $run/summary.json ]]; then
    set -- "$@" --overwrite # what this job began and has no state of
fi

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=(
    --config_file training/accelerate/several_nodes.yaml
    --num_machines "$SLURM_JOB_NUM_NODES"
    --num_processes "$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))"
    --main_process_ip "$head"
    --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" # each job its own
)

requeue() {
    scontrol requeue "$SLURM_JOB_ID"
    wait # until Slurm has ended it
}
trap requeue USR1

# In the background, as bash heeds no signal while a command runs in the foreground.
# shellcheck disable=SC2016 # each node's own rank
srun --kill-on-bad-exit=1 --cpu-bind=none \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' bash \
    "${launch[@]}" training/train.py --output "$run" "$@" &
wait "$!"
