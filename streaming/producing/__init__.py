"""How records reach Kafka: columns of events, ready record batches, their delivery, and messages of the stream."""
