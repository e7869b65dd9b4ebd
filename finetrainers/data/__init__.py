"""Sources, decoding, buckets and the cache: files and tensors; knows no model."""
