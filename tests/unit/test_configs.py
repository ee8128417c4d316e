"""The files of configs/: accelerate reads them, and what it would start from them is what they say."""

from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import ShardingStrategy

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {
    "ddp_2gpu.yaml": DistributedType.MULTI_GPU,
    "fsdp_qlora.yaml": DistributedType.FSDP,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
}


def launched(name: str) -> dict[str, str]:
    """The environment of the processes that `accelerate launch --config_file configs/NAME train.py` starts."""
    path = str(CONFIGS / name)
    options = launch_command_parser().parse_args(["--config_file", path, "train.py"])
    options, _, _ = _validate_launch_command(options)
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(path).deepspeed_config)
        return prepare_deepspeed_cmd_env(options)[1]
    return prepare_multi_gpu_env(options)


def test_each_file_is_loaded_names_its_kind_and_says_that_no_gpu_ran_it():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(KINDS)
    for name, kind in KINDS.items():
        found = load_config_from_file(str(CONFIGS / name))
        assert found.distributed_type == kind and found.num_processes == 2
        assert "Not run on a GPU by us" in (CONFIGS / name).read_text(encoding="utf-8")


def test_two_gpus_with_a_whole_base_each_shard_nothing():
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(launched("ddp_2gpu.yaml"))


def test_fsdp_slices_parameters_and_keeps_frozen_and_trainable_ones_apart(monkeypatch):
    said = {name: value for name, value in launched("fsdp_qlora.yaml").items() if name.startswith("FSDP_")}
    assert said["FSDP_CPU_RAM_EFFICIENT_LOADING"] == said["FSDP_SYNC_MODULE_STATES"] == "true"
    said |= dict.fromkeys(("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES"), "false")  # these ask for a GPU
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert ShardingStrategy.FULL_SHARD in (plugin.reshard_after_forward, plugin.sharding_strategy)
    assert plugin.fsdp_version == 1 and plugin.use_orig_params is False and plugin.auto_wrap_policy is not None


def test_deepspeed_slices_parameters(monkeypatch):
    for name, value in launched("deepspeed_zero3.yaml").items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    try:
        plugin = DeepSpeedPlugin()
    except ImportError:
        pytest.skip("DeepSpeed is not installed")
    assert plugin.zero_stage == 3 and plugin.zero3_init_flag
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 3
