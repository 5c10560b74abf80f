#!/bin/bash
# One process on each host of a hostfile, with all of its GPUs: open_mpi.sh HOSTFILE
# Workdir and data have to be on a file system that all hosts see. Each process is told its number,
# since JAX reads it by itself under Open MPI 4, but not under Open MPI 5.
HOSTFILE=${1:?usage: open_mpi.sh HOSTFILE}
export WORKDIR=${WORKDIR:-runs/hc18}
export COORDINATOR=$(awk '!/^#/ && NF { print $1; exit }' "$HOSTFILE"):7777
export RESUME=$([ -e "$WORKDIR/config.json" ] && echo --resume)
mpirun --hostfile "$HOSTFILE" --map-by ppr:1:node -x WORKDIR -x COORDINATOR -x RESUME bash -c '
    exec fetal-flax train hc18 --workdir "$WORKDIR" --schedule.batch-size 128 --distributed \
        --coordinator "$COORDINATOR" --process-count "$OMPI_COMM_WORLD_SIZE" \
        --process-id "$OMPI_COMM_WORLD_RANK" $RESUME'
