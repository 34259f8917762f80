"""The floor of a sweep: a bare script that asks the teacher once and trains each student in a plain loop.

Run as ``python -m kd.benching.floor`` with a JSON of `Floor`'s fields; it prints the seconds of its parts as JSON. It
uses our networks, data, augmentation and allocator settings, and nothing else: no Lightning, no store, no records.
"""

from __future__ import annotations

import json
import sys
import time

BEGUN = time.perf_counter()


def main(text: str) -> dict[str, object]:
    """Label, then train; the seconds of each part.

    Args:
        text: JSON with `words` (overrides of the base job) and `temperature`s and `alpha`s of the students.
    """
    asked = json.loads(text)
    import torch
    import torch.nn.functional as F

    from kd.config import jobs
    from kd.data.augment import augment
    from kd.models import Frozen
    from kd.pipeline.plan import plan
    from kd.stages.base import Room
    from kd.stages.building import build
    from kd.stages.splits import load_data
    from kd.training.memory import keep_memory
    from kd.training.optimisers import configure
    from kd.training.seeds import mix
    from kd.training.settings import Fit, Run
    from kd.training.trainer import device_of

    keep_memory()
    config = jobs(asked["words"])[0][0].config
    stage = plan(config).nodes[-1].config
    from pathlib import Path

    data, fit, run = stage["data"], Fit(**config["fit"]), Run(**config["run"])
    room = Room(run, Path())
    splits = load_data(data, room)
    device, size = device_of(run), int(data["size"])
    split = splits.train
    assert split.images is not None
    images, ids, targets = split.images.to(device), split.ids.to(device), split.targets.to(device)
    parts: dict[str, object] = {"start_s": time.perf_counter() - BEGUN}

    started = time.perf_counter()
    teacher = Frozen(build(config["teacher"], data, splits, 0, room).to(device))
    labels = []
    memory = {True: torch.channels_last, False: torch.contiguous_format}
    laid, asking = memory[fit.channels_last], memory[bool(config["labels"]["channels_last"])]
    teacher.to(memory_format=asking)
    mixed = config["labels"]["precision"] == "bf16-mixed"
    for view in range(fit.epochs):
        logits = []
        for rows in torch.split(torch.arange(len(split), device=device), int(config["labels"]["batch_size"])):
            batch = augment(images[rows], data["augment"], 0, ids[rows], view, size)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits.append(teacher(batch.contiguous(memory_format=asking)).float())
        labels.append(torch.cat(logits))
    parts["labels_s"] = time.perf_counter() - started

    students = []
    for temperature, alpha in asked["students"]:
        started = time.perf_counter()
        net = build(stage["student"], data, splits, 0, room).to(device).to(memory_format=laid).train()
        steps = len(split) // fit.batch_size
        made = configure(fit, steps)(list(net.parameters()))
        optimiser, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        for epoch in range(fit.epochs):
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(mix(0, "order", epoch)))
            for rows in torch.split(order.to(device)[: steps * fit.batch_size], fit.batch_size):
                batch = augment(images[rows], data["augment"], 0, ids[rows], epoch, size)
                out = net(batch.contiguous(memory_format=laid))
                soft = F.kl_div(
                    F.log_softmax(out / temperature, 1),
                    F.log_softmax(labels[epoch][rows] / temperature, 1),
                    reduction="batchmean",
                    log_target=True,
                )
                loss = (1 - alpha) * F.cross_entropy(out, targets[rows]) + alpha * temperature**2 * soft
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        students.append(time.perf_counter() - started)
    parts["students_s"] = students
    return parts


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
