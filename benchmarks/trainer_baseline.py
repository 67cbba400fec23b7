"""The same fine-tuning by transformers' Trainer, for comparison; prints the samples/s of its steps.

python -m benchmarks.trainer_baseline BACKBONE DATA STEPS WARM_UP '{"bf16": true}' [--pad-to-max]

The JSON object holds flags of TrainingArguments; {} are its defaults. The first WARM_UP of the
STEPS are not timed. --pad-to-max: all rows 128 tokens long.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from training.ag_news import LABELS, find_data
from training.dataset import prepare_data

BATCH = 32


class Clock(TrainerCallback):
    """The time at which each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    backbone, source, steps, warm_up = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    flags = json.loads(sys.argv[5])
    train = prepare_data(find_data(source), backbone, 128, steps * BATCH, 8).train
    rows = [{"input_ids": train[i][0].tolist(), "labels": train[i][1]} for i in range(len(train))]
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=len(LABELS), dtype=torch.float32
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # without it bf16 is refused on a CPU
            **flags,
        )
        padding = {"padding": "max_length", "max_length": 128} if "--pad-to-max" in sys.argv else {}
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(backbone), **padding)
        Trainer(model, args, collator, rows, callbacks=[clock]).train()
    seconds = clock.ends[-1] - clock.ends[warm_up - 1]
    print(json.dumps({"samples_per_second": (steps - warm_up) * BATCH / seconds}))


if __name__ == "__main__":
    main()
