"""What `models.trainer` is made of: configuration, order of samples, schedules, parallelism, one worker's loop."""
