"""--bench-steps and what it stands on: counts of forwards and FLOPs."""
import json
import time

import bench_peers
import pytest
import torch
from test_train import TINY

import kernels
import train
from ladd.bench import step_flops
from ladd.config import parse_config
from ladd.core.discriminator import Discriminator, DiscriminatorConfig
from ladd.core.losses import LaddConfig
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.report import cost, speed

STEP = LaddConfig(levels=(1.0, 0.5), probs=(0.5, 0.5), easy_steps=0, shift=1.0, d_mean=0.0,
                     mismatched=0.0, r1_weight=0.0, distill_weight=0.0)


def bench(capsys, flags: str) -> dict:
    train.main(f"{TINY} --kernels torch --bench-steps 1 {flags}".split())
    said = capsys.readouterr().out
    return json.loads(said[said.index("{"):])


@pytest.mark.slow
def test_bench_steps_times_the_step_and_its_stages(capsys, tmp_path, monkeypatch):
    """Forwards of a step and micro-batch: the student 1; the teacher 2, of the fake and of all that
    needs no gradient. FLOPs do not depend on the micro-batch."""
    monkeypatch.chdir(tmp_path)
    whole = bench(capsys, "--mismatched 0")
    assert whole["forwards"] == {"student": 1, "teacher": 2}
    assert whole["mfu"] is None and whole["pairs_per_second"] == pytest.approx(8 / whole["seconds"])
    assert whole["memory_gb"] > 0
    assert list(whole["stages"]) == ["batch and noise", "generate", "discriminator loss",
                                     "student loss", "heads' optimizer", "student's optimizer, EMA"]
    assert sum(whole["stages"].values()) == pytest.approx(1)
    assert not list(tmp_path.iterdir())                                        # no files
    more = bench(capsys, "--mismatched .5 --heads-repeats 4")
    assert more["forwards"] == {"student": 1, "teacher": 2}
    assert "heads' further steps" in more["stages"]
    micro = bench(capsys, "--mismatched 0 --micro-batch 4")
    assert micro["forwards"] == {"student": 2, "teacher": 4}
    assert micro["flops"] == pytest.approx(whole["flops"], rel=1e-3)


def networks(depth: int = 3, width: int = 128) -> tuple[MMDiT, MMDiT, Discriminator]:
    with torch.device("meta"):
        sizes = MMDiTConfig(depth, width, 24, 20, 4, 4, pos_grid=12)
        student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
        heads = Discriminator(DiscriminatorConfig((0, depth - 1), width, 20), kernels.load("torch"))
    return student, teacher.requires_grad_(False), heads


def test_flops_of_a_step_are_units_of_a_forward():
    """In forwards a pair costs 6 and the heads: the student 1 and 2 backward, the frozen teacher 1
    on the fake and 1 backward, 1 on the real."""
    student, teacher, _ = networks()
    small = Discriminator(DiscriminatorConfig((0, 2), 128, 20, width=16),
                          kernels.load("torch")).to("meta")
    costs = cost.step_cost(student, teacher, small, (4, 12, 12), (5, 24), 4, STEP)
    assert 5.7 < costs["flops_step"] / (4 * costs["flops_v"]) < 6.4


@pytest.mark.slow
def test_flops_of_sd3_medium_do_not_depend_on_the_micro_batch():
    """66.2 TFLOP per pair at 1024 px, half of the batch under another caption too. Separate
    forwards for the student loss would add one of the student and one of the teacher, 8.9 each:
    84.0."""
    found = []
    for micro in (2, 16):
        config = parse_config(f"--preset sd3-medium --dry-run --micro-batch {micro}".split())
        assert config.hw[0] == (1024, 1024)
        found.append(step_flops(config, config.model, torch.float32) / config.batch)
    assert found == pytest.approx([66.175e12] * 2, rel=1e-5)


# as nvidia-smi prints them; TFLOP/s
NAMES = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835,
         "H800": 989, "H800 PCIe": 756, "GH200 480GB": 989, "GH200 144G HBM3e": 989, "B200": 2250,
         "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
         "A800-SXM4-80GB": 312, "A800 80GB PCIe": 312, "L40S": 362, "L40": 181, "L4": 121,
         "RTX 6000 Ada Generation": 364, "GeForce RTX 4090": 165}
UNKNOWN = ("H100 80GB HBM3 MIG 1g.10gb", "L40G", "L20", "H20", "GB200", "GeForce RTX 4090 D",
           "GeForce RTX 4090 Laptop GPU", "A10", "A1000", "RTX 5000 Ada Generation", "B2000", "")


def test_each_gpu_has_its_own_peak():
    """No name counts as another one that it begins with or contains."""
    assert {name: speed.peak_flops(f"NVIDIA {name}") for name in NAMES} == {
        name: 1e12 * peak for name, peak in NAMES.items()}
    assert not [name for name in UNKNOWN if speed.peak_flops(f"NVIDIA {name}") is not None]
    assert speed.peak_flops("cpu, 2 threads") is None


def test_laps_add_up():
    laps = speed.Laps(torch.device("cpu"))
    time.sleep(.02), laps("a"), laps("b"), time.sleep(.01), laps("a")
    assert laps.seconds["a"] > .028 and laps.seconds["b"] < .01
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "xy"}
    seconds = bench_peers.interleaved(steps, 3, torch.device("cpu"), warm=1)
    assert calls == [*"xyxyxyxy"] and set(seconds) == {"x", "y"}


def test_rates_of_a_loop(monkeypatch):
    """2 steps of 8 pairs in 4 s, of which 1 s was an evaluation and 0.6 s the data; then 1 step in
    2 s."""
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    pace = speed.Pace(8, torch.device("cpu"), 1, lambda: pytest.fail("counts for no peak"))
    clock[0] = 12.0
    with pace.paused():
        clock[0] = 13.0
    clock[0] = 14.0
    line = pace.line(0.6, 2)
    assert (line["seconds"], line["pairs_per_second"]) == (4, pytest.approx(16 / 3))
    assert line["data_wait"] == pytest.approx(0.6 / 3) and "mfu" not in line
    clock[0] = 16.0
    line = pace.line(1.0, 1)
    assert (line["seconds"], line["pairs_per_second"], line["data_wait"]) == (6, 4,
                                                                              pytest.approx(0.2))


def test_utilisation_is_of_the_peak_of_all_processes(monkeypatch):
    """4 processes of 1e14 FLOP/s; 2 steps of 8e14 FLOPs in 8 s are half of that."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speed, "peak_flops", lambda name: 1e14)
    pace = speed.Pace(8, torch.device("cpu"), 4, lambda: 8 * 10 ** 14)
    clock[0] = 8.0
    assert pace.line(0.0, 2)["mfu"] == pytest.approx(0.5)


def test_the_schedules_of_peers_call_what_their_sources_call():
    found = bench_peers.compare(64, 4, 4, 4, 1, torch.device("cpu"), kernels.load("torch"))
    rows = {r["schedule"]: r for r in found}
    assert {name: (r["student"], r["teacher"]) for name, r in rows.items()} == {
        "ours": (1, 2), "ours, two forwards": (2, 3), "Nitro-1": (2, 3), "FastGen, 1:1": (2, 3),
        "SANA-Sprint, adversarial half": (2, 3), "Z-Image-LADD, 1:1": (1, 3), "FlowModels": (1, 3)}
    assert all(r["pairs_per_second"] > 0 for r in rows.values())
    assert rows["ours"]["ours_is_faster"] == 1
