"""Remembers the best epoch, and says when there has been none for too long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStop:
    """``patience`` epochs without a better fitness end the training; 0 never does."""

    patience: int
    best_fitness: float = -1.0
    best_epoch: int = 0

    def update(self, epoch: int, fitness: float) -> bool:
        """Takes the fitness of an epoch and says whether it is the best so far; equal counts, the later weights saw more."""
        is_best = fitness >= self.best_fitness
        if is_best:
            self.best_fitness, self.best_epoch = fitness, epoch
        return is_best

    def is_due(self, epoch: int) -> bool:
        return self.patience > 0 and epoch - self.best_epoch >= self.patience
