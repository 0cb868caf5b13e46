"""From a study to a batch of augmented patches: preprocess, cache, sample, augment."""
