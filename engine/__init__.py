"""What a training is made of, below the script that tells its story: scripts -> engine -> {models, data} -> utils."""
