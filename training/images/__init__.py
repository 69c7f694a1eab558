"""Image classifiers: fields, reading, augmentation, the task."""
