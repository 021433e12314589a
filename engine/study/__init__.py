"""Many trainings compared: variants, fair controls, seeds, statistics, tables and figures."""
