"""The tasks of :mod:`benchmarks.optimizer_study`: digits and text, with small models."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from nl_models.data.batches import TrainingBatches, validation_windows
from nl_models.data.prepare import DataOptions, PreparedData, prepare_data
from nl_models.optim import M3, DeepMomentum, DeltaGradientDescent, DeltaMomentum, Muon, split_parameters
from nl_models.training.config import TrainConfig
from nl_models.training.model import build_model, build_optimizer

WEIGHT_DECAY = 0.1


class Task(Protocol):
    """What a run needs. ``evaluate`` gives the loss that picks the rate, and on other data what is told."""

    optimizers: dict[str, float]  # and the first rate of each one's search
    steps: int
    unit: str

    def model(self, seed: int) -> nn.Module: ...

    def optimizer(self, name: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer: ...

    def loss(self, model: nn.Module, step: int, seed: int) -> torch.Tensor: ...

    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


class Digits:
    """scikit-learn's 8 × 8 digits, with an MLP (64 → 64 → 64 → 10, 9,000 parameters).

    1,197 images for training, each shifted, turned and scaled at random; 200 to choose the learning rate; 400
    to report.
    """

    optimizers = {  # noqa: RUF012
        "adamw": 4e-3,
        "muon": 4e-3,
        "m3": 4e-3,
        "deep_momentum": 4e-3,
        "momentum": 0.5,
        "delta_momentum": 0.5,
        "dgd, erase 1": 4.0,
        "dgd, erase 0.01": 0.5,
    }
    steps = 300
    unit = "test loss (nats)"
    batch_size = 64

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
        self.parts = list(
            zip(images.split([1197, 200, 400]), torch.tensor(labels)[order].split([1197, 200, 400]))
        )

    def model(self, seed: int) -> nn.Module:
        """New weights drawn from ``seed``."""
        torch.manual_seed(seed)
        layers = {
            "pixels": nn.Flatten(),
            "first": nn.Linear(64, 64),
            "first_activation": nn.GELU(),
            "second": nn.Linear(64, 64),
            "second_activation": nn.GELU(),
            "classifier": nn.Linear(64, 10),
        }
        return nn.Sequential(OrderedDict(layers))

    def logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """[N, 10] of images [N, 1, 8, 8]."""
        return model(images)

    def optimizer(self, name: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Embeddings, vectors and the classifier are AdamW's in all of them; only matrices decay.

        Those whose rates are SGD's have no weight decay, and AdamW's rate for the rest is 0.004.
        """
        exclude = lambda name, p: "embeddings" in name or name.startswith("classifier")  # noqa: E731
        if name.startswith(("momentum", "delta_momentum", "dgd")):
            groups = split_parameters(model, exclude=exclude, linear_only=True)
            options = {"lr": learning_rate, "adamw_lr": 4e-3}
            if name.startswith("dgd"):
                erase = float(name.removeprefix("dgd, erase "))
                return DeltaGradientDescent(groups, model=model, erase=erase, **options)
            return DeltaMomentum(groups, erase=0.0 if name == "momentum" else 0.5, **options)
        groups = split_parameters(model, weight_decay=WEIGHT_DECAY, exclude=exclude)
        if name == "adamw":
            groups = [{k: v for k, v in group.items() if k != "rule"} for group in groups]
            return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
        kinds = {"muon": Muon, "m3": M3, "deep_momentum": DeepMomentum}
        return kinds[name](groups, lr=learning_rate)

    def loss(self, model: nn.Module, step: int, seed: int) -> torch.Tensor:
        """Of the batch of one step: drawn with replacement, augmented."""
        images, labels = self.parts[0]
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(labels), (self.batch_size,), generator=rng)
        return F.cross_entropy(self.logits(model, _moved(images[chosen], rng)), labels[chosen])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation loss; test loss and accuracy."""
        (images, labels), (others, other_labels) = self.parts[1:]
        chosen_by = F.cross_entropy(self.logits(model, images), labels).item()
        logits = self.logits(model, others)
        return {
            "selection": chosen_by,
            "loss": F.cross_entropy(logits, other_labels).item(),
            "accuracy": (logits.argmax(-1) == other_labels).float().mean().item(),
        }


def _moved(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Each image turned by up to 15°, scaled by up to 10 % and shifted by up to a pixel."""
    angle, scale, right, down = (2 * torch.rand(4, len(images), generator=rng) - 1).unbind()
    angle, scale = angle * math.radians(15), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, right / 4, sin, cos, down / 4], dim=-1).reshape(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class DigitsViT(Digits):
    """The same images with a ViT of 16 patches (width 48, 3 layers, 86,000 parameters)."""

    optimizers = dict.fromkeys(("adamw", "muon", "m3", "deep_momentum"), 4e-3)

    def model(self, seed: int) -> nn.Module:
        """New weights drawn from ``seed``."""
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=48,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=3,
                num_labels=10,
                initializer_range=0.1,
            )
        )

    def logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """[N, 10] of images [N, 1, 8, 8]."""
        return model(images).logits


class Text:
    """A byte-level language model (width 64, 2 layers, 2 heads) on Python's library, 512 tokens a step."""

    optimizers = dict.fromkeys(("adamw", "muon", "m3"), 4e-3)
    steps = 300
    unit = "validation loss (nats a byte)"
    folder = Path("runs/optimizer_study")

    def __init__(self, kind: str) -> None:
        self.config = TrainConfig(
            model=kind,
            tokenizer="bytes",
            hidden_size=64,
            layers=2,
            heads=2,
            batch_size=8,
            sequence_length=64,
            steps=self.steps,
            warmup_steps=30,
            weight_decay=WEIGHT_DECAY,
        )

    @cached_property
    def _data(self) -> PreparedData:
        return prepare_data(DataOptions(tokenizer="bytes"), self.folder / "data")

    @cached_property
    def _windows(self) -> torch.Tensor:
        return validation_windows(self._data.validation, sequence_length=64, count=256)

    def model(self, seed: int) -> nn.Module:
        """New weights drawn from ``seed``."""
        config = dataclasses.replace(self.config, seed=seed)
        return build_model(config, self._data.tokenizer.vocab_size, self._data.tokenizer.separator_id)

    def optimizer(self, name: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """As the training command makes it."""
        return build_optimizer(
            model, dataclasses.replace(self.config, optimizer=name, learning_rate=learning_rate)
        )

    def loss(self, model: nn.Module, step: int, seed: int) -> torch.Tensor:
        """Of the windows of one step, in the order of ``seed``."""
        batches = self.__dict__.setdefault("_batches", {})
        if seed not in batches:
            batches[seed] = TrainingBatches(self._data.train, 64, self.config.batch_size, seed)
        rows = batches[seed].batch(step)
        return model(input_ids=rows, labels=rows, use_cache=False).loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss on every second validation window, and on those between."""
        loss = [
            model(input_ids=rows, labels=rows, use_cache=False).loss.item()
            for rows in (self._windows[::2], self._windows[1::2])
        ]
        return {"selection": loss[0], "loss": loss[1]}


TASKS = {
    "digits-mlp": Digits,
    "digits-vit": DigitsViT,
    "text-transformer": lambda: Text("attention"),
    "text-hope": lambda: Text("hope"),
}
