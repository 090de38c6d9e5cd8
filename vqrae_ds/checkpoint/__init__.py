"""Checkpoints of a run: save, find the newest intact one, resume; and another run's to start from.

    RUN/frozen/
      DIGEST.safetensors    the frozen encoder or teacher: written once, its name is its content's
    RUN/checkpoints/step_00001000/
      generator/            DeepSpeed's files of the generator engine; frozen.safetensors, what else
                            is frozen: SimVQ's codebook
      discriminator/        DeepSpeed's files of the discriminator engine, where there is one
      model_config.json     the tokenizer's configuration: a checkpoint can be converted by itself
      run.json              YAML and DeepSpeed JSON as resolved, which a resume is held to
      trainer_state.json    step, samples, stage, and what else the training loop remembers
      rng_rank_00000.pt     random states of each rank
      ema_rank_00000.pt     each rank's share of the moving average of the weights, where it is on
      manifest.json         written last: without it the folder does not exist for a resume; names
                            the file in RUN/frozen that belongs to it

DeepSpeed's own marker `latest` is neither atomic nor last, so it is not written. DeepSpeed's reader
is not used either: `sharding/loading.py` reads what its writer left, on any number of ranks.

Every file is synced by the rank that writes it before the manifest vouches for it. A save that
fails leaves nothing, and does not end the run: `Saver` counts it. With `checkpoint.local_dir` the
files go over the node's own disk (`publishing.py`); the run's folder is the same in the end.
"""

from vqrae_ds.checkpoint.finding import find, resolve_start
from vqrae_ds.checkpoint.frozen import write_pretrained
from vqrae_ds.checkpoint.names import TrainState, step_folder
from vqrae_ds.checkpoint.resuming import Resumed, resume
from vqrae_ds.checkpoint.saver import Saver, prepare_local_dir
from vqrae_ds.checkpoint.saving import Content, SaveFailed, save
from vqrae_ds.checkpoint.space import warn_of_shortage

__all__ = [
    "Content",
    "Resumed",
    "SaveFailed",
    "Saver",
    "TrainState",
    "find",
    "prepare_local_dir",
    "resolve_start",
    "resume",
    "save",
    "step_folder",
    "warn_of_shortage",
    "write_pretrained",
]
