#!/bin/bash
# A run that SLURM ends and starts again until it is complete:
#
#     sbatch configs/slurm.sh out/ft configs/ft.yaml [key=value ...]
#
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=4:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --output=%x-%j.log
out=$1
shift

# 300 s before the time is up, SLURM sends USR1 to this shell. The run saves, ends and is queued again.
trap 'touch "$out/STOP"; requeue=yes' USR1
rm -f "$out/STOP"
srun torchrun --nproc_per_node 8 train.py "$@" out_dir="$out" &
while kill -0 $! 2> /dev/null; do                        # USR1 interrupts wait
    wait $!
    status=$?
done
if [ "$requeue" ] && [ $status = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
