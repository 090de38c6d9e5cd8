"""A run goes on with the configuration that it began with; what may differ is a list of keys."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.config_files import write_files
from vqrae_ds.config import Run, read_run
from vqrae_ds.config.checking import key_names
from vqrae_ds.config.resuming import MAY_DIFFER, check_same_run, record
from vqrae_ds.config.schema import TrainConfig

WHERE = Path("run/checkpoints/step_00000010/run.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With every section that may be null, so that every key is there."""
    folder = tmp_path_factory.mktemp("run")
    changes = ("ema.decay=0.99", "losses.convnext={}", "losses.adversarial={}")
    return read_run(*write_files(folder, *changes), world_size=2)


def read_back(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps(record(run)))


def changed(saved: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    *sections, key = name.split(".")
    target = saved
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = value
    return saved


def test_the_same_run_goes_on(run):
    check_same_run(run, read_back(run), WHERE)


def names_of(section: dict[str, Any], prefix: str) -> list[str]:
    names = []
    for key, value in section.items():
        inner = isinstance(value, dict) and value
        names += names_of(value, f"{prefix}{key}.") if inner else [prefix + key]
    return names


def with_another(section: Any, name: str) -> Any:
    """A copy of a section in which one key has a value that is found nowhere else; unchecked."""
    key, _, rest = name.partition(".")
    inner = section[key] if isinstance(section, dict) else getattr(section, key)
    inner = with_another(inner, rest) if rest else "another"
    if isinstance(section, dict):
        return {**section, key: inner}
    return section.model_copy(update={key: inner})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the value "another"
def test_each_key_is_refused_unless_it_is_listed(run):
    saved = read_back(run)
    names = names_of(saved["config"], "") + names_of(saved["deepspeed"], "deepspeed.")
    assert len(names) > 100
    for name in names:
        if name.startswith("deepspeed."):
            other = run._replace(deepspeed=with_another({"deepspeed": run.deepspeed}, name))
            other = other._replace(deepspeed=other.deepspeed["deepspeed"])
        else:
            other = run._replace(config=with_another(run.config, name))
        if name in MAY_DIFFER:
            check_same_run(other, saved, WHERE)
        else:
            with pytest.raises(
                ValueError, match=f'^{name} = "another" differs from .* in {WHERE}:'
            ):
                check_same_run(other, saved, WHERE)


def test_what_a_run_is_made_of_is_not_listed():
    kept = ("stage", "model.embedding_dim", "run.seed", "run.total_steps", "losses.adversarial")
    kept += ("ema", "ema.decay", "deepspeed.train_batch_size")
    kept += ("deepspeed.bf16.enabled", "deepspeed.optimizer.params.lr", "deepspeed.scheduler")
    kept += ("deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.sub_group_size")
    assert not MAY_DIFFER & set(kept)


def test_the_list_names_keys_that_exist():
    fields = DeepSpeedZeroConfig.model_fields.items()
    zero = {f"deepspeed.zero_optimization.{field.alias or name}" for name, field in fields}
    batch = {"deepspeed.gradient_accumulation_steps", "deepspeed.train_micro_batch_size_per_gpu"}
    assert set(key_names(TrainConfig)) | zero | batch >= MAY_DIFFER


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config.losses.adversarial", None, 'losses.adversarial = {"weight": 0.1'),
        ("config.losses.adversarial", None, "differs from null in run/checkpoints"),
        ("config.ema", None, 'ema = {"decay": 0.99} differs from null'),
        ("config.run.seed", 7, "run.seed = 0 differs from 7"),
        ("deepspeed.bf16", {"enabled": True}, "deepspeed.bf16.enabled = false differs from true"),
        ("deepspeed.zero_optimization.sub_group_size", 9, "= nothing differs from 9"),
        ("config.run.seed", 7, "init.from_run=run/checkpoints/step_00000010"),
        ("config.seed", 7, f"{WHERE}: seed = 7 is not a known key"),
    ],
)
def test_the_line_names_the_key_both_values_and_the_way_out(run, name, value, words):
    with pytest.raises(ValueError) as caught:
        check_same_run(run, changed(read_back(run), name, value), WHERE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensor_parallelism_of_one_rank_is_none(run):
    saved, name = read_back(run), "deepspeed.tensor_parallel"
    check_same_run(run, changed(saved, name, {"autotp_size": 1}), WHERE)
    with pytest.raises(ValueError, match="tensor_parallel.autotp_size = 1 differs from 2"):
        check_same_run(run, changed(saved, name, {"autotp_size": 2}), WHERE)


def test_further_differences_are_counted(run):
    saved = changed(read_back(run), "config.run.seed", 7)
    saved = changed(saved, "deepspeed.train_batch_size", 128)
    with pytest.raises(ValueError, match=r"run.seed = 0 differs from 7 in .* \(and 1 more\)"):
        check_same_run(run, saved, WHERE)


def test_a_newer_key_counts_as_its_default(run):
    saved = read_back(run)
    del saved["config"]["run"]["deterministic"]
    del saved["config"]["losses"]["adversarial"]["lecam_weight"]
    check_same_run(run, saved, WHERE)


def test_another_number_of_ranks_and_other_communication_are_the_same_run(run, tmp_path):
    other_folder = tmp_path / "moved"
    other_folder.mkdir()
    config, deepspeed = write_files(
        other_folder,
        "ema.decay=0.99",
        "losses.convnext={}",
        "losses.adversarial={}",
        "deepspeed.train_micro_batch_size_per_gpu=4",
        "deepspeed.zero_optimization.overlap_comm=true",
        "monitor.num_images=4",
        "guard.spike_factor=null",
        "memory.frozen_encoder=resident",
    )
    moved = read_run(config, deepspeed, world_size=8)
    assert moved.schedule.batch.accumulation != run.schedule.batch.accumulation
    check_same_run(moved, read_back(run), WHERE)
