"""The tested keys of the DeepSpeed JSON, and the values that go together.

An absent key has DeepSpeed's own default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vqrae_ds.config.checking import Positive, PositiveNumber, Section, Weight, show

Ratio = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[float, Field(ge=0, allow_inf_nan=False, multiple_of=1)]  # 5e8 is a count too

LEFT_OUT: Any = None  # the key may be left out, but not be null: DeepSpeed's own default applies


class OptimizerParams(Section):
    """Arguments of the optimizer. `lr` is the base that the YAML's `lr_multiplier` scales."""

    lr: PositiveNumber
    betas: Annotated[list[Momentum], Field(min_length=2, max_length=2)] = LEFT_OUT
    eps: Weight = LEFT_OUT
    weight_decay: Weight = LEFT_OUT
    torch_adam: bool = LEFT_OUT
    momentum: Momentum = LEFT_OUT


class Optimizer(Section):
    """`torch_adam` takes PyTorch's AdamW, which compiles nothing at the start."""

    type: Literal["AdamW", "SGD"]
    params: OptimizerParams

    @model_validator(mode="after")
    def _params_of_the_type(self) -> Optimizer:
        foreign = {"AdamW": ("momentum",), "SGD": ("betas", "eps", "torch_adam")}[self.type]
        for key in foreign:
            if key in self.params.model_fields_set:
                value = show(getattr(self.params, key))
                raise ValueError(
                    f"params.{key} = {value} is no parameter of {self.type}: remove it"
                )
        if self.type == "AdamW" and not self.params.torch_adam:
            raise ValueError(
                "params.torch_adam must be true: the compiled AdamW is not tested here"
            )
        return self


class SchedulerParams(Section):
    """In optimizer steps, and in shares of the learning rate.

    Without `warmup_num_steps` DeepSpeed would warm up for 1000 steps, whatever the run's length.
    """

    warmup_num_steps: Positive
    warmup_min_ratio: Ratio = LEFT_OUT
    warmup_type: Literal["linear", "log"] = LEFT_OUT
    cos_min_ratio: Ratio = LEFT_OUT


class Scheduler(Section):
    """Without the section the learning rate is constant."""

    type: Literal["WarmupCosineLR"]
    params: SchedulerParams


class Bf16(Section):
    """bfloat16 weights with fp32 masters, or with bfloat16 masters, gradients and moments.

    The latter take 10 bytes a trained parameter where the former take 16, and lose every change of
    a weight that is smaller than about 1/256 of it.
    """

    enabled: bool
    bf16_master_weights_and_grads: bool = LEFT_OUT
    bf16_optimizer_states: bool = LEFT_OUT

    @model_validator(mode="after")
    def _all_or_none(self) -> Bf16:
        masters, states = self.bf16_master_weights_and_grads, self.bf16_optimizer_states
        if bool(masters) != bool(states):
            raise ValueError(
                f"bf16_master_weights_and_grads = {show(masters)} must be the same as "
                f"bf16.bf16_optimizer_states = {show(states)}: with one alone DeepSpeed asks for "
                "its compiled optimizer, which is not tested here"
            )
        if masters and not self.enabled:
            raise ValueError(
                "bf16_master_weights_and_grads = true has no meaning with bf16.enabled = false"
            )
        return self


class DataTypes(Section):
    """In what gradients are accumulated. DeepSpeed takes the parameters' type if left out: with
    bf16 and many micro batches the small ones are lost."""

    grad_accum_dtype: Literal["fp32", "bf16"]


class OffloadOptimizer(Section):
    """Masters, gradients and moments in the memory of the host, where the optimizer then runs."""

    device: Literal["cpu"]
    pin_memory: bool = LEFT_OUT


class ZeroOptimization(Section):
    """Sizes are numbers of elements, `zero_hpz_partition_size` is one of ranks.

    `memory_efficient_linear` replaces `F.linear` for the whole process under stage 3.
    """

    stage: Annotated[int, Field(ge=1, le=3)]  # 0 writes files that no converter here reads
    overlap_comm: bool = LEFT_OUT
    contiguous_gradients: bool = LEFT_OUT
    reduce_bucket_size: Count = LEFT_OUT
    sub_group_size: Count = LEFT_OUT
    stage3_prefetch_bucket_size: Count = LEFT_OUT
    stage3_param_persistence_threshold: Count = LEFT_OUT
    stage3_max_live_parameters: Count = LEFT_OUT
    stage3_max_reuse_distance: Count = LEFT_OUT
    memory_efficient_linear: bool = LEFT_OUT
    zero_hpz_partition_size: Positive = LEFT_OUT
    offload_optimizer: OffloadOptimizer = LEFT_OUT


class TensorParallel(Section):
    """Ranks that divide decoder and codebook among them, neighbours each; all see one batch.

    The key is DeepSpeed's, the layers are the trainer's own: DeepSpeed is not shown the section.
    """

    autotp_size: Positive


class DeepSpeedJson(Section):
    """The tested keys."""

    train_batch_size: Positive
    train_micro_batch_size_per_gpu: Positive
    gradient_clipping: Weight  # 0 is off; an absent one means 1.0 to DeepSpeed
    zero_allow_untested_optimizer: bool = LEFT_OUT
    zero_force_ds_cpu_optimizer: Literal[False] = LEFT_OUT  # the compiled one is not tested here
    optimizer: Optimizer
    scheduler: Scheduler = LEFT_OUT
    bf16: Bf16 = LEFT_OUT
    data_types: DataTypes = LEFT_OUT
    zero_optimization: ZeroOptimization
    tensor_parallel: TensorParallel = LEFT_OUT

    @model_validator(mode="after")
    def _sgd_is_allowed(self) -> DeepSpeedJson:
        if self.optimizer.type == "SGD" and not self.zero_allow_untested_optimizer:
            raise ValueError(
                "zero_allow_untested_optimizer must be true with optimizer.type = SGD: "
                "DeepSpeed refuses it under ZeRO otherwise"
            )
        return self

    @model_validator(mode="after")
    def _bf16_masters_fit(self) -> DeepSpeedJson:
        if self.bf16 is None or not self.bf16.bf16_master_weights_and_grads:
            return self
        start = "bf16.bf16_master_weights_and_grads = true does not go with "
        if self.data_types is not None and self.data_types.grad_accum_dtype == "fp32":
            raise ValueError(f'{start}data_types.grad_accum_dtype = "fp32": remove one of the two')
        if self.zero_optimization.offload_optimizer is not None:
            raise ValueError(
                f"{start}zero_optimization.offload_optimizer: DeepSpeed asks for its compiled "
                "optimizer then, which is not tested here"
            )
        return self
