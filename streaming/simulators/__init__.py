"""Producers of events: replay of real files and seeded generators, disturbed and paced on their way to Kafka."""
