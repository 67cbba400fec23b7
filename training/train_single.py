"""Fine-tune DistilBERT on AG News in one process: the baseline.

python training/train_single.py                           # AG News, on the GPU if there is one
python training/train_single.py --data sample --model packaged   # minutes, no network
diff training/train_single.py training/train_ddp.py       # what DDP adds, and nothing else
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler

import utils
from dataset import (
    LABELS,
    DataError,
    LengthWindows,
    eval_loader,
    load_tokenizer,
    prepare_data,
    train_loader,
)
from model import ModelError, find_backbone, load_backbone
from utils import print0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # data and model
    add("--data", default="auto", help="auto, ag_news (the Hub's), sample, or a folder with "
        "train.csv and test.csv")
    add("--model", default="auto", help="auto, packaged (needs no Hub), a Hub name, or a folder")
    add("--max-length", type=int, default=128, help="tokens; 99 %% of AG News is shorter")
    add("--max-train-samples", type=int, help="train on a random part of this many rows")
    add("--max-eval-samples", type=int, help="evaluate on at most this many rows")
    # optimization
    add("--epochs", type=int, default=2)
    add("--max-steps", type=int, help="end after this many optimizer steps")
    add("--global-batch-size", type=int, default=32, help="rows of a step, over all processes")
    add("--micro-batch-size", type=int, help="rows of one forward of one process (default: its "
        "whole share of a step)")
    add("--lr", type=float, help="peak learning rate (default: 5e-5; 1e-4 for a backbone narrower "
        "than 768)")
    add("--warmup", type=float, default=0.1, help="part of all steps in which the lr rises")
    add("--dropout", type=float, help="in the encoder (default: the backbone's own, 0.1)")
    add("--patience", type=int, help="end after this many epochs without a lower validation loss, "
        "and keep the best epoch's weights (default: off)")
    add("--seed", type=int, default=0)
    # the machine
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    # what is kept
    add("--checkpoint-dir", type=Path, default=Path(__file__).parent.parent / "checkpoints")
    add("--save-every", type=int, default=1000, help="steps between two saves of last.pt")
    add("--resume", choices=["auto", "never"], default="auto", help="auto: go on from last.pt, "
        "which an unfinished run leaves")
    add("--report", type=Path, help="write the run record here too (always: runs/*.json)")
    add("--tensorboard", type=Path, help="write event files to this folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    utils.tune_memory()
    stop = utils.StopSignal()
    world_size = 1
    micro_batch_size, grad_accum_steps = utils.check_flags(args, world_size)
    device, backend = utils.choose_device()
    precision, precision_why = utils.choose_precision(args.precision, device)
    autocast = utils.autocast(device, precision)
    put = partial(Tensor.to, device=device, non_blocking=True)  # a plain copy waits for the GPU

    utils.hub_answers()
    folder, model_source, model_why = find_backbone(args.model)
    data = prepare_data(
        args.data, folder, args.max_length, args.max_train_samples, args.max_eval_samples
    )

    torch.manual_seed(args.seed)  # for the new head; the encoder's weights are loaded
    raw_model = load_backbone(folder, args.dropout).to(device)
    args.lr = args.lr or (5e-5 if raw_model.config.dim >= 768 else 1e-4)
    optimizer = utils.make_optimizer(raw_model, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    generator = torch.Generator()
    sampler = RandomSampler(data.train, generator=generator)
    steps = LengthWindows(sampler, data.train.lengths, args.global_batch_size)
    train_batches = train_loader(data.train, steps, micro_batch_size, pin=device.type == "cuda")
    val_batches, test_batches = (
        eval_loader(split, 64) for split in (data.val, data.test)
    )
    total_steps = min(len(steps) * args.epochs, args.max_steps or math.inf)

    record = utils.start_record(
        args, device, backend, precision, micro_batch_size, grad_accum_steps, total_steps,
        raw_model, model_source, data, LABELS,
    )  # fmt: skip
    print0(f"model: {model_source} ({model_why}), {record['parameters']:,} parameters")
    print0(f"data: {data.source} ({data.why}), {len(data.train):,} training rows{data.note}")
    print0(f"device: {world_size} x {device.type}, {precision} ({precision_why}), {backend}")
    print0(f"batch: {args.global_batch_size} rows = {micro_batch_size} per forward x {world_size} "
           f"processes x {grad_accum_steps} accumulated; {total_steps:,} steps, lr {args.lr:g}")
    last_pt = args.checkpoint_dir / "last.pt"
    at = utils.resume(last_pt, args.resume, record, raw_model, optimizer, scaler)

    model = raw_model
    watch = utils.Stopwatch(device, at)
    bar = utils.Progress(at, steps, total_steps)
    for epoch in range(at["epoch"], args.epochs):
        generator.manual_seed(args.seed + epoch)
        steps.start = at["step"]
        totals = torch.tensor(at["totals"], dtype=torch.float64, device=device)  # loss, correct
        bar.loss_sum = at["totals"][0]
        watch.train()
        stop.deferred = True  # from here a signal waits for the end of its step
        for step, micro_batches in enumerate(train_batches, start=at["step"]):
            if epoch * len(steps) + step >= total_steps:
                break
            utils.seed_step(args.seed, epoch, step)
            utils.set_lr(optimizer, epoch * len(steps) + step, total_steps, args.lr, args.warmup)
            step_rows = steps.row_count(step)
            for input_ids, attention_mask, labels in micro_batches:
                with autocast():
                    logits = model(put(input_ids), put(attention_mask)).float()
                labels = put(labels)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                # divided by the whole step's rows: parts may be uneven, so no mean of means
                scaler.scale(loss / step_rows).backward()
                totals += torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])
            scaler.unscale_(optimizer)  # the limit is meant for the true gradients
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            at["step"] = step + 1
            watch.step(step_rows)

            # a GPU lags behind its launches; reading a number waits for it, so not in every step
            saving = at["step"] % args.save_every == 0 or at["step"] == len(steps)
            reading = saving or device.type == "cpu" or at["step"] % 20 == 0
            loss_sum = totals[0].item() if reading else None
            bar.update(step_rows, loss_sum)
            why = utils.reduce_max(utils.NOT_FINITE if utils.is_bad(loss_sum) else stop.number)
            if why == utils.NOT_FINITE:
                raise utils.UsageError(utils.explain_not_finite(at, precision, last_pt))
            if why or saving:
                watch.switch("save")
                at["totals"] = utils.reduce_sum(totals.tolist())
                utils.save_last(last_pt, at, record, raw_model, optimizer, scaler)
                if why:
                    stop.exit(why, f"stopped at epoch {epoch + 1}, step {at['step']}, and saved "
                              f"{last_pt}; the same command goes on from there")
                watch.train()
        stop.deferred = False

        loss_sum, correct = utils.reduce_sum(totals.tolist())
        rows = min(at["step"] * steps.global_batch_size, len(data.train))
        watch.switch("eval")
        val = utils.evaluate(raw_model, val_batches, device, autocast, len(data.val))
        watch.switch(None)
        train = (loss_sum / rows, correct / rows)
        enough = utils.end_epoch(at, train, val, raw_model, args.patience)
        if enough or (epoch + 1) * len(steps) >= total_steps:
            break
    bar.close()

    if at["best"]:
        raw_model.load_state_dict(at["best"])
    watch.switch("test")
    test = utils.evaluate(raw_model, test_batches, device, autocast, len(data.test))
    watch.switch(None)
    utils.finish_record(record, at, *test, device, args)
    load_tokenizer(folder).save_pretrained(args.checkpoint_dir / "tokenizer")
    utils.save_model(args.checkpoint_dir / "distilbert_agnews.pt", raw_model, record)
    utils.forget(last_pt)  # nothing is left to go on with


if __name__ == "__main__":
    with utils.one_line_errors(DataError, ModelError, utils.UsageError, utils.CheckpointError):
        main()
