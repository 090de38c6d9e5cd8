"""Starting a run on many nodes, by SLURM or by a hostfile, and ending it everywhere.

    slurm       what a batch job does: check, one `node` per node by srun, requeue
    node        one DeepSpeed launcher on a node of a batch job, deaf to signals
    hostfile    DeepSpeed's launcher over pdsh, watched
    rank        a rank that was started over ssh, and gets arguments and environment from a file
    guardian    on each node of a hostfile: ends what is left there when the job is over or silent
    processes   those of a launch on a node, found and ended; ranks whose sibling has failed
    hosts, orders, run_folder, owner    files that these need
    slurm_job   what a batch job asks of SLURM
    doctor      looks at all nodes before a run, and is called by both launchers: the examination
                asks a probe on each over connections; what it needs is in needs and
                checkpoint_size, what it finds in checks, room and table
    all_reduce  a rank of the doctor's measurement of the network

The trainer itself knows nothing of this: it is told by signals or by a file to stop, and says by a
marker how it has ended (`stopping`).
"""
