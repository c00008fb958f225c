#!/usr/bin/env bash
# An installation of Manta inside a Slurm allocation: `sbatch cluster/slurm.sh`. The first node is the head and serves
# the front end on its loopback, the others join it. Jobs are submitted on the head: `srun --overlap --jobid=ID --nodes=1
# --nodelist=HEAD manta --home $MANTA_HOME submit job.yaml`, or through an SSH tunnel to its port 8000.
#
# MANTA_HOME must be a folder that all nodes see, owned by you; MANTA_VENV the environment that `make venv` made. When the
# allocation ends, jobs write checkpoints in the time that --signal leaves, and continue in the next allocation. To end it
# earlier in the same way: `scancel --batch --signal=TERM ID`; `scancel ID` alone leaves them KillWait, which is 30 s.
#SBATCH --job-name=manta
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=manta-%j.log
set -euo pipefail
: "${MANTA_HOME:?set it to a folder that all nodes see}"
: "${MANTA_DATABASE_URL:?set it to a PostgreSQL server; SQLite only on a disk of one node, never on a shared folder}"
: "${MANTA_VENV:?set it to the virtual environment, such as the .venv of a checkout}"
export MANTA_HOME MANTA_DATABASE_URL PATH="$MANTA_VENV/bin:$PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

srun --job-name=head --nodes=1 --ntasks=1 --nodelist="$head" manta serve --nodes-at "$ip" &
steps=($!)
if ((${#nodes[@]} > 1)); then # one that leaves, which Ray does with exit code 1, must not take the others with it
    srun --job-name=workers --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \
        --kill-on-bad-exit=0 --wait=0 manta cluster add-node --wait 300 --drain 240 &
    steps+=($!)
fi
end() { # by the name of the step: srun itself answers a SIGTERM with SIGKILL for its tasks
    squeue --noheader --steps --jobs="$SLURM_JOB_ID" --name="$1" --format=%i | xargs -r scancel --signal=TERM || true
}
stop() { # workers first: they have something to save while the head is still there
    if ((${#steps[@]} > 1)); then
        end workers
        wait "${steps[1]}" || true
    fi
    end head
}
trap stop TERM INT
wait "${steps[0]}" || true # until it ends, or a signal comes
wait
