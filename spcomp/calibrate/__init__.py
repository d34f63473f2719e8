"""What is chosen offline, once a model: searches, and the files that carry their results."""
