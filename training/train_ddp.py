"""Fine-tune DistilBERT on AG News in several processes with DistributedDataParallel (DDP).

bash training/run_ddp.sh                                  # AG News, one process per GPU
bash training/run_ddp.sh --data sample --model packaged --global-batch-size 16   # no network
diff training/train_single.py training/train_ddp.py       # what DDP adds
"""

import signal

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is behind a script's `&`
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import comm_hooks
import comm_share
import dataset
import errors
import machine
import profiler
import rank_checks
import run_record
import utils
from ag_news import SourceError, find_data
from model import ModelError, find_backbone, load_backbone


def parse_args() -> argparse.Namespace:
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    # data and model
    add("--data", default="auto", help="auto (default), ag_news (the Hub's), sample, or a folder")
    add("--model", default="auto", help="auto (default), packaged, a Hub name, or a folder")
    add("--max-length", type=int, default=128, help="tokens per row (default: %(default)s)")
    add("--max-train-samples", type=int, help="train on a random part (default: all rows)")
    add("--max-eval-samples", type=int, help="evaluate on a random part (default: all rows)")
    # optimization
    add("--epochs", type=int, default=2, help="passes over the rows (default: %(default)s)")
    add("--max-steps", type=int, help="end after this many optimizer steps (default: no limit)")
    add("--global-batch-size", type=int, default=256, help="rows per step (default: %(default)s)")
    add("--micro-batch-size", type=int, help="rows per forward (default: up to 128; CPU: up to 32)")
    add("--lr", type=float, help=utils.LR_HELP)
    add("--warmup", type=float, default=0.1, help="share of all steps (default: %(default)s)")
    add("--dropout", type=float, help="in the encoder (default: the backbone's own)")
    add("--seed", type=int, default=0, help="seeds head, order, dropout (default: %(default)s)")
    # the machine
    add("--precision", choices=utils.PRECISIONS, default="auto", help="default: the fastest here")
    add("--backend", choices=utils.BACKENDS, default="auto", help="default: nccl on GPUs, or gloo")
    add("--grad-compression", choices=comm_hooks.DTYPES, default="none", help="dtype to send in")
    add("--sparse-embeddings", action="store_true", help="send only touched embedding rows")
    # what is kept
    add("--checkpoint-dir", type=Path, default=checkpoint.FOLDER, help="default: %(default)s")
    add("--save-every", type=int, default=100, help="steps between saves (default: %(default)s)")
    add("--fresh", action="store_true", help="start over, whatever last.pt holds")
    add("--report", type=Path, help="write the run record here too (always: runs/*.json)")
    add("--tensorboard", type=Path, help="write event files to this folder")
    add("--profile", type=Path, help="write each rank's trace of steps 11-13 to this folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    utils.check_flags(args)
    # DDP 1/7: one process per device. torchrun started world_size copies of this script. RANK
    # numbers them over all hosts; LOCAL_RANK numbers those on this host, so it picks the GPU.
    rank, local_rank, world_size = utils.torchrun_ranks()
    master_process = rank == 0  # not local_rank: every host has a local rank 0
    errors.end_with_launcher()
    device, backend = utils.choose_device(args.backend, local_rank)
    micro_batch_size, grad_accum_steps = utils.split_batch(args, world_size, device)
    precision, reason = utils.choose_precision(args.precision, device)
    autocast = utils.autocast(device, precision)
    machine.tune_cpu()
    if master_process:
        checkpoint.claim_folders(args)

    # DDP 2/7: data before the group. One process of each host tokenizes while the others wait for
    # its file lock. Inside the group they would wait in a collective, which times out.
    machine.set_offline_mode()  # unless the Hub answers in time
    folder, *model_source = find_backbone(args.model)
    data = dataset.prepare_data(
        find_data(args.data), folder, args.max_length, args.max_train_samples, args.max_eval_samples
    )
    # DDP 1/7: the processes meet. From here on, if one rank calls a collective, all must.
    # NCCL carries tensors between GPUs; gloo carries those on the CPU, such as counts.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    dist.init_process_group(backends, timeout=utils.collective_timeout())
    rank_checks.check_devices(device)
    rank_checks.probe_all_reduce(device)

    torch.manual_seed(args.seed)  # for the new head; the encoder's weights are loaded
    raw_model = load_backbone(folder, args.dropout, args.max_length, data.vocab_size).to(device)
    args.lr = args.lr or utils.default_lr(raw_model.config.dim, args.global_batch_size)
    optimizer = utils.make_optimizer(raw_model, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    recipe = checkpoint.make_recipe(args, data.fingerprint, raw_model, precision)
    # DDP 2/7: a host with other rows, weights or flags would train along without any error.
    rank_checks.check_same_on_all_ranks(args, recipe, f"{model_source[0]}, {data.source}")

    # DDP 3/7: the sampler. All ranks draw an epoch's order from (seed, epoch). Of each step's rows
    # rank r takes r, r + world_size, ...: step k trains on the same rows on 1 process or on 8.
    sampler = dataset.LengthGroupedSampler(
        data.train, args.global_batch_size, num_replicas=world_size, rank=rank, seed=args.seed
    )
    pin = device.type == "cuda"  # pinned memory is copied to a GPU while the CPU continues
    train_loader = DataLoader(
        data.train, micro_batch_size, sampler=sampler, collate_fn=dataset.collate, pin_memory=pin
    )
    val_loader = dataset.eval_loader(data.val, 64, rank, world_size)
    test_loader = dataset.eval_loader(data.test, 64, rank, world_size)
    steps_per_epoch = sampler.steps_per_epoch
    total_steps = min(steps_per_epoch * args.epochs, args.max_steps or math.inf)
    record = run_record.start_record(
        args, data, raw_model, model_source, (precision, reason), micro_batch_size, total_steps
    )
    profiler.check_steps(args.profile, total_steps)  # before --fresh deletes a run
    trainer_state = {"model": raw_model, "optimizer": optimizer, "scaler": scaler}
    step, history, epoch_sums = checkpoint.resume(args, recipe, trainer_state)
    stop_signals = errors.note_stop_signals()

    # DDP 4/7: the wrapper. Rank 0's weights are copied to all ranks, once. As soon as backward has
    # filled a bucket of gradients, its all-reduce starts while backward continues. Every rank gets
    # the same mean, bit for bit, so equal optimizers take equal steps: weights are not sent again.
    device_ids = [device] if device.type == "cuda" else None
    model = DistributedDataParallel(raw_model, device_ids, gradient_as_bucket_view=True)
    comm_hooks.register_comm_hook(model, args.grad_compression, args.sparse_embeddings)
    # Times a few backwards, to print what share of a step is communication. They are needed anyway:
    # after its first backward DDP rebuilds its buckets, and then sums in another order. With that
    # behind it, a resumed run is bit-identical to one that was not interrupted.
    comm_share.report(model, next(iter(train_loader)), autocast, grad_accum_steps, args, scaler)
    profiler.start(args.profile, optimizer, total_steps - step)

    tensorboard = run_record.TensorBoard(args.tensorboard if master_process else None, step)
    progress = errors.ProgressBar(total_steps, step, show=master_process)
    log_every = 1 if device.type == "cpu" else 20  # reading a number waits for the GPU
    running = torch.zeros(2, device=device)  # sums of loss and correct rows since the last log
    for epoch in range(len(history["epochs"]), math.ceil(total_steps / steps_per_epoch)):
        # DDP 3/7: without set_epoch every epoch would have the first one's order
        sampler.set_epoch(epoch)
        sampler.start_step = step - epoch * steps_per_epoch  # above 0 where a run resumes
        epoch_end = min((epoch + 1) * steps_per_epoch, total_steps)
        batches, rows, t0 = iter(train_loader), 0, time.perf_counter()
        while step < epoch_end:
            utils.seed_step(args.seed, step, rank)
            lr = utils.set_lr(optimizer, step, total_steps, args.lr, args.warmup)
            for micro_step in range(grad_accum_steps):
                batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
                input_ids, attention_mask, labels = batch
                # DDP 5/7: no_sync. Gradients add up over the micro-batches, and only the last
                # backward needs the all-reduce. DDP decides in the forward: no_sync encloses that.
                last = micro_step == grad_accum_steps - 1
                with autocast, nullcontext() if last else model.no_sync():
                    logits = model(input_ids, attention_mask).float()
                loss = F.cross_entropy(logits, labels)
                # micro-batches are equally large, so the mean of their means is the step's mean
                scaler.scale(loss / grad_accum_steps).backward()
                correct = (logits.argmax(1) == labels).sum()
                running += torch.stack([loss.detach() * len(labels), correct])
            scaler.unscale_(optimizer)  # clip the true gradients, not the scaled ones
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step, rows = step + 1, rows + args.global_batch_size
            progress.update()

            saving = step % args.save_every == 0 or step == epoch_end
            if not saving and step % log_every:
                continue
            # DDP 6/7: metrics. Each rank has summed over its own rows; the sums are added over the
            # ranks, then divided once. The same all-reduce carries the stop signals: a rank that
            # stopped alone would leave the others waiting in their next collective.
            loss_sum, correct, stop = utils.all_reduce_sum([*running.tolist(), len(stop_signals)])
            running.zero_()
            seconds = time.perf_counter() - t0
            epoch_sums += epoch_sums.new_tensor([loss_sum, correct, rows, seconds])
            point = {"loss": loss_sum / rows, "lr": lr, "samples_per_second": rows / seconds}
            progress.set_postfix(point, refresh=False)
            point |= {"step": step, "grad_norm": grad_norm.item()}
            run_record.log_point(history, tensorboard, total_steps, scaler, point)
            if master_process and (saving or stop):
                checkpoint.save_last(args, recipe, trainer_state, step, history, epoch_sums)
            if stop:
                errors.exit_stopped(stop_signals, step)
            rows, t0 = 0, time.perf_counter()

        val = utils.evaluate(raw_model, val_loader, device, autocast)
        progress.unpause()  # the time left is that of steps
        run_record.log_epoch(history, tensorboard, step, epoch_sums, val)
        epoch_sums.zero_()
    progress.close()

    test = utils.evaluate(raw_model, test_loader, device, autocast)
    # DDP 7/7: rank 0 alone logs and saves. All ranks hold the same weights, and two writers would
    # corrupt a file. It saves raw_model: the wrapper puts "module." before every name.
    if master_process:
        run_record.finish_record(record, history, test, device, args.report)
        errors.print0(checkpoint.save_model(args.checkpoint_dir, raw_model, record, folder))
        checkpoint.release_folder(args.checkpoint_dir)  # deletes last.pt: the run is finished
    utils.cleanup_distributed()


if __name__ == "__main__":
    with errors.one_line_errors(
        SourceError, dataset.DataError, ModelError, utils.UsageError, checkpoint.CheckpointError
    ):
        main()
