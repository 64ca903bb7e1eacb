"""Continuous batching over a paged KV cache, sampling, beam search."""
