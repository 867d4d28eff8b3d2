"""One run: a model learns a task, and is scored."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from evaluations.task import Task
from nl_models.training.config import TrainConfig
from nl_models.training.model import build_optimizer, learning_rate_at

LEARNED = 1e-6  # at 1e-4 the answers on longer words still change


def train(
    model: torch.nn.Module,
    task: Task,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    every: int,
    seed: int,
    progress: Callable[[int, float, int], None] = lambda *_: None,
) -> dict[str, object]:
    """Train until ``steps``, or until nothing is left to learn; score what came of it.

    That is where the task's goal is reached twice in a row, or the loss is below :data:`LEARNED` thrice.
    AdamW with a warm-up of a tenth of the steps (at most 100) and a cosine to a tenth of the rate.

    Args:
        progress: is told the step, its loss and its tokens.

    Returns:
        ``scores`` on test data, ``curve`` of (step, loss, scores on validation data), ``steps``, ``seconds``.
    """
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=min(100, steps // 10),
        seed=seed,
    )
    optimizer = build_optimizer(model, config)
    began, curve, losses, met, learned = time.perf_counter(), [], [], 0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        ids, targets = task.batch(batch_size, seed=1_000_003 * seed + step)
        loss = task.loss(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            scores = score(model, task, final=False)
            curve.append((step + 1, sum(losses) / len(losses), scores))
            losses.clear()
            reached = task.goal is not None and min(scores.values()) >= task.goal
            met = met + 1 if reached else 0
            learned = learned + 1 if curve[-1][1] < LEARNED else 0
        progress(step + 1, loss.item(), ids.numel())
        if met == 2 or learned == 3:
            break
    return {
        "scores": score(model, task, final=True),
        "curve": curve,
        "steps": step + 1,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def score(model: torch.nn.Module, task: Task, final: bool) -> dict[str, float]:
    """Scores in evaluation mode."""
    model.eval()
    scores = task.evaluate(model, final)
    model.train()
    return scores
