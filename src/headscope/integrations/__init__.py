"""One callback for each trainer that people have: `huggingface` and `lightning`."""
