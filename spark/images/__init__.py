"""From image files to batches: sources, decoding, augmentation, loaders and streams."""
