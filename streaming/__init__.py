"""From Kafka to features: the kernel, the workers around it, and simulators that feed them."""
