"""Images and masks: HC18 and phantoms, splits, augmentation, batches."""
