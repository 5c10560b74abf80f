#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --signal=TERM@120 --requeue
# Two nodes, one process on each, with all of its GPUs: sbatch examples/launch/slurm_node.sh
# Workdir and data have to be on a file system that all nodes see. Two minutes before the time
# limit SLURM sends SIGTERM: the run saves, exits with 75, and goes on when it is queued again.
WORKDIR=${WORKDIR:-runs/hc18}
RESUME=$([ -e "$WORKDIR/config.json" ] && echo --resume)
srun fetal-flax train hc18 --workdir "$WORKDIR" --schedule.batch-size 128 --distributed $RESUME
CODE=$?
[ $CODE -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $CODE
