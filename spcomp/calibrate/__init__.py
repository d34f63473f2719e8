"""What is chosen offline, once a model: searches over samples of its tensors, and the files, our
own and those of others, that carry their results."""
