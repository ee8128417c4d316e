"""What a loss says of a training: at once that it means nothing, or at its end that it is worse than it began."""

import math

from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from ..errors import TrainingError


class LossWatch(TrainerCallback):
    """Stop a training at its first step where the loss is wrong there, and at any where it is no number.

    The log of a step comes before its checkpoint, so nothing of such a step is saved.
    """

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        losses = {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} at step {state.global_step} is {value}: weights or activations are no numbers any more.",
                    "Lower LEARNING_RATE, or set DTYPE=fp32; at step 1 the checkpoint may be broken: take another one.",
                )
        if state.global_step == 1 and "loss" in losses:
            check_first(logs, args)


def check_first(logs: dict, args: DPOConfig) -> float:
    """The loss before the first update, of what TRL logs at that step: `loss`, and the mean margin `rewards/margins`.

    Policy and reference are one model then: the margin is 0, DPO's loss ln 2.

    A reference computed before training saw other batches, which in 16 bits round differently: an answer's log π by up
    to a nat or so, which beta scales. Else both saw the same batch, and a loss shows nothing between them.

    Raises:
        TrainingError: they are not; then the reference is wrong, and the training means nothing.
    """
    rounded = args.precompute_ref_log_probs and (args.bf16 or args.fp16)
    limit = max(1e-3, args.beta) if rounded else 1e-3
    if args.loss_type == ["sigmoid"] and not abs(logs["loss"] - math.log(2)) < limit:
        found = f"loss at step 0 is {logs['loss']:.4f}, not ln 2 = {math.log(2):.4f}"
    elif not abs(logs.get("rewards/margins", 0.0)) < 2 * limit:
        found = f"mean margin at step 0 is {logs['rewards/margins']:.4f}, not 0"
    else:
        return float(logs["loss"])
    raise TrainingError(
        f"The {found}: policy and reference differ too early.",
        "Train the base of models.load_base with a fresh adapter, and let its own base be the reference.",
    )


def remark(trainer: DPOTrainer) -> str:
    """What to say of a training whose last ten steps lie above where it began; empty of any other."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    end = sum(losses[-10:]) / max(1, len(losses[-10:]))
    if not losses or end <= 1.05 * losses[0]:
        return ""
    return (
        f"Warning: the loss began at {losses[0]:.4f} and ended at {end:.4g}, so this adapter is worse than none: lower "
        f"LEARNING_RATE ({trainer.args.learning_rate:g}), or look at the labels."
    )
