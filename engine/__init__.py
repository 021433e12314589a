"""What the scripts run: training, evaluation, inference and the doctor. Imports: scripts -> engine -> {models, data} -> tasks -> utils."""
