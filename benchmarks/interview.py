"""Ten questions about DDP that interviewers ask, answered with measured numbers; see report.py."""

from statistics import median

from benchmarks.speed import Speed, read
from benchmarks.training_pages import errors, middle, steps_of_the_way, strong, weak


def interview() -> str:
    speed = Speed(read("training_speed"))
    single, ddp = read("agnews_packaged_single"), read("agnews_packaged_ddp")
    micro = middle(speed)
    _, rows = steps_of_the_way(speed)
    way = {name: f"{1e3 * seconds:,.0f} ms" for name, seconds in rows}
    pieces = speed.pieces(2)
    alone, last = (f"{1e3 * s:,.0f} ms" for s in (sum(pieces.seconds), pieces.seconds[-1]))
    megabytes, last_size = sum(pieces.buckets) / 1e6, pieces.buckets[-1] / 1e6
    largest = speed.micros(2, "ddp")[-1]
    k = max(one.get("accumulation", 1) for one in speed.settings(2))
    sparse = speed.exchange(2, 32)
    off = errors(speed)

    def times(values):
        return f"{median(values):.2f}"

    answers = {
        "Why are two processes not twice as fast as one?":
            f"At a global batch of {2 * micro} one process takes {way['one process']} a step, two "
            f"take {way['DDP, measured']}: {times(strong(speed, micro)[0])} times as fast. The "
            f"optimizer goes over all weights on both ranks ({way['update, done by every rank']} "
            f"not halved), half a batch takes {way['smaller batches']} more than half the time, "
            f"sharing the machine adds {way['contention for the machine']}, waiting for the slower "
            f"rank {way['imbalance of the ranks']}, and communication that is not hidden "
            f"{way['exposed communication']}. Each of these was measured by itself, which leaves "
            f"{way['unexplained']} unexplained; `benchmarks/ddp_2gpu.md` draws them.",
        "What exactly does DDP send, and when?":
            f"The gradients, {megabytes:.1f} MB in {len(pieces.buckets)} buckets for this model, "
            "once in every optimizer step. A bucket's all-reduce starts when backward has filled "
            "it. Weights are sent once, at the start; after that equal steps keep them equal.",
        "Can all of the communication be hidden?":
            f"No. The last bucket, {last_size:.1f} MB with the word embeddings, is full when "
            f"backward ends, and its {last} have nothing to hide behind. On a CPU the cores that "
            f"would send are computing, too: all-reduce takes {alone} alone, and makes a step "
            f"{way['exposed communication']} longer.",
        "How would you make it scale better?":
            f"More work for each exchange: at {largest} rows a process the weak speed-up is "
            f"{times(weak(speed, largest)[0])}, at 8 it is {times(weak(speed, 8)[0])}. Accumulate "
            f"under `no_sync`: {k} micro-batches of 16 give {times(weak(speed, 16, k)[0])}, one "
            f"gives {times(weak(speed, 16)[0])}. Send less: of the word embeddings a step of 32 "
            f"rows touches {sparse['touched']:,.0f} of 30,522, and sending those alone takes "
            f"{1e3 * sparse['sparse']:.0f} ms in place of {1e3 * sparse['dense']:.0f}, with the "
            "same result.",
        "How do you know that DDP trains the same model?":
            "Step k trains on the same rows at every world size. In fp32 without dropout the "
            "gradients of two, three and four processes equal those of one to one part in a "
            "million, also with accumulation, and the loss of every step to 1e-5; "
            "`tests/test_one_order.py` checks that. Two runs of the first edition, which ordered "
            f"rows by world size, reach {single['test_accuracy']:.4f} in one process and "
            f"{ddp['test_accuracy']:.4f} in two.",
        "Do you change the learning rate with the number of GPUs?":
            "Not here: `--global-batch-size` is what a step sees over all processes, and is the "
            f"same for any number of them, so both runs above used lr {ddp['lr']:g}. If the batch "
            "grows with the GPUs it is another recipe, and its learning rate has to be found anew.",
        "Why a sampler of your own, and why set_epoch?":
            "`DistributedSampler` repeats rows to make shares equal, and step k holds other rows "
            "at another world size. Its subclass here draws an epoch's order from seed and epoch, "
            "cuts it into full steps, and gives rank r of n the rows r, r + n, ... of each "
            "step: disjoint shares of the same rows. Without `set_epoch` every epoch has the first "
            "one's order.",
        "How do you evaluate on several ranks?":
            "Not with DistributedSampler, which repeats rows until the shares are equal. Each rank "
            "counts over its own rows, however many; the counts are summed over ranks and divided "
            f"once, and the total is asserted: {ddp['test_samples']:,} here. The same number of "
            "correct answers comes out at 1, 2, 3 and 7 processes.",
        "A job hangs. Where do you look?":
            "At the collectives: each waits until the last rank has called it. A collective inside "
            "`if rank == 0`, ranks with different numbers of steps, or one rank still preparing "
            "data do it. Here every collective is on all ranks' path, stop signals travel with the "
            "metrics' all-reduce, and over gloo a time-out ends all with one line.",
        "Can you say beforehand what a second GPU will bring?":
            "Yes, from pieces: forward and backward without communication, the optimizer, the "
            f"all-reduce of each bucket. On {len(off)} settings that it was not calibrated on, "
            f"`benchmarks/cost_model.py` is off by {100 * median(off):.1f} % in the median and "
            f"{100 * max(off):.1f} % at worst. For GPUs that were not at hand it gives a "
            "range, marked as a prediction.",
    }  # fmt: skip
    return "\n".join(f"1. **{question}** {answer}" for question, answer in answers.items())
