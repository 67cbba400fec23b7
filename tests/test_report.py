"""What the pages show comes out of the records: pytest tests/test_report.py"""

import json
import math
from functools import cache
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks import bench_training, figures, plots, report
from benchmarks.figures import Speed

pages = cache(report.pages)


@pytest.mark.parametrize(
    "path", [*report.WRITTEN.values(), *report.PAGES], ids=lambda path: path.name
)
def test_the_page_is_what_its_template_and_the_records_say(path):
    assert path.read_text() == pages()[path], "run: make report"


@pytest.fixture
def records(tmp_path, monkeypatch):
    """An empty folder in place of benchmarks/results."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


def page(name: str) -> str:
    return report.render(name, report.environment())


def test_without_records_every_page_says_what_would_measure(records):
    commands = {
        "single_gpu": "`make bench ARGS=--record`",
        "ddp_2gpu": "`python -m benchmarks.timeline --record`",
        "inference": "`python -m benchmarks.bench_inference --record`",
        "reliability": "`make faults`",
        "sections/interview": "`make bench ARGS=--record`",
        "sections/picture": "`python -m benchmarks.timeline --record`",
        "sections/serving": "`python -m benchmarks.bench_inference --record`",
    }
    for name, command in commands.items():
        assert command in page(name), name


def speed_record(host="a host", **header) -> dict:
    """One process: 10 s at 16 rows and 18 s at 32; two: 12 s at 16; of the scripts, ratios of 2."""
    setting = {"kind": "step", "threads": 1, "precision": "bf16", "accumulation": 1, "steps": 3}
    setting |= {"compression": "none", "sparse_embeddings": False, "compiled": False}
    setting |= {"data": 0.0, "sync_flags": 0.0, "imbalance": 0.1, "update": 1.0}
    rows = []
    for line in (
        "1 single 16 10, 1 single 32 18, 2 ddp 16 12, 2 no_sync 16 11, 2 no_sync 8 6, "
        "2 no_communication 16 10.5"
    ).split(", "):
        launch, variant, micro, seconds = line.split()
        row = {"launch": launch, "variant": variant, "micro": int(micro), "step": float(seconds)}
        rows.append(setting | row | {"compute": row["step"] - 1, "tokens": 50.0 * row["micro"]})
    rows += [{"kind": "gemm", "launch": n, "threads": 1, "flops": 1e12} for n in "12"]
    rows.append({"kind": "sync_flags", "launch": "2", "seconds": 0.001})
    bucket = {"kind": "bucket", "launch": "2", "compression": "none", "seconds": 0.5}
    rows += [bucket | {"number": n, "bytes": size} for n, size in enumerate((100, 300))]
    words = {"kind": "embeddings", "launch": "2", "touched": 9}
    words |= {"dense_seconds": 0.4, "sparse_seconds": 0.1}
    rows += [words | {"micro": micro} for micro in (8, 32, 128)]
    script = {"kind": "script", "precision": "bf16", "peak_memory_mb": 100.0}  # no flags: quick
    for name, rate in (("single", 20.0), ("ddp", 30.0), ("trainer_best", 10.0)):
        steps = {"name": name, "samples_per_second": rate, "steps": 40, "warm_up": 10}
        rows.append(script | steps)
    rows = [{"round": 0} | row for row in rows]
    for row in [row for row in rows if row.get("name") == "single"]:
        rows.append(row | {"round": 1, "samples_per_second": 24.0})
    record = {"host": host, "instructions": "amx_bf16", "device": "cpu", "precision": "bf16"}
    record |= {"started": "2030-01-01T00:00:00", "command": "a command", "model": "a model"}
    record |= {"config": {"vocab_size": 50, "max_position_embeddings": 8, "dim": 4}}
    return record | {"batch": 32, "gflop_per_sample": 10.0, "rows": rows} | header


def test_figures_worked_out_by_hand():
    speed = Speed(speed_record())
    assert speed.strong(16).tolist() == [1.5]  # 18 s for 32 rows in one process, 12 s in two
    assert speed.weak(16).tolist() == [pytest.approx(20 / 12)]
    assert speed.ratio("single", "trainer_best").tolist() == [2.0]  # within the round that has both
    assert speed.epoch_minutes("single", 24_000).tolist() == [20.0, pytest.approx(24000 / 24 / 60)]
    assert speed.matmul_share().tolist() == [pytest.approx(20 * 10e9 / 1e12)]
    assert speed.strong(64).empty and math.isnan(speed.predicted_strong(64))
    way = speed.waterfall()
    assert way["ideal share"] == 9 and way["contention for the machine"] == 0.5
    assert way["exposed communication"] == 1 and way["DDP, measured"] == 12


def test_an_epoch_is_not_estimated_from_too_few_steps():
    record = speed_record()
    for row in record["rows"]:
        row |= {"steps": 39} if row["kind"] == "script" else {}
    speed = Speed(record)
    assert report.measured(speed.epoch_minutes("single", 100)) == "`make bench ARGS=--record`"
    assert speed.script("single").tolist() == [20.0, 24.0]


def test_another_hosts_record_is_a_column_of_its_own(records):
    old = speed_record("an Intel(R) CPU", started="2029-01-01T00:00:00")
    for name, record in (("a", old), ("b", speed_record())):
        (records / f"training_speed_{name}.json").write_text(json.dumps(record))
    for name in ("single_gpu", "ddp_2gpu", "sections/speed"):
        assert "| a host, amx_bf16 | an Intel, amx_bf16 |" in page(name)  # the newest first
    assert "| **22.0 (20.0 to 24.0)** | **22.0 (20.0 to 24.0)** |" in page("single_gpu")


def test_a_machine_with_one_gpu_has_no_column_on_the_page_of_two(records):
    one = speed_record("an NVIDIA card", device="cuda", instructions="")
    one["rows"] = [r for r in one["rows"] if r.get("launch") != "2" and r.get("name") != "ddp"]
    (records / "training_speed_one.json").write_text(json.dumps(one))
    assert "Not measured yet: `make bench" in page("ddp_2gpu")
    assert "| an NVIDIA card |" in page("single_gpu") and plots.draw()["throughput.svg"]
    older = speed_record(started="2029-01-01T00:00:00")
    (records / "training_speed_two.json").write_text(json.dumps(older))
    assert "NVIDIA" not in page("ddp_2gpu") and "| a host, amx_bf16 |" in page("ddp_2gpu")
    assert "| an NVIDIA card | a host, amx_bf16 |" in page("sections/speed")


def test_a_setting_added_after_the_rule_is_reported_apart():
    record = speed_record()
    known = next(row for row in record["rows"] if row.get("variant") == "ddp")
    record["rows"].append(known | {"micro": 12, "tokens": 600.0, "step": 9.0})
    seen, new = Speed(record).errors()
    assert len(seen) == 1 and len(new) == 1
    # compute: 5 s at 400 tokens, 10 s at 800: 7.5 s at 600, and 10 % / 10 of it for the slower rank
    lag = pd.Series([0.1 / 10, 0.1 / 5]).median() * 7.5
    assert new.iloc[0] == pytest.approx(abs((7.5 + lag + 1 + 1 + 0.001) / 9 - 1))


def run_record(world_size: int, losses: list[float]) -> dict:
    curve = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    record = figures.read(f"agnews_packaged_{'ddp' if world_size == 2 else 'single'}")
    return record | {"curve": curve, "total_steps": len(losses), "world_size": world_size}


def test_loss_curves_are_drawn_where_the_records_hold_them(tmp_path, monkeypatch):
    ran = {1: run_record(1, [3.0, 2.0, 1.0]), 2: run_record(2, [3.0, 2.25, 1.5])}
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for world_size, name in ((1, "single"), (2, "ddp")):
        (tmp_path / f"agnews_packaged_{name}.json").write_text(json.dumps(ran[world_size]))
    assert plots.curves().difference == 0.25  # of 0, 0.25 and 0.5 the median
    assert "plots/loss.svg" in page("ddp_2gpu") and plots.draw()["loss.svg"]
    ran[2]["lr"] *= 2  # another recipe
    (tmp_path / "agnews_packaged_ddp.json").write_text(json.dumps(ran[2]))
    assert plots.curves() is None and "plots/loss.svg" not in page("ddp_2gpu")


def test_levers_measured_on_kaggle_have_their_table(records):
    same = {"flags": "", "global_batch_size": 256, "host": "Tesla T4"}
    rows = [{"how": "one GPU", "samples_per_second": 500.0} | same]
    rows.append({"how": "plain DDP", "samples_per_second": 600.0} | same)
    (records / "kaggle_levers.json").write_text(json.dumps(rows))
    assert "| plain DDP |  | **600** | **1.20** |" in page("ddp_2gpu")


def test_a_scripts_rate_is_that_of_its_steps_after_the_warm_up():
    # 20 rows a step: steps 1 and 2 warm up; 3 takes 2 s, 4 and 5 together 3 s
    rates = {1: 1, 2: 1, 3: 10, 5: 40 / 3}
    curve = [{"step": step, "samples_per_second": rate} for step, rate in rates.items()]
    found = bench_training.samples_per_second({"curve": curve, "global_batch_size": 20}, 2)
    assert found == {"samples_per_second": 60 / 5, "steps": 3, "warm_up": 2}


def test_trainers_best_flags_are_the_fastest_of_the_grid():
    rows = [
        {"precision": p, "flags": json.dumps({"optim": o}), "samples_per_second": rate}
        for p, o, rate in (("bf16", "a", 1), ("bf16", "b", 2), ("fp32", "c", 3))
    ]
    best = bench_training.best_flags(rows, "bf16")
    assert best["trainer_best"] == {"optim": "b"} and best["trainer_best_fp32"] == {"optim": "c"}


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_measured_suffices_for_every_figure(quick):
    """Strong and weak scaling of every batch size, the waterfall, and what cost_model.py needs."""
    one, two = (bench_training.settings(n, "bf16", False, quick) for n in (1, 2))
    plain = {s["micro"] for s in one if s["accumulation"] == 1}
    micros = {s["micro"] for s in two if s["variant"] == "ddp" and s["accumulation"] == 1}
    assert micros | {2 * micro for micro in micros} <= plain
    [middle] = [s["micro"] for s in two if s["variant"] == "no_communication"]
    assert middle in {s["micro"] for s in two if s["variant"] == "no_sync"} and middle in micros
    accumulated = {(s["micro"], s["accumulation"]) for s in two if s["variant"] == "ddp"}
    assert accumulated - {(s["micro"], s["accumulation"]) for s in one} == set()


@pytest.mark.parametrize("fails_in, kept", [(1, [0]), (2, [0, 0]), (3, [0, 0])])
def test_what_was_measured_before_a_failure_is_kept(fails_in, kept):
    calls = []

    def part():
        calls.append(None)
        if len(calls) > fails_in:
            raise SystemExit("error: it failed")
        return [{"kind": "script"}]

    parts = [("one", 1, part), ("other", 1, part)]
    bench = SimpleNamespace(quick=False, search=lambda *_: None, parts=lambda *_: parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_training, "best_flags", lambda *_: {})
        rows, full, ended = bench_training.run_rounds(bench, "fp32", 60)
    assert [row["round"] for row in rows] == kept
    assert full == fails_in // 2 and ended == "error: it failed"
