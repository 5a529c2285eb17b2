"""A process from its start to the end of a step, as users start it: ours and a script with Transformers' Trainer.

It imports nothing before it is clear which.
"""

import os
import sys
import time


def main() -> None:
    """first_step.py ours STEP ARGUMENT... | theirs STEP FOLDER: prints when that step was done, and its peak memory."""
    side, step, *rest = sys.argv[1:]
    if side == "ours":
        sys.argv[1:] = rest
        ours(int(step))
    else:
        theirs(int(step), *rest)


def done() -> None:
    """Prints it and ends the process, as nothing that comes after counts."""
    end = time.perf_counter()  # the same clock in all processes
    from acn_scale.benchmark.sides import peak_memory

    print(end, peak_memory(), flush=True)
    os._exit(0)


def ours(last: int) -> None:
    """acn_scale/pretrain.py with these arguments."""
    from acn_scale import pretrain

    class Until(pretrain.Trainer):
        def take(self, step: int):
            result = super().take(step)
            if step == last:
                self.checkpoints.finish()
                done()
            return result

    pretrain.Trainer = Until
    pretrain.main()


def theirs(last: int, folder: str) -> None:
    """A Trainer on the ViT and the images in the folder; from its newest checkpoint there, where there is one."""
    sys.modules["deepspeed"] = None  # which its users need not have, and Transformers would import
    import numpy as np
    from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Until(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == last:
                done()

    images, labels = np.load(f"{folder}/images.npy"), np.load(f"{folder}/labels.npy")
    settings = TrainingArguments(
        output_dir=f"{folder}/out",
        max_steps=656,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.01,
        warmup_steps=196,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForImageClassification.from_pretrained(f"{folder}/vit"),
        args=settings,
        train_dataset=[
            {"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)
        ],
        callbacks=[Until()],
    )
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(settings.output_dir) if os.path.isdir(settings.output_dir) else None
    )


if __name__ == "__main__":
    main()
