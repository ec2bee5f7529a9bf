"""Compares the preflight's estimate with whole training's peak, and profiles single steps."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Case, build, make_batch
from benchmarks.gpu.figures import Figures, Setting, main
from benchmarks.gpu.whole import Trained, shape_of
from benchmarks.loss import SHAPES
from stanford_alpaca.checkpoint.space import MIB
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.preflight import estimate
from stanford_alpaca.preflight.model_profile import profile_model

KERNELS = 12  # lines of a profile
NAMES = ("triton-frozen", "triton-cached", "triton-mle", "plain")
WARM = 3


def run(setting: Setting, figures: Figures) -> None:
    """Adds the estimate, then one step of training, then single losses."""
    shape = shape_of(setting)
    figures.attempt("preflight", lambda: compare(setting, shape, figures))
    figures.attempt(
        "training", lambda: profiled("training", training_step(shape, setting), setting, figures)
    )
    large = Case("llama-3-8b", *SHAPES["llama-3-8b"], 8192, "cuda", "bfloat16")
    case = Case("toy", 16, 300, 64) if setting.toy else large
    for name in ("chunked-frozen",) if setting.toy else NAMES:

        def one(name: str = name) -> None:
            profiled(f"{case.shape} {name}", loss_step(name, case), setting, figures)

        figures.attempt(name, one)


def compare(setting: Setting, shape: Trained, figures: Figures) -> None:
    """Adds the estimated peak, beside what the part ``whole`` has measured."""
    report = setting.out.parent / "gpu.json"
    parts = json.loads(report.read_text())["parts"] if report.exists() else {}
    found = {each["what"]: each["raw"] for each in parts.get("whole", {}).get("figures", [])}
    for mode in ("emo", "mle"):
        measured = found.get(mode) or {}
        share = measured["targets"] / measured["positions"] if measured else 1.0
        setup = estimate.Setup(
            1,
            shape.batch,
            1,
            shape.length,
            priced=mode == "emo",
            bf16=not setting.toy,
            device=setting.device,
            supervised_share=share,
        )
        precision = estimate.precision_of("none", setup.bf16)
        profiled = profile_model(shape.config(shape.length), shape.length, precision)
        sharding = "replicate" if setup.priced else estimate.NO_COST
        total = estimate.peak_memory(profiled, setup, "none", sharding).total / MIB
        note = "the part whole measured none"
        if measured:
            peak = measured["peak_mib"]
            note = f"measured {peak:.0f} MiB, error {total / peak - 1:+.0%}"
        figures.add(f"preflight, {mode}", total, "MiB", note)


def loss_step(name: str, case: Case) -> Callable[[], Any]:
    batch = make_batch(case)
    call = build(name, batch)

    def step() -> None:
        batch.hidden.grad = batch.weight.grad = None
        call().backward()

    return step


def training_step(shape: Trained, setting: Setting) -> Callable[[], Any]:
    """Returns a step of AdamW on float32 weights with bfloat16 products, as training has it."""
    from transformers import AutoModelForCausalLM

    device = setting.device
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(shape.length))
        ids = torch.randint(3, shape.vocab, (shape.batch, shape.length))
    attach_objective(model.train(), "emo", backend="chunked" if setting.toy else "auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=not setting.toy)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def profiled(name: str, step: Callable[[], Any], setting: Setting, figures: Figures) -> None:
    """Prints the kernels that take longest, and adds the share of the time without a kernel."""
    activities = [ProfilerActivity.CPU, *([] if setting.toy else [ProfilerActivity.CUDA])]
    for _ in range(WARM):
        step()
    with profile(activities=activities) as trace:
        step()
        if not setting.toy:
            torch.cuda.synchronize()
    key = "self_cpu_time_total" if setting.toy else "self_device_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=KERNELS, max_name_column_width=60))
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    kind = torch.autograd.DeviceType.CPU if setting.toy else torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in trace.profiler.kineto_results.events()
        if event.device_type() == kind and event.duration_ns() and "memory" not in event.name()
    )
    busy, whole = covered([(start, stop) for start, stop, _ in spans])
    note = f"{len(spans)} kernels and copies, {100 * (1 - busy / whole):.1f} % of it gaps"
    figures.add(f"step, {name}", whole / 1e6, "ms", note, raw=longest(spans))


def covered(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Returns how long at least one of the spans (sorted) lasts, and from the first to the last."""
    busy, end = 0, spans[0][0]
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - spans[0][0]


def longest(spans: list[tuple[int, int, str]]) -> dict[str, float]:
    """Returns the milliseconds of the kernels that take longest, by name."""
    total: dict[str, float] = {}
    for start, stop, name in spans:
        total[name[:100]] = total.get(name[:100], 0) + (stop - start) / 1e6
    return dict(sorted(total.items(), key=lambda item: -item[1])[:KERNELS])


if __name__ == "__main__":
    main(run)
