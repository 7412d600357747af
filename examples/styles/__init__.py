"""Programs in the styles of public Forward-Forward and local-learning code, written for this project: none of them knows fastff.

Each module has Net(), with train_batch(x, label) on a minibatch of images [B, 3, 32, 32] or vectors [B, 784] (its SHAPE) of BATCH samples."""
