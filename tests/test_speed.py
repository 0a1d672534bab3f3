"""--bench-steps and what it stands on: counts of forwards, FLOPs, saved bytes, both schedules."""
import json
import time

import bench_peers
import pytest
import torch
from test_train import TINY

import kernels
import train
from ladd import cost, memory, speed
from ladd.config import parse_config
from ladd.discriminator import Discriminator, DiscriminatorConfig
from ladd.distill import DistillConfig
from ladd.mmdit import MMDiT, MMDiTConfig

STEP = DistillConfig((1.0, 0.5), (0.5, 0.5), 0, 1.0, 0.0, 1.0, False, 0.0, "teacher", 0.0, 0.05, 0.0)


def bench(capsys, flags: str) -> dict:
    train.main(f"{TINY} --kernels torch --bench-steps 1 {flags}".split())
    said = capsys.readouterr().out
    return json.loads(said[said.index("{"):])


@pytest.mark.slow
def test_one_command_compares_the_schedules(capsys, tmp_path, monkeypatch):
    """Forwards of a step: the student 1 against 2, the teacher 2 against 3: fake, all that needs no
    gradient (real, misaligned); fake again."""
    monkeypatch.chdir(tmp_path)
    result = bench(capsys, "--misaligned 0")
    one, before, two = result["rows"]
    assert [row["schedule"] for row in result["rows"]] == ["one-forward", "simultaneous", "two-forward"]
    assert before["forwards"] == one["forwards"] and before["flops"] == one["flops"]
    assert one["forwards"] == {"student": 1, "teacher": 2} and two["forwards"] == {"student": 2, "teacher": 3}
    assert one["flops"] < two["flops"] and one["mfu"] is None and one["pairs_per_second"] > 0
    assert result["gain"] == pytest.approx({r["schedule"]: r["pairs_per_second"] / two["pairs_per_second"]
                                            for r in (one, before)})
    assert sum(one["stages"].values()) == pytest.approx(1) and len(one["stages"]) == 6
    assert not list(tmp_path.iterdir())                                        # no files
    more = bench(capsys, "--misaligned .5 --heads-steps 2")["rows"]
    assert [r["forwards"] for r in more] == [
        {"student": 2, "teacher": 4}, {"student": 2, "teacher": 4}, {"student": 3, "teacher": 5}]
    micro = bench(capsys, "--misaligned 0 --micro-batch 4")["rows"]
    assert [r["forwards"] for r in micro] == [                      # accumulation makes its own fakes
        {"student": 4, "teacher": 6}, {"student": 2, "teacher": 4}, {"student": 4, "teacher": 6}]
    assert micro[0]["flops"] == micro[2]["flops"] > micro[1]["flops"]


def networks(depth: int = 3, width: int = 128) -> tuple[MMDiT, MMDiT, Discriminator]:
    with torch.device("meta"):
        sizes = MMDiTConfig(depth, width, 24, 20, 4, 4, pos_grid=12)
        student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
        heads = Discriminator(DiscriminatorConfig((0, depth - 1), width, 20), kernels.load("torch"))
    return student, teacher.requires_grad_(False), heads


def test_flops_of_the_schedules_are_units_of_a_forward():
    """In forwards (student's backward 2, the frozen teacher's 1) a pair costs 1 + 2 + 2 + 1 + heads, and the
    common schedule a student's and a teacher's forward more: 6 against 8."""
    networks_ = networks()
    one, two = (cost.step_cost(*networks_, (4, 12, 12), (5, 24), 4, STEP, s)["flops_step"]
                for s in ("one-forward", "two-forward"))
    forward = 4 * cost.step_cost(*networks_, (4, 12, 12), (5, 24), 4, STEP)["flops_v"]
    assert (two - one) / forward == pytest.approx(2, rel=0.02)      # the last block's text ends early
    small = Discriminator(DiscriminatorConfig((0, 2), 128, 20, width=16), kernels.load("torch")).to("meta")
    least = cost.step_cost(*networks_[:2], small, (4, 12, 12), (5, 24), 4, STEP)["flops_step"]
    assert 5.7 < least / forward < 6.4


def test_saved_bytes_count_what_backward_keeps():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    kept = memory.SavedBytes(layers)
    with kept:
        layers(torch.ones(32, 8)).sum().backward()
    assert kept.bytes == 4 * 32 * (8 + 16)                                     # inputs of both products


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
    steps = {name: lambda i, name=name: calls.append((name, i)) for name in "xy"}
    seconds = speed.interleaved(steps, 3, torch.device("cpu"), warm=1)
    assert calls == [(name, i) for i in range(4) for name in "xy"] and set(seconds) == {"x", "y"}


def test_rates_of_a_loop(monkeypatch):
    """2 steps of 8 pairs in 4 s, of which 1 s was an evaluation and 0.6 s the data; then 1 step in 2 s."""
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    pace = speed.Pace(parse_config(TINY.split(), "tiny"), None, None, torch.device("cpu"))
    clock[0] = 12.0
    with pace.paused():
        clock[0] = 13.0
    clock[0] = 14.0
    line = pace.line(0.6, 2)
    assert (line["seconds"], line["pairs_per_second"]) == (4, pytest.approx(16 / 3))
    assert line["data_wait"] == pytest.approx(0.6 / 3) and "mfu" not in line
    clock[0] = 16.0
    line = pace.line(1.0, 1)
    assert (line["seconds"], line["pairs_per_second"], line["data_wait"]) == (6, 4, pytest.approx(0.2))


def test_peers_schedules_call_what_they_are_read_to_call():
    found = bench_peers.compare(128, 4, 4, 4, 1, torch.device("cpu"), kernels.load("torch"))
    rows = {r["schedule"]: r for r in found}
    assert {name: (r["student"], r["teacher"]) for name, r in rows.items()} == {
        "ours": (1, 2), "ours, two forwards": (2, 3), "Nitro-1": (2, 3), "FastGen, 1:1": (2, 3),
        "SANA-Sprint, adversarial half": (2, 3), "Z-Image-LADD, 1:1": (1, 3), "FlowModels": (1, 3)}
    assert all(r["pairs_per_second"] > 0 for r in rows.values()) and rows["ours"]["ours_is_faster"] == 1
