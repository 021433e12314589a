"""Early stopping: the best epoch so far, and whether too many epochs have passed since."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStop:
    """Ends the training after ``patience`` epochs without a better fitness; 0 never does."""

    patience: int
    best_fitness: float = -1.0
    best_epoch: int = 0

    def update(self, epoch: int, fitness: float) -> bool:
        """Records the fitness of an epoch; returns whether it is the best so far. Of equal ones the later counts, it was trained longer."""
        is_best = fitness >= self.best_fitness
        if is_best:
            self.best_fitness, self.best_epoch = fitness, epoch
        return is_best

    def is_due(self, epoch: int) -> bool:
        """Whether training ends after this epoch."""
        return self.patience > 0 and epoch - self.best_epoch >= self.patience
