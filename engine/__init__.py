"""What a training is made of, between the script that tells its story and the packages below: scripts -> engine -> {models, data} -> utils."""
