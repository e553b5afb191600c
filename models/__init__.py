"""What is trained: one harness, one folder a task, one registry."""
