"""From files of rows to a `TrainingTask`: `prepare` is the way in."""
