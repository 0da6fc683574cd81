"""From text to token shards: sources, documents, tokenizers, encoding on all cores, and the shards read back."""
