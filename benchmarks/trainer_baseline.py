"""The same fine-tuning by transformers' Trainer, for comparison; prints the samples/s of its steps.

python -m benchmarks.trainer_baseline BACKBONE DATA ROWS                 its defaults, batch 32
python -m benchmarks.trainer_baseline BACKBONE DATA ROWS --best          its best flags on this host
python -m benchmarks.trainer_baseline BACKBONE DATA ROWS --pad-to-max    all rows 128 tokens long
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from training.dataset import prepare_data
from training.model import load_backbone
from training.utils import choose_precision


class Clock(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began


def main() -> None:
    backbone, source, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    flags = {}
    if "--best" in sys.argv:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision, _ = choose_precision("auto", device)  # bf16 that is emulated would be slower
        flags = {precision: True} if precision != "fp32" else {}
        flags |= {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    news = prepare_data(source, backbone, 128, rows, 8).train
    dataset = [{"input_ids": news[i][0].tolist(), "labels": news[i][1]} for i in range(rows)]
    ours = load_backbone(backbone)
    model = DistilBertForSequenceClassification(DistilBertConfig(**asdict(ours.config)))
    model.load_state_dict(ours.state_dict())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), **flags,  # without it bf16 is refused on a CPU
        )  # fmt: skip
        padding = {"padding": "max_length", "max_length": 128} if "--pad-to-max" in sys.argv else {}
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(backbone), **padding)
        Trainer(model, args, collator, dataset, callbacks=[clock]).train()
    print(json.dumps({"samples_per_second": rows / clock.seconds, "flags": flags}))


if __name__ == "__main__":
    main()
